# SPDX-License-Identifier: Apache-2.0
"""Which scans the commands find in a folder as people have it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_datasets as tiny

from volta_components.errors import InputError
from volta_components.inference.given import choose_scans, expand_source
from volta_components.inference.scans import find_volumes


def chosen(root: Path, output: Path, skip_bad: bool = False, follow_links: bool = False) -> list[str]:
    output.mkdir(exist_ok=True)
    found = choose_scans(expand_source([root], output), output, skip_bad, follow_links=follow_links)
    return [path.name for path in found]


def test_hidden_files_are_no_scans(tmp_path: Path) -> None:
    for i in (1, 2):
        scan = tiny.save_head(tmp_path / f"ds/sub-0{i}/anat/sub-0{i}_T1w.nii.gz", seed=i)
        scan.with_name(f"._{scan.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(4000))
    tiny.save_head(tmp_path / "ds/.git/annex/objects/x.nii.gz")
    assert chosen(tmp_path / "ds", tmp_path / "out") == ["sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz"]
    assert chosen(tmp_path / "ds/sub-01/anat", tmp_path / "out") == ["sub-01_T1w.nii.gz"]


def test_content_that_was_not_fetched_is_named(tmp_path: Path) -> None:
    content = tiny.save_head(tmp_path / "ds/.git/annex/objects/K.nii.gz")
    for i in (1, 2):
        folder = tmp_path / f"ds/sub-0{i}/anat"
        folder.mkdir(parents=True)
        target = content if i == 1 else content.with_name("absent.nii.gz")
        (folder / f"sub-0{i}_T1w.nii.gz").symlink_to(os.path.relpath(target, folder))
    with pytest.raises(InputError, match=r"1 of 2 scans(.|\n)*sub-02_T1w.nii.gz(.|\n)*not fetched(.|\n)*datalad get"):
        chosen(tmp_path / "ds", tmp_path / "out")
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["sub-01_T1w.nii.gz"]
    with pytest.raises(InputError, match="datalad get"):
        chosen(tmp_path / "ds/sub-02/anat/sub-02_T1w.nii.gz", tmp_path / "out")


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "ds/p2_T1w.nii.gz")
    tiny.save_head(tmp_path / "ds/x.nii.gz", seed=1)
    os.rename(tmp_path / "ds/x.nii.gz", os.path.join(os.fsencode(tmp_path / "ds"), b"M\xfcller.nii.gz"))  # noqa: PTH104, PTH118
    with pytest.raises(InputError, match=r"its name is not UTF-8 +rename it, for example to Müller\.nii\.gz"):
        chosen(tmp_path / "ds", tmp_path / "out")
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["p2_T1w.nii.gz"]


def test_links_are_one_scan(tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "ds/real/a_T1w.nii.gz")
    (tmp_path / "ds/again").symlink_to("real")
    (tmp_path / "ds/round").symlink_to(".")
    assert chosen(tmp_path / "ds", tmp_path / "out") == ["a_T1w.nii.gz"]


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "ds/a_T1w.nii.gz")
    (tmp_path / "ds/b_T1w.nii.gz").symlink_to("b_T1w.nii.gz")
    with pytest.raises(InputError, match=r"1 of 2 scans(.|\n)*b_T1w.nii.gz +no such file"):
        chosen(tmp_path / "ds", tmp_path / "out")
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["a_T1w.nii.gz"]


def test_a_dicom_series_in_two_folders_is_one_scan_and_gaps_are_named(tmp_path: Path) -> None:
    shape, affine = tiny.grid("RAS", (1.0, 1.0, 1.0), (20, 22, 24))
    head = tiny.head(shape, affine)
    tiny.write_series(tmp_path / "ds/P1/A", head, affine, patient="P1")
    (tmp_path / "ds/P1/B").mkdir()
    for path in sorted((tmp_path / "ds/P1/A").iterdir())[15:]:
        path.rename(tmp_path / "ds/P1/B" / path.name)
    assert chosen(tmp_path / "ds", tmp_path / "out") == ["sub-P1_ses-20060418.nii"]
    tiny.write_series(tmp_path / "ds/P2/A", head, affine, patient="P2", slices=set(range(24)) - {8, 9, 10})
    with pytest.raises(InputError, match="about 3 slices missing") as error:
        chosen(tmp_path / "ds", tmp_path / "out")
    assert str(tmp_path / "ds/P2/A") in str(error.value)
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["sub-P1_ses-20060418.nii"]


def test_series_of_two_folders_under_one_name_are_named(tmp_path: Path) -> None:
    shape, affine = tiny.grid("RAS", (1.0, 1.0, 1.0), (20, 22, 24))
    output, sites = tmp_path / "out", [tmp_path / "siteA", tmp_path / "siteB"]
    for seed, site in enumerate(sites):
        tiny.write_series(site / "1", tiny.head(shape, affine, seed=seed), affine, patient="P1")
    output.mkdir()
    told = (
        rf"1 of 2 scans(.|\n)*{sites[1]}/1 +sub-P1_ses-20060418: another(.|\n)*in {sites[0]}/1 +give each an --output"
    )
    with pytest.raises(InputError, match=told):
        choose_scans(expand_source(sites, output), output, skip_bad=False)
    converted = output / "converted" / "sub-P1_ses-20060418.nii"
    first = converted.read_bytes()
    with pytest.raises(InputError, match=told.replace("of 2", "of 1")):
        chosen(sites[1], output)
    assert chosen(sites[0], output) == [converted.name] and converted.read_bytes() == first
    # Of the same folder, what has changed is converted again.
    tiny.write_series(sites[0] / "1", tiny.head(shape, affine, seed=2), affine, patient="P1")
    assert chosen(sites[0], output) == [converted.name] and converted.read_bytes() != first
    # One scan in two folders is one scan.
    shutil.copytree(sites[0], tmp_path / "copy")
    assert chosen(tmp_path / "copy", output) == [converted.name]


def test_ids_come_from_names_as_in_prepare(tmp_path: Path) -> None:
    for name in ("sub-01_ses-2_run-1_T1w.nii.gz", "anna_T1w.nii.gz"):
        tiny.save_head(tmp_path / name)
    found = {item["subject_id"]: item["session"] for item in find_volumes(tmp_path)}
    assert found == {"sub-01": "ses-2", "anna": None}


def test_patients_of_public_data_sets_have_their_ids(tmp_path: Path) -> None:
    adni = "raw/002_S_0295/MPRAGE/2006-04-18_08_20_30.0/I1/ADNI_002_S_0295_MR_MPRAGE_br_raw_2006_2_I1.nii"
    names = {
        "raw/BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz": ("BraTS-GLI-00005", "100"),
        "raw/BraTS-GLI-00005-101/BraTS-GLI-00005-101-t1n.nii.gz": ("BraTS-GLI-00005", "101"),
        adni: ("002_S_0295", "ses-20060418"),
        "raw/IXI002-Guys-0828-T1.nii.gz": ("IXI002", None),
        "raw/sub-ADNI002S0295_ses-M06_T1w.nii.gz": ("sub-ADNI002S0295", "ses-M06"),
        "raw/anna/mri/T1.mgz": ("anna", None),
        "raw/bert/mri/T1.mgz": ("bert", None),
    }
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_volumes(tmp_path / "raw")
    told = {item["image"]: (item["subject_id"], item["session"]) for item in found}
    assert told == {str(tmp_path / name): ids for name, ids in names.items()}
    # As a list of scans, as the commands give them.
    assert find_volumes([item["image"] for item in found]) == found


def test_whom_a_scan_is_of_is_said_where_it_is_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("p1_visit1", "p1_visit2", "anna")):
        tiny.save_head(tmp_path / f"ds/{name}_T1w.nii.gz", seed=number)
    chosen(tmp_path / "ds", tmp_path / "out")
    said = capsys.readouterr().err
    assert "is a guess" in said and "p1_visit1 and p1_visit2: taken for one person" in said
    ids = {(item["subject_id"], item["session"]) for item in find_volumes(tmp_path / "ds")}
    assert ids == {("p1", "ses-visit1"), ("p1", "ses-visit2"), ("anna", None)}
    chosen(tmp_path / "ds/anna_T1w.nii.gz", tmp_path / "out")
    assert "guess" not in capsys.readouterr().err


def test_other_contrasts_are_no_scans_and_nobody_is_lost_by_that(tmp_path: Path) -> None:
    for kind in ("t1n", "t1c", "t2w", "t2f", "seg"):
        tiny.save_head(tmp_path / f"ds/BraTS-GLI-00005-100/BraTS-GLI-00005-100-{kind}.nii.gz")
    for number, name in enumerate(("anna_T1", "anna_T1_brain", "anna_mask"), start=1):
        tiny.save_head(tmp_path / f"ds/{name}.nii.gz", seed=number)
    expected = ["BraTS-GLI-00005-100-t1n.nii.gz", "anna_T1.nii.gz"]
    assert chosen(tmp_path / "ds", tmp_path / "out") == expected
    tiny.save_head(tmp_path / "ds/bert_FLAIR.nii.gz", seed=4)
    with pytest.raises(InputError, match=r"1 of 3 scans(.|\n)*bert_FLAIR.nii.gz +bert has no T1 scan"):
        chosen(tmp_path / "ds", tmp_path / "out")
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == expected
    assert chosen(tmp_path / "ds/bert_FLAIR.nii.gz", tmp_path / "out") == ["bert_FLAIR.nii.gz"]


def test_folders_of_people_without_a_volume_are_named(tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "ds/anna/T1.nii.gz")
    tiny.save_head(tmp_path / "ds/bob/T1.nii.gz", seed=2)
    (tmp_path / "ds/carl").mkdir()
    (tmp_path / "ds/dora").mkdir()
    (tmp_path / "ds/dora/notes.txt").touch()
    with pytest.raises(InputError, match=r"2 of 4 scans(.|\n)*carl.*has no volume in it(.|\n)*dora.*only notes.txt"):
        chosen(tmp_path / "ds", tmp_path / "out")
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["T1.nii.gz", "T1.nii.gz"]


def test_links_that_leave_the_folder_need_an_option(tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "elsewhere/b_T1w.nii.gz", seed=1)
    tiny.save_head(tmp_path / "ds/a_T1w.nii.gz")
    (tmp_path / "ds/b_T1w.nii.gz").symlink_to("../elsewhere/b_T1w.nii.gz")
    with pytest.raises(InputError, match=r"1 of 2 scans(.|\n)*b_T1w.nii.gz +a link that leaves(.|\n)*--follow-links"):
        chosen(tmp_path / "ds", tmp_path / "out")
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["a_T1w.nii.gz"]
    assert chosen(tmp_path / "ds", tmp_path / "out", follow_links=True) == ["a_T1w.nii.gz", "b_T1w.nii.gz"]
    with pytest.raises(InputError, match=r"1 files or folders(.|\n)*b_T1w.nii.gz +a link that leaves"):
        find_volumes(tmp_path / "ds")


def test_what_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_head(tmp_path / "ds/a_T1w.nii.gz")
    for name in ("shut", "more"):
        (tmp_path / "ds" / name).mkdir()
    for name in ("b_T1w.nii.gz.part", "more/c.zip", "d.hdr"):
        (tmp_path / "ds" / name).write_bytes(b"x" * 400)
    (tmp_path / "ds/e_T1w.nii.gz").symlink_to("a_T1w.nii.gz")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError) as error:
        chosen(tmp_path / "ds", tmp_path / "out")
    for words in (
        "shut +permission denied",
        "b_T1w.nii.gz.part +no volume",
        "c.zip +an archive",
        "d.hdr +half of a pair",
    ):
        assert re.search(words, str(error.value)), words
    assert re.search("e_T1w.nii.gz +a link to a_T1w.nii.gz, which has another name", str(error.value))
    assert chosen(tmp_path / "ds", tmp_path / "out", skip_bad=True) == ["a_T1w.nii.gz"]
    with pytest.raises(InputError, match="5 files or folders in it would be left out"):
        find_volumes(tmp_path / "ds")


def test_archives_beside_the_subjects_of_a_bids_data_set_are_nobodys_scans(tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "ds/sub-1/anat/sub-1_T1w.nii.gz")
    (tmp_path / "ds/sourcedata/sub-1").mkdir(parents=True)
    (tmp_path / "ds/sourcedata/sub-1/sub-1_T1w.dicom.tgz").touch()
    assert chosen(tmp_path / "ds", tmp_path / "out") == ["sub-1_T1w.nii.gz"]


def test_the_header_of_a_pair_is_told_to_be_no_volume(tmp_path: Path) -> None:
    (tmp_path / "scan.hdr").write_bytes(bytes(348))
    with pytest.raises(InputError, match=r"scan\.hdr(.|\n)*not a volume(.|\n)*of a pair, its \.img"):
        chosen(tmp_path / "scan.hdr", tmp_path / "out")
