# SPDX-License-Identifier: Apache-2.0
"""Packed items are the items, in little memory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from memory import in_fresh_process, kept_by_datalist
from prepared import make_prepared

from volta_components.data.datalist import datalist_hash, load_datalist, make_content
from volta_components.data.items import PackedItems, Packer
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_json, write_json

ITEMS = [
    {"image": "images/a.nii", "patient_id": "ä", "age": 61.25, "sex": None, "nested": {"x": [1, "\ud800"]}},
    {"image": "b.nii", "label": "b_label.nii", "patient_id": "b", "stripped": True},
    {"patient_id": "c"},
    {"image": "/there/d.nii", "patient_id": "d"},
]


def test_they_are_a_list_of_what_they_were_made_from() -> None:
    packed = PackedItems(ITEMS)
    assert list(packed) == ITEMS and len(packed) == 4 and packed[-1] == ITEMS[3]
    assert list(packed[1::2]) == ITEMS[1::2] and list(packed[::-1].take([0, 3])) == [ITEMS[3], ITEMS[0]]
    assert list(pickle.loads(pickle.dumps(packed))) == ITEMS
    assert not PackedItems() and list(PackedItems()) == [] and not packed[:0]
    with pytest.raises(IndexError):
        packed[4]
    packed[0]["age"] = 3
    assert packed[0] == ITEMS[0], "what was unpacked is the caller's"


def test_paths_lie_below_a_folder() -> None:
    below = PackedItems(ITEMS).below(Path("/data"))
    assert [item.get("image") for item in below] == ["/data/images/a.nii", "/data/b.nii", None, "/there/d.nii"]
    assert below[1:2][0]["label"] == "/data/b_label.nii"
    assert {**below[2]} == ITEMS[2]


def test_whatever_is_in_a_datalist_comes_back(tmp_path: Path) -> None:
    """An item within an item, and one among what was left out, are as they were."""
    deep = {"image": "x", "patient_id": "p", "more": {"image": "y", "patient_id": "q", "n": [1.5]}}
    text = json.dumps({"training": [deep, 3], "excluded": [{"image": "x", "patient_id": "p"}]})
    packer = Packer()
    read = json.loads(text, object_hook=packer.hook)
    assert list(PackedItems(read["training"], packer)) == [deep, 3]
    assert list(map(packer.plain, read["excluded"])) == [{"image": "x", "patient_id": "p"}]
    assert list(PackedItems(iter(read["training"][::-1]), packer)) == [3, deep]
    folder = make_prepared(tmp_path / "data", 3, 3, (8, 8, 8))
    content = read_json(folder / "datalist.json")
    content["excluded"] = [{"image": "x", "patient_id": "p", "reason": "none"}]
    content["training"][1] = 3
    write_json(folder / "datalist.json", content)
    with pytest.raises(InputError, match="item 1  is int, not an object"):
        load_datalist(folder)
    del content["training"][1]
    write_json(folder / "datalist.json", {**content, "hash": datalist_hash(content)})
    datalist = load_datalist(folder)
    assert datalist.excluded == content["excluded"]
    assert list(datalist.content["training"]) == content["training"]


def test_the_hash_is_that_of_canonical_json() -> None:
    content = make_content("name", (1, 1, 1), (8, 8, 8), 0, 2, [dict(item, subject_id="s") for item in ITEMS[1:]], [])
    plain = {key: value for key, value in content.items() if key not in ("hash", "excluded")}
    assert datalist_hash({**content, "training": PackedItems(content["training"])}) == sha256_json(plain)
    assert content["hash"] == sha256_json(plain)
    for empty in ({"b": [], "a": 1}, {"b": []}, {"b": [1, {"z": 1, "y": [2]}], "c": None}):
        assert sha256_json(empty, "b") == sha256_json(empty)


def test_a_large_datalist_takes_little_more_memory_than_its_text(tmp_path: Path) -> None:
    folder = make_prepared(tmp_path / "data", 2, 2, (8, 8, 8))
    content = read_json(folder / "datalist.json")
    first = content["training"][0]
    names = [f"s{n}" for n in range(4000)]
    content["training"] = [
        {**first, "subject_id": name, "patient_id": name, "image": f"images/{name}.nii", "fold": 0} for name in names
    ]
    content["training"][0]["fold"] = 1
    write_json(folder / "datalist.json", {**content, "hash": datalist_hash(content)})
    size = sum(len(json.dumps(item)) for item in content["training"])
    assert in_fresh_process(kept_by_datalist, folder) < 1.1 * size, "dictionaries would take four times as much"
