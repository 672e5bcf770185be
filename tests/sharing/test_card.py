# SPDX-License-Identifier: Apache-2.0
"""The model card of a packed bundle says what is true of its weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import BUNDLES, ROOT, tiny_network, unpack

from volta_components import __version__
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json
from volta_components.inference.embeddings import EmbeddingTable
from volta_components.inference.probes import probe_report
from volta_components.sharing.card import is_phantom
from volta_components.sharing.pack import (
    assemble,
    pack_bundle,
)


def test_the_model_card_tells_where_the_weights_come_from(packed: Path, tmp_path: Path) -> None:
    folder = unpack(packed / f"ixi_sex_phantom_tiny_v{__version__}.zip", tmp_path)
    card = (folder / "docs" / "README.md").read_text()
    weights = card[card.index("## These weights") :]
    for fact in (
        "6 volumes of 6 subjects (phantom)",
        "d" * 64,
        "e" * 64,
        "| seed | 5 |",
        "| overlays | `tiny` |",
        "| pretrained on | 1 subjects |",
    ):
        assert fact in weights, fact
    assert "4 training, 2 validation, 2 scored, 0 unused" in weights
    # A setting that is not what the packed config would train with.
    assert "| `epochs` | `3` | `10` |" in weights and "| `seed` | `5` | `0` |" in weights
    assert "| auroc | 0.75 | 0.500 to 1.000 |" in card[card.index("## Results") : card.index("## Limits")]
    assert "Not a medical device" in weights


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_packed_card_speaks_of_the_packed_folder(packed: Path, tmp_path: Path, bundle: str) -> None:
    """Its own sizes, its own files; nothing of the repository's sizes, overlays and places."""
    folder = unpack(packed / f"{bundle}_phantom_tiny_v{__version__}.zip", tmp_path)
    card = (folder / "docs" / "README.md").read_text()
    network = tiny_network(bundle)
    assert f"| parameters | {sum(p.numel() for p in network.parameters()):,} |" in card
    assert "| prepared volumes | 48 x 64 x 64 at 3 mm |" in card and "`num_layers` 6" in card
    for stranger in ("95,447,042", "92,802,291", "89,188,608", "bundles/", "12 blocks of 768", "<!-- pack", "<!-- end"):
        assert stranger not in card, stranger
    named = set(re.findall(r"^\| `([\w.]+\.json)` \|", card, flags=re.MULTILINE))
    assert named and all((folder / "configs" / name).is_file() for name in named)
    for path in re.findall(r"configs/[\w.]+\.json", card):
        assert (folder / path).is_file(), path
    assert "trained on phantoms (synthetic heads): 6 volumes of 6 subjects" in card
    assert "ship with this project" not in card and "None yet" not in card
    assert "trained on phantoms: 6 volumes" in (folder / "docs" / "data_license.txt").read_text()
    if bundle in ("ixi_sex", "aibl_ad"):
        assert "| window | 144 x 192 x 192 mm |" in card and "voxels of 3 mm, one channel" in card
    metadata = read_json(folder / "configs" / "metadata.json")
    references = card.split("\n## References\n")[1]
    assert "1. Makawana" in references and "https://" in references and metadata["authors"] in references
    assert "voxels of 3 mm" in metadata["image_classes"] and "Phantoms" in metadata["data_source"]
    assert metadata["eval_metrics"] == ({} if bundle == "pretrain" else {"auroc": 0.75})
    assert words_in_tables(card) == []


def words_in_tables(card: str) -> list[str]:
    """Lines right after a table's row, which Markdown takes as rows of it."""
    return re.findall(r"^\|.*\n([^|\n].*)$", card, flags=re.MULTILINE)


def clinical(weights: Path, folder: Path) -> Path:
    """The same weights with the record of a training on patients."""
    folder.mkdir()
    shutil.copy(weights, folder / "model.pt")
    record = read_json(weights.with_suffix(".json"))
    record["tags"] |= {"phantom": "false", "datalist_name": "memory_clinic"}
    record["provenance"] |= {"cohort": "memory_clinic", "phantom": False}
    write_json(folder / "model.json", record)
    return folder / "model.pt"


@pytest.mark.parametrize("bundle", ["ixi_sex", "harp_hippocampus"])
def test_weights_of_patients_are_not_denied(weights: dict[str, Path], tmp_path: Path, bundle: str) -> None:
    model = clinical(weights[bundle], tmp_path / "trained")
    packed = pack_bundle(ROOT / "bundles" / bundle, tmp_path / "out", ["tiny"], model=model)
    assert packed.path.name == f"{bundle}_tiny_v{__version__}.zip"
    folder = unpack(packed.path, tmp_path)
    card = (folder / "docs" / "README.md").read_text()
    licence = (folder / "docs" / "data_license.txt").read_text()
    metadata = read_json(folder / "configs" / "metadata.json")
    for text in (card, licence, metadata["data_source"]):
        assert "memory_clinic" in text
    assert "no weights trained on clinical data" not in re.sub(r"\s+", " ", card + licence).lower()
    assert "trained on phantoms" not in card and "phantom" not in metadata["name"] + metadata["data_source"]
    assert "of phantoms only" not in card
    limits = card[card.index("## Limits") : card.index("## These weights")]
    original = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text()
    assert original[original.index("## Limits") :].splitlines()[3] in limits


@pytest.mark.parametrize(
    ("changes", "phantom"),
    [
        ({}, True),
        # Phantoms alone, but from an encoder of people, of nobody knows whom, or with all of that removed.
        ({"pretraining": {"encoder_sha256": "e" * 64, "phantom": False, "patient_ids": ["0" * 16]}}, False),
        ({"pretraining": {"encoder_sha256": "e" * 64, "patient_ids": None}}, False),
        ({"pretraining": None}, False),
        ({"pretraining": {"encoder_sha256": "", "patient_ids": []}, "tags": {"encoder_sha256": ""}}, True),
        ({"pretraining": None, "tags": {}}, True),
        # A merged data set of both, whose name and tags speak of phantoms; and a record that says nothing.
        ({"provenance": {"cohort": "phantom_and_adni", "phantom": False}, "tags": {"phantom": "true"}}, False),
        ({"provenance": {"cohort": "phantom"}}, False),
        ({"provenance": None}, False),
    ],
)
def test_only_what_is_known_to_be_of_phantoms_alone_counts_as_such(
    weights: dict[str, Path], changes: dict[str, Any], phantom: bool
) -> None:
    record = read_json(weights["ixi_sex"].with_suffix(".json"))
    assert is_phantom({**record, **changes}) is phantom


def test_what_is_packed_of_phantoms_and_then_trained_on_people_is_not_packed_as_of_phantoms(
    weights: dict[str, Path], packed: Path, tmp_path: Path
) -> None:
    """As a model that annotators have trained on; its folder's name, card and metadata speak of phantoms."""
    folder = unpack(packed / f"ixi_sex_phantom_tiny_v{__version__}.zip", tmp_path)
    model = clinical(weights["ixi_sex"], tmp_path / "trained")
    with pytest.raises(
        InputError, match=r"not known to be trained on phantoms alone, but the name ixi_sex_phantom_tiny"
    ):
        pack_bundle(folder, tmp_path / "out", model=model)
    said = r"docs/README.md: says 'weights are trained on phantoms', but .*memory_clinic.*--bundle ORIGINAL"
    with pytest.raises(InputError, match=said):
        pack_bundle(folder, tmp_path / "out", name="ixi_sex", model=model)


COST = {"hours": 1.25, "peak_memory_gib": 6.5, "hardware": "NVIDIA H100", "code_versions": ["1+aaa", "1+bbb"]}


@pytest.mark.parametrize("shows_scans", [True, False])
@pytest.mark.parametrize("phantom", [True, False])
def test_picture_time_and_memory_are_the_trainings(
    weights: dict[str, Path], tmp_path: Path, phantom: bool, shows_scans: bool
) -> None:
    """Nobody's head leaves the lab on a picture."""
    model = clinical(weights["ixi_sex"], tmp_path / "trained")
    picture = model.with_suffix(".png")
    picture.write_bytes(b"drawn")
    record = read_json(model.with_suffix(".json"))
    about = {"sha256": sha256_file(picture), "caption": "What was drawn.", "shows_scans": shows_scans}
    record["provenance"]["phantom"] = phantom
    write_json(model.with_suffix(".json"), {**record, "cost": COST, "picture": about})
    bundle, name = ROOT / "bundles" / "ixi_sex", "sex_phantom" if phantom else "sex"
    folder = assemble(bundle, tmp_path / "a" / name, ["tiny"], model=model)
    card = (folder / "docs" / "README.md").read_text()
    assert "trained on NVIDIA H100 in 1.25 hours, with 6.5 GiB of memory at the peak" in card
    assert (
        "| time | 1.25 h of training |" in card and "| hardware | NVIDIA H100 |" in card and words_in_tables(card) == []
    )
    assert "; the run was resumed by other code: 1+aaa, 1+bbb |" in card
    copies = list(folder.rglob("*.png"))
    shown = "![What was drawn.](weights.png)" in card
    if phantom or not shows_scans:
        assert shown and [path.read_bytes() for path in copies] == [b"drawn"] and copies[0].name == "weights.png"
    else:
        assert not shown and not copies
    # Another picture of that name is not the weights'.
    picture.write_bytes(b"of other weights")
    folder = assemble(bundle, tmp_path / "b" / name, ["tiny"], model=model)
    assert not list(folder.rglob("*.png")) and "weights.png" not in (folder / "docs" / "README.md").read_text()


def test_a_card_of_ones_own(weights: dict[str, Path], tmp_path: Path) -> None:
    """Without marks nothing is replaced, what must be said stands at the end, and a denial is refused."""
    bundle = tmp_path / "ixi_sex"
    shutil.copytree(ROOT / "bundles" / "ixi_sex", bundle, ignore=shutil.ignore_patterns("models", "runs", "eval"))
    card = bundle / "docs" / "README.md"
    card.write_text("# Ours\n\nOur own words.\n")
    model = clinical(weights["ixi_sex"], tmp_path / "trained")
    text = (assemble(bundle, tmp_path / "a", ["tiny"], model) / "docs" / "README.md").read_text()
    assert text.startswith("# Ours\n\nOur own words.\n\n## These weights\n\n**These weights are trained on 6 volumes")
    assert "| auroc | 0.75 | 0.500 to 1.000 |" in text
    card.write_text("# Ours\n\nNo weights trained\non clinical data are here.\n")
    with pytest.raises(InputError, match=r"docs/README\.md: says 'No weights trained on .*memory_clinic"):
        assemble(bundle, tmp_path / "b", ["tiny"], model)
    card.write_text("# Ours\n\n<!-- pack: wieghts -->\nx\n<!-- end -->\n")
    with pytest.raises(InputError, match="nothing to put into block wieghts"):
        assemble(bundle, tmp_path / "c", ["tiny"], model)


def test_metrics_of_a_later_evaluation_come_into_the_card(weights: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = [{"subject_id": f"p{i}", "sex": "MF"[i % 2], "cohort": "c", "fold": i % 3} for i in range(42)]
    table = EmbeddingTable()
    table.rows[:] = [dict.fromkeys(("summary", "mean"), rng.normal(size=3) + (item["sex"] == "F")) for item in items]
    probes = probe_report({"volta": table}, items, {"sex": ["M", "F"]}, tmp_path / "probes.json")
    [row] = [row for row in probes if (row["embedding"], row["probe"]) == ("summary", "linear")]
    assert 0.5 < row["low"] < row["value"] < row["high"] < 1
    row["model_sha256"] = sha256_file(weights["pretrain"])
    few = {**row, "embedding": "few", "interval_patients": 4}
    warning = "out of fold; **patients that it was pretrained on may be among them**:"
    for leak in ("none", "allowed"):
        write_json(tmp_path / "probes.json", [{**each, "leak": leak} for each in (row, few)])
        target = tmp_path / f"{leak}_phantom"
        source = ROOT / "bundles" / "pretrain"
        folder = assemble(source, target, ["tiny"], weights["pretrain"], tmp_path / "probes.json")
        card = (folder / "docs" / "README.md").read_text()
        assert (warning in card) == (leak == "allowed")
    value, limits = f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"
    assert f"| sex | volta | summary | linear | 42 | auroc | {value} | {limits} | 0.50 |" in card
    assert f"| sex | volta | few | linear | 42 | auroc | {value} |  | 0.50 |" in card
    assert "Not scored" not in card
    numbers = {"mean_dice": 0.5, "mean_dice_low": 0.4, "mean_dice_high": 0.6, "hd95_failures": 1.0}
    own = {"model_sha256": sha256_file(weights["harp_hippocampus"]), "datalist_name": "clinic"}
    write_json(tmp_path / "metrics.json", {"metrics": numbers, "leak": "allowed", "scored": 7, **own})
    folder = assemble(
        ROOT / "bundles" / "harp_hippocampus",
        tmp_path / "b_phantom",
        ["tiny"],
        weights["harp_hippocampus"],
        tmp_path / "metrics.json",
    )
    card = (folder / "docs" / "README.md").read_text()
    assert "Scored again, 7 scans; **patients that it was trained on may be among them**" in card
    assert "| mean_dice | 0.5 | 0.400 to 0.600 |" in card and "| hd95_failures | 1 |  |" in card
    assert "mean_dice_low" not in card
    # Rows without a hash are of an earlier version; other JSON files are no numbers.
    other = row | {"model_sha256": "0" * 64}
    for rows, message in (([row, other], "another model"), (probes, "no model_sha256"), ([1], "no model"), ("x", "no")):
        write_json(tmp_path / "probes.json", rows)
        with pytest.raises(InputError, match=rf"probes.json: .*{message}"):
            assemble(source, tmp_path / "d_phantom", ["tiny"], weights["pretrain"], tmp_path / "probes.json")
        shutil.rmtree(tmp_path / "d_phantom")
    # Of another model; a run's own result.json, which does not say of which.
    for named, message in (({"model_sha256": "0" * 64}, r"another model \(00000000"), ({}, "no model_sha256")):
        write_json(tmp_path / "metrics.json", {"metrics": numbers, "leak": "none", "scored": 7, **named})
        words = ROOT / "bundles/harp_hippocampus", tmp_path / f"c{len(named)}_phantom", ["tiny"]
        with pytest.raises(InputError, match=rf"metrics.json: .*{message}"):
            assemble(*words, weights["harp_hippocampus"], tmp_path / "metrics.json")
