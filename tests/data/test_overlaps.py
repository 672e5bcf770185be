# SPDX-License-Identifier: Apache-2.0
import shutil

from volta_components.data.datalist import load_datalist, make_content
from volta_components.data.overlaps import check, find_overlaps, merge
from volta_components.files import write_json


def write(folder, *patients, **more):
    """A datalist of a volume for each patient; its name is the folder's."""
    (folder / "images").mkdir(parents=True)
    items = [
        {"image": f"images/{who}.nii", "subject_id": who, "patient_id": who, "fold": 0, "cohort": folder.name, **more}
        for who in patients
    ]
    for item in items:
        (folder / item["image"]).touch()
    write_json(folder / "datalist.json", make_content(folder.name, (1, 1, 1), (8, 9, 10), 0, 5, items, []))
    return folder


def test_a_merged_set_of_merged_sets_names_the_volumes_themselves(tmp_path):
    one, two, three, four = (write(tmp_path / name, name) for name in "abcd")
    merge(one, two, output=tmp_path / "ab/deep", name="ab")
    merge(tmp_path / "ab/deep", three, output=tmp_path / "abc", name="abc")
    images = [entry["image"] for entry in load_datalist(tmp_path / "abc").content["training"]]
    assert images == ["../a/images/a.nii", "../b/images/b.nii", "../c/images/c.nii"]
    shutil.rmtree(tmp_path / "ab")
    merge(tmp_path / "abc", four, output=tmp_path / "all", name="all")


def test_scans_that_cannot_be_compared_are_counted(tmp_path, capsys):
    one, two = write(tmp_path / "a", "a", "b"), write(tmp_path / "b", "c", sha256="0" * 64)
    for call in (lambda: check(one, two), lambda: merge(one, two, output=tmp_path / "both")):
        assert call() == 0
        (warning,) = [line for line in capsys.readouterr().out.splitlines() if "no hash" in line]
        assert warning.startswith(f"warning: {one / 'datalist.json'}: 2 of 2 scans have no hash")


def test_overlaps_of_nothing(tmp_path):
    one = load_datalist(write(tmp_path / "a", "a", "b"))
    found = find_overlaps([one])
    assert (found.certain, found.look_alikes, found.uncertain, found.near_copies) == ([], [], [], [])
