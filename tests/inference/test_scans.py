# SPDX-License-Identifier: Apache-2.0
"""What a source names: scans, their ids and where results go."""

from __future__ import annotations

import pytest
from prepared import make_prepared

from volta_components.data.walk import walk
from volta_components.errors import InputError
from volta_components.inference.scans import find_volumes, result_root, scans_below


def test_of_a_bids_folder_the_t1_scans_are_found(tmp_path):
    anat = tmp_path / "bids/sub-01/ses-M000/anat"
    scans = [anat / "sub-01_ses-M000_T1w.nii.gz", tmp_path / "bids/sub-02/anat/sub-02_run-1_T1w.nii"]
    others = [
        anat / "sub-01_ses-M000_T2w.nii.gz",
        anat / "sub-01_ses-M000_desc-brain_mask.nii.gz",
        tmp_path / "bids/derivatives/tool/sub-01/sub-01_T1w.nii.gz",
        tmp_path / "bids/derivatives/tool/sub-01/norm.mgz",
    ]
    plain = [
        tmp_path / "plain" / name for name in ("IXI002-Guys-0828-T1.nii.gz", "my_mask_study.nii", "sub-1_ses-2.nii")
    ]
    for path in [*scans, *others, *plain]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert scans_below(walk(tmp_path / "bids")) == (sorted(scans), sorted(others))
    assert scans_below(walk(tmp_path / "plain")) == (sorted(plain), [])
    assert [item["image"] for item in find_volumes(tmp_path / "bids")] == [str(path) for path in sorted(scans)]


def test_volumes_are_found_and_named_as_in_bids(tmp_path):
    make_prepared(tmp_path / "data", count=4, shape=(8, 8, 8))
    found = find_volumes(tmp_path / "data" / "images")
    assert [(item["subject_id"], item["session"]) for item in found] == [
        (f"sub-{number:04d}", "ses-M000") for number in range(4)
    ]
    assert find_volumes([found[0]["image"]])[0] == found[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no volumes"):
        find_volumes(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        find_volumes(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a volume"):
        find_volumes(tmp_path / "notes.txt")


def test_results_of_scans_with_one_name_lie_in_folders(tmp_path):
    paths = [tmp_path / "bert" / name / "mri" / "T1.mgz" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    assert result_root(paths) == str(tmp_path / "bert")
    assert result_root(paths[:1]) == result_root(tmp_path / "none") == ""
    clash = paths[0].with_name("T1.nii.gz")
    clash.touch()
    with pytest.raises(InputError, match=r"the same name(?s:.)*T1\.mgz(?s:.)*T1\.nii\.gz"):
        result_root([*paths, clash])


def test_results_do_not_lie_among_the_scans(tmp_path):
    (tmp_path / "a.nii").touch()
    with pytest.raises(InputError, match="lies in --source"):
        find_volumes(tmp_path, tmp_path / "results")
    assert len(find_volumes(tmp_path, tmp_path.parent / "results")) == 1


def test_a_config_refuses_a_folder_in_which_somebody_has_no_scan_that_it_reads(tmp_path):
    """What ``volta3d segment`` names or converts, a bundle's own config must not pass over."""
    names = ["sub-anna/anat/sub-anna_T1w.nii.gz", "sub-fay/anat/sub-fay_T2w.nii.gz", "sub-carl/notes.txt"]
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True)
        path.touch()
    dicom = tmp_path / "sub-dora" / "0001.dcm"
    dicom.parent.mkdir()
    dicom.write_bytes(bytes(128) + b"DICM")
    with pytest.raises(InputError, match="3 files or folders in it would be left out") as caught:
        find_volumes(tmp_path)
    said = str(caught.value)
    assert "sub-fay has no T1 scan by the names" in said and "has no volume, only notes.txt" in said
    assert "0001.dcm" in said and "volta3d segment and embed convert DICOM" in said and "sub-anna" not in said
    assert len(find_volumes(tmp_path / "sub-anna")) == 1
