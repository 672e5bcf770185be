# SPDX-License-Identifier: Apache-2.0
"""Manifests: those of the package, those of users, and what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import read_blocks

from volta_components.cli import COMMANDS, read
from volta_components.data.fetch.manifest import SCHEMA, built_in, read_resource
from volta_components.errors import InputError

ROOT = Path(__file__).parents[3]


def content(**changes: Any) -> dict[str, Any]:
    return {
        "name": "toys",
        "title": "Toy volumes",
        "homepage": "https://example.org",
        "licence": "CC0 1.0",
        "citation": "Toymaker (2024)",
        "files": [{"path": "a.nii", "url": "https://example.org/a.nii"}],
        **changes,
    }


def refused(path: Path, written: Any) -> str:
    path.write_text(json.dumps(written))
    with pytest.raises(InputError) as error:
        read_resource(path)
    return str(error.value)


def test_the_packages_own() -> None:
    assert built_in() == ["anatomies", "ixi"]


@pytest.mark.parametrize("name", built_in())
def test_each_own_resource_says_all_that_people_need(name: str) -> None:
    resource = read_resource(name)
    assert resource.name == name
    assert "http" in resource.licence and resource.citation in resource.terms() and resource.licence in resource.terms()
    steps = resource.next_steps(Path("my data"))
    assert steps
    for step in steps:
        program, command, *_ = step.split()
        assert program == "volta3d" and command in COMMANDS and "'my data'" in step and "{" not in step


def test_the_anatomies_have_the_names_that_the_pages_use_and_a_pinned_commit() -> None:
    files = read_resource("anatomies").files
    assert [file.path for file in files] == [f"anatomy_{number:02d}.nii.gz" for number in range(1, 21)]
    for file in files:
        number = re.findall(r"\d+", file.path)[0]
        assert file.url.endswith(f"/66342c1/data/training_label_maps/training_seg_{number}.nii.gz")
        assert list(file.hashes) == ["sha256"]
    assert len({file.hashes["sha256"] for file in files}) == 20


def test_ixi_lies_as_its_layout_reads_it() -> None:
    archive, table = read_resource("ixi").files
    assert (archive.unpack, table.path) == ("IXI-T1", "IXI.xls")


def test_next_steps_can_be_read_by_the_command_line() -> None:
    for name in built_in():
        for step in read_resource(name).next_steps(Path("data")):
            read(step.split()[1:])


def test_a_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(content(files=[{"path": "d/a.zip", "url": "http://x/a", "md5": "AB" * 16, "unpack": "d"}]))
    )
    (file,) = read_resource(path).files
    assert (file.path, file.hashes, file.unpack) == ("d/a.zip", {"md5": "ab" * 16}, "d")
    assert read_resource(path).next_steps(Path("x")) == []


def test_the_pages_example_is_a_manifest(tmp_path: Path) -> None:
    page = "docs/data/fetch.md"
    (block,) = [block for block in read_blocks((ROOT / page).read_text(), page) if block.language == "json"]
    (tmp_path / "toys.json").write_text(block.text)
    archive, _ = read_resource(tmp_path / "toys.json").files
    assert archive.unpack == "scans" and list(archive.hashes) == ["sha256"]


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../a", "a/../../b", "a\\b", "C:a", ".hidden", "a/.b", "a//b", "", "a/", "."]
)
def test_places_outside_of_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    for key in ("path", "unpack"):
        file = {"path": "a.tar", "url": "https://example.org/a", key: place}
        assert f"files[0].{key}" in refused(tmp_path / "x.json", content(files=[file]))


def test_all_mistakes_are_listed_together(tmp_path: Path) -> None:
    wrong = content(files=[{"path": "a", "url": "file:///etc/passwd", "sha256": "12"}], licence=3, extra=1)
    message = refused(tmp_path / "x.json", wrong)
    for part in ("files[0].url", "files[0].sha256", "licence", "'extra' was unexpected", str(SCHEMA)):
        assert part in message
    for missing in ("licence", "citation", "files"):
        whole = content()
        del whole[missing]
        assert f"'{missing}' is a required property" in refused(tmp_path / "x.json", whole)


@pytest.mark.parametrize("written", [[], "toys", content(files=[])])
def test_other_json_is_refused(tmp_path: Path, written: Any) -> None:
    assert "not a manifest that can be used" in refused(tmp_path / "x.json", written)


def test_two_files_of_one_place_are_refused(tmp_path: Path) -> None:
    """Also where only their case differs: some disks take them for one."""
    files = [{"path": name, "url": "https://example.org/a"} for name in ("a.nii", "A.nii")]
    assert "a.nii  is the path of several files" in refused(tmp_path / "x.json", content(files=files))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no resource ixy; there are anatomies, ixi\. For another, give the path"):
        read_resource("ixy")


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mine\.json: no such file"):
        read_resource(tmp_path / "mine.json")
