# SPDX-License-Identifier: Apache-2.0
"""``volta3d prepare`` in every layout, and its options."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImage
from prepare_helpers import LAYOUTS, OPTIONS, findings

from volta_components.cli import main
from volta_components.data import worker
from volta_components.data.checks import check_contents, check_volumes
from volta_components.data.datalist import load_datalist, make_content
from volta_components.data.fingerprint import fingerprint
from volta_components.data.load import LoadScand
from volta_components.data.prepare import prepare
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_landmark_stays_where_it_was_in_every_layout(prepared, layout):
    _, output, _ = prepared(layout)
    datalist = load_datalist(output)
    assert len(datalist) >= 3
    for item in datalist.items:
        expected = tiny.LANDMARK
        if layout == "brats":
            order = ["GLI-00005_100", "GLI-00005_101", "GLI-00008_100", "MET-00002_000", "PED-00012_000"]
            i = order.index(f"{item['subject_id']}_{item['session']}".removeprefix("BraTS-"))
            expected = (4.0 - 0.5 * i, -3.0, 5.5)
        distance = np.linalg.norm(tiny.find_landmark(item["image"]) - expected)
        assert distance < 0.5, (item["image"], distance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_volumes_are_what_the_bundles_read(prepared, layout):
    _, output, _ = prepared(layout)
    datalist = load_datalist(output)
    for item in datalist.items:
        image = nib.load(item["image"])
        voxels = np.asarray(image.dataobj)
        assert image.shape == datalist.shape and voxels.dtype == np.float32
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert np.allclose(image.header.get_zooms(), 1)
        assert voxels.min() == 0 and voxels.max() == 1
        assert Path(item["image"]).suffix == ".nii"
        qform, sform = image.get_qform(), image.get_sform()
        assert np.allclose(qform, sform, atol=1e-4)


@pytest.mark.parametrize("layout", ["bids", "ixi", "harp"])
def test_the_order_of_intensities_is_kept(prepared, layout):
    """Values at source voxels, looked up in the source and in the result, rise together."""
    _, output, source = prepared(layout)
    for item in load_datalist(output).items[:4]:
        before = nib.load(source / item["source"])
        after = nib.load(item["image"])
        old = before.get_fdata()
        at = np.argwhere(old > 60)
        at = at[np.random.default_rng(0).permutation(len(at))[:400]]
        mapped = nib.affines.apply_affine(np.linalg.inv(after.affine) @ before.affine, at)
        whole = np.abs(mapped - np.round(mapped)).max(axis=1) < 0.02
        inside = ((np.round(mapped) >= 0) & (np.round(mapped) < after.shape)).all(axis=1)
        keep = whole & inside
        if keep.sum() < 20:  # another spacing: few voxels coincide; compare smoothed neighbours instead
            from scipy.ndimage import map_coordinates

            keep = inside
            new = map_coordinates(after.get_fdata(), mapped[keep].T, order=1)
            assert np.corrcoef(np.argsort(np.argsort(old[tuple(at[keep].T)])), np.argsort(np.argsort(new)))[0, 1] > 0.9
            continue
        new = after.get_fdata()[tuple(np.round(mapped[keep]).astype(int).T)]
        order = np.argsort(old[tuple(at[keep].T)], kind="stable")
        assert (np.diff(new[order]) >= -1e-6).all()


# People in the tiny data sets, and those of whom there is a volume that can be used.
PEOPLE = {"bids": (6, 6), "ixi": (7, 4), "brats": (6, 4), "harp": (8, 5), "dicom": (3, 2)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_books_balance_in_every_layout(prepared, layout):
    status, output, _ = prepared(layout)
    pattern = r"people: (\d+) found = (\d+) prepared \+ (\d+) left out by your options.*? \+ (\d+) left out by problems"
    text = (output / "qc/index.html").read_text()
    total, done, by_option, problems = map(int, re.search(pattern, text).groups())
    assert (total, done) == PEOPLE[layout] and total == done + by_option + problems
    datalist = load_datalist(output)
    assert done == len(datalist.patients)
    lost = {row["patient_id"] for row in findings(output) if row["left_out"] == "True"} - datalist.patients - {""}
    assert len(lost) == by_option + problems and (status == 1 or not problems)


def test_what_the_user_left_out_and_what_is_lost_are_kept_apart(tmp_path, capsys):
    root = tiny.make_bids(tmp_path / "source", subjects=6, labels=False)
    subjects = sorted(path.name for path in root.glob("sub-*"))
    for subject, diagnosis in zip(subjects, ("CN", "AD", "n/a", "wanting", "CN", "CN"), strict=True):
        (root / subject / f"{subject}_sessions.tsv").write_text(f"session_id\tdiagnosis\nses-M000\t{diagnosis}\n")
    next((root / subjects[4]).rglob("*_T1w.nii*")).unlink()
    status = prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS, diagnoses=["CN"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("people:")]
    assert line == (
        f"people: 6 found = 2 prepared + 1 left out by your options ({subjects[1]}) + 3 left out by problems "
        f"({subjects[2]}, {subjects[3]}, {subjects[4]})"
    )
    assert status == 1 and [row["kind"] for row in load_datalist(tmp_path / "out").excluded].count("choice") == 1
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS, diagnoses=["CN"], skip_bad=True) == 0


def test_a_name_that_is_not_utf8_is_prepared_under_a_readable_one(tmp_path):
    root = tmp_path / "source"
    for i, name in enumerate((b"M\xfcller_T1w.nii.gz", b"p2_T1w.nii.gz")):
        tiny.save_head(root / "x.nii.gz", seed=i)
        os.rename(root / "x.nii.gz", os.path.join(os.fsencode(root), name))  # noqa: PTH104, PTH118
    assert prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS) == 0
    assert [item["image"] for item in load_datalist(tmp_path / "out").content["training"]] == [
        "images/Müller.nii",
        "images/p2.nii",
    ]


def test_monai_reads_the_datalist(prepared):
    _, output, _ = prepared("bids")
    items = load_decathlon_datalist(str(output / "datalist.json"), True, "training")
    assert items[0]["image"] == str(output / "images/sub-ADNI002S0295_ses-M000.nii")
    assert Path(items[0]["label"]).exists()
    assert not [key for key in items[0] if key.startswith(("image_", "label_")) and key != "label_sha256"]


def test_bids_items_say_who_they_are_of(prepared):
    status, output, source = prepared("bids")
    items = load_datalist(output).content["training"]
    assert status == 0
    first = items[0]
    assert first["patient_id"] == "002_S_0295" and first["site"] == "002" and first["cohort"] == "adni"
    assert (first["sex"], first["diagnosis"], first["age"], first["session"]) == ("M", "CN", 60.0, "ses-M000")
    assert first["source"] == "sub-ADNI002S0295/ses-M000/anat/sub-ADNI002S0295_ses-M000_T1w.nii.gz"
    assert first["source_sha256"] == worker.sha256_file(source / first["source"])
    assert first["sha256"] == worker.sha256_file(output / first["image"])
    image = nib.load(output / first["image"])
    assert first["fingerprint"] == fingerprint(image.get_fdata(dtype=np.float32), image.header.get_zooms())
    assert [item["subject_id"] for item in items] == sorted(item["subject_id"] for item in items)


def test_ixi_quirks_are_named(prepared, capsys):
    status, output, _ = prepared("ixi")
    datalist = load_datalist(output)
    people = {item["subject_id"]: item for item in datalist.items}
    assert sorted(people) == ["IXI002", "IXI012", "IXI013", "IXI014"]
    assert people["IXI002"]["sex"] == "F" and people["IXI002"]["site"] == "Guys" and people["IXI012"]["sex"] == "M"
    assert people["IXI013"]["age"] == 46.71 and people["IXI014"]["age"] is None
    reasons = {(row["subject"], row["reason"]) for row in findings(output)}
    assert ("IXI012", "id is in 2 rows") in reasons
    assert ("IXI099", "row without a T1 scan") in reasons
    assert ("IXI040", "scan without a row in IXI.xls") in reasons
    assert any(subject == "IXI035" and "unknown sex code '3'" in reason for subject, reason in reasons)
    assert {row["subject_id"] for row in datalist.excluded} == {"IXI035", "IXI040", "IXI099"}
    assert status == 1


def test_brats_time_points_share_a_patient(prepared):
    status, output, _ = prepared("brats")
    items = load_datalist(output).content["training"]
    assert len(items) == 5 and len({item["patient_id"] for item in items}) == 4
    both = [item for item in items if item["patient_id"] == "BraTS-GLI-00005"]
    assert [item["session"] for item in both] == ["100", "101"] and len({item["fold"] for item in both}) == 1
    rows = {row["subject"]: row["reason"] for row in findings(output)}
    assert rows["BraTS-PED-00099-000"] == "has no t1n (only t2w)"
    assert rows["BraTS-PED-00100-000"] == "has no t1n (its folder is empty)"
    assert status == 1


def test_harp_quirks_are_found_by_where_the_labels_lie(prepared):
    status, output, _ = prepared("harp")
    datalist = load_datalist(output)
    names = [item["subject_id"] for item in datalist.items]
    assert names == [name for _, name, quirk in tiny.HARP if not quirk.keys() & {"shift", "sides"}]
    for item in datalist.items:
        label = nib.load(item["label"])
        voxels = np.asarray(label.dataobj)
        assert set(np.unique(voxels)) == {0, 1, 2}
        centres = [nib.affines.apply_affine(label.affine, np.argwhere(voxels == side).mean(0))[0] for side in (1, 2)]
        assert centres[0] < 0 < centres[1]
        shape, affine = tiny.grid("RAS")
        for side, value in ((-1, 1), (1, 2)):
            assert (voxels == value).sum() == pytest.approx(tiny.harp_label(shape, affine, side).sum(), rel=0.02)
    rows = findings(output)
    text = {row["subject"]: " | ".join(r["reason"] for r in rows if r["subject"] == row["subject"]) for row in rows}
    assert "swapped" in text["ADNI_007_S_1304_74384"] and "known of this scan" in text["ADNI_007_S_1304_74384"]
    assert "values 7000 and 7001 taken as 0 and 1" in text["ADNI_011_S_0003_90001"]
    assert "centroids say otherwise" in text["ADNI_016_S_4121_280306"]
    assert "NOT among the known ones" in text["ADNI_023_S_0030_11111"]
    assert "do not share one grid: up to 3.0 mm" in text["ADNI_067_S_0077_22222"]
    assert "has no right label file" in text["ADNI_098_S_0269_33333"]
    assert "label without image" in text["ADNI_999_S_9999_1"]
    assert status == 1


def test_dicom_series_are_chosen_by_name_and_reason(prepared):
    status, output, _ = prepared("dicom")
    items = load_datalist(output).content["training"]
    assert [(item["subject_id"], item["session"]) for item in items] == [
        ("sub-ADNI002S0295", "ses-20060418"),
        ("sub-ADNI002S0295", "ses-20070420"),
        ("sub-ADNI011S0003", "ses-20060418"),
    ]
    assert items[0]["patient_id"] == "002_S_0295" and items[0]["sex"] == "F" and items[0]["age"] == 75
    assert items[0]["source"].endswith("S13408")
    reasons = " | ".join(row["reason"] for row in findings(output))
    assert "series '3 Plane Localizer' skipped: localiser" in reasons
    assert "series 'MPRAGE MPR' skipped: derived (ImageType DERIVED/SECONDARY/MPR)" in reasons
    assert "series 'Axial PD-T2 TSE' skipped: another contrast" in reasons
    assert "series 'Field Map' skipped: another contrast" in reasons
    assert "series 'MPRAGE Repeat' skipped: of this session's T1s, 'MPRAGE' is used" in reasons
    assert any(row["subject"] == "023_S_0030" and row["kind"] == "problem" for row in findings(output))
    assert status == 1


def test_folder_layout_with_labels_and_a_table(tmp_path):
    root = tmp_path / "my scans"
    for i, name in enumerate(["anna", "bert_ses-2", "carl"]):
        tiny.save_head(root / "images" / f"{name}.nii.gz", "LAS", seed=i, dtype=np.float32)
        shape, affine = tiny.grid("LAS")
        if name != "carl":
            label = tiny.harp_label(shape, affine, -1) + 2 * tiny.harp_label(shape, affine, 1)
            tiny.save(root / "labels" / f"{name}.nii.gz", label, affine, np.uint8)
    tiny.save(root / "labels" / "dora.nii.gz", label, affine, np.uint8)
    table = "subject_id,sex,age,group\nanna,f,33,CN\nbert,male,90+,NL\ncarl,x,abc,AD\nemil,m,40,CN\n"
    (root / "participants.csv").write_text(table)
    status = prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS)
    datalist = load_datalist(tmp_path / "out")
    assert datalist.name == "my-scans" and status == 1
    rows = [(i["subject_id"], i["session"], i["sex"], i["age"], i["diagnosis"], "label" in i) for i in datalist.items]
    assert rows == [
        ("anna", None, "F", 33.0, "CN", True),
        ("bert", "ses-2", "M", 90.0, "CN", True),
        ("carl", None, None, None, "AD", False),
    ]
    reasons = {(row["subject"], row["reason"]) for row in findings(tmp_path / "out")}
    assert ("carl", "unknown sex code 'x'") in reasons and ("carl", "age 'abc' is not a number") in reasons
    assert ("dora", "label without image") in reasons and ("carl", "image without label") in reasons
    assert ("emil", "has a row but no volume") in reasons


def test_a_corrected_label_map_makes_another_data_set(tmp_path):
    root, output = tmp_path / "source", tmp_path / "out"
    tiny.save_head(root / "images" / "anna.nii.gz", "RAS")
    shape, affine = tiny.grid("RAS")
    label = tiny.harp_label(shape, affine, -1) + 2 * tiny.harp_label(shape, affine, 1)

    def prepared_hash() -> str:
        assert prepare("folder", str(root), str(output), **OPTIONS) == 0
        return load_datalist(output).hash

    def save(label: np.ndarray) -> None:
        tiny.save(root / "labels" / "anna.nii.gz", label, affine, np.uint8)

    save(label)
    first = prepared_hash()
    (item,) = load_datalist(output).items
    assert item["label_sha256"] == sha256_file(item["label"])
    # Another label map of the same size that nobody prepared.
    check_volumes(load_datalist(output), deep=True)
    content = bytearray(Path(item["label"]).read_bytes())
    content[-1] ^= 1
    Path(item["label"]).write_bytes(content)
    with pytest.raises(
        InputError, match=r"1 files of 1 items(.|\n)*labels/anna.nii +its content is not what was prepared"
    ):
        check_volumes(load_datalist(output), deep=True)
    # Corrected where it came from, and prepared again.
    label[tuple(np.argwhere(label == 1)[0])] = 0
    save(label)
    assert prepared_hash() != first
    check_volumes(load_datalist(output), deep=True)
    # A data set that was prepared without this hash stays as it is.
    record = output / ".prepare" / "records" / "anna.json"
    write_json(record, {key: value for key, value in read_json(record).items() if key != "label_sha256"})
    older = prepared_hash()
    assert "label_sha256" not in load_datalist(output).items[0] and older == prepared_hash()
    check_volumes(load_datalist(output), deep=True)


def test_diagnoses_that_are_taken_as_they_are_spelled_are_said(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=3, labels=False)
    table = root / "participants.tsv"
    ids = [line.split("\t")[0] for line in table.read_text().splitlines()[1:]]
    words = ["AD?", "-", "healthy"]
    for tsv in root.rglob("*_sessions.tsv"):
        tsv.unlink()
    rows = [f"{who}\t{word}" for who, word in zip(ids, words, strict=True)]
    table.write_text("\n".join(["participant_id\tdiagnosis", *rows]) + "\n")
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS) == 0
    assert {item["diagnosis"] for item in load_datalist(tmp_path / "out").items} == {"AD?", None, "CN"}
    (row,) = [row for row in findings(tmp_path / "out") if "spelled" in row["reason"]]
    assert row["kind"] == "quirk" and row["reason"].endswith("as they are spelled: 'AD?'")


def test_patients_of_another_datalist_are_left_out_in_any_form(prepared, tmp_path):
    _, harp, _ = prepared("harp")
    root = tiny.make_bids(tmp_path / "source", subjects=4, labels=False)
    # HarP has 002_S_0295 as ADNI_002_S_0295_13722; here it is sub-ADNI002S0295.
    status = prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS, exclude_patients_of=[harp])
    datalist = load_datalist(tmp_path / "out")
    assert status == 0 and "002_S_0295" not in datalist.patients and len(datalist) == 3
    reason = "the patient is in harp (--exclude-patients-of)"
    assert [(row["subject_id"], row["reason"]) for row in datalist.excluded] == [("sub-ADNI002S0295", reason)]
    assert not (tmp_path / "out/images/sub-ADNI002S0295_ses-M000.nii").exists()
    assert main(["check", str(harp), str(tmp_path / "out"), "--deep"]) == 0
    with (tmp_path / "out" / datalist.content["training"][0]["image"]).open("r+b") as stream:
        stream.seek(400)
        stream.write(b"\x00\x00\x40\x3f" * 10)
    assert main(["check", str(harp), str(tmp_path / "out"), "--volumes"]) == 0
    assert main(["check", str(harp), str(tmp_path / "out"), "--deep"]) == 2


def test_numbers_of_a_public_cohort_are_left_out_by_the_name_that_it_is_given(tmp_path):
    for name in ("123", "124"):
        tiny.save_head(tmp_path / f"source/{name}.nii.gz", seed=int(name))
    item = {"image": "i.nii", "subject_id": "x", "patient_id": "AIBL123", "cohort": "aibl", "fold": 0}
    write_json(tmp_path / "held/datalist.json", make_content("aibl", (1, 1, 1), (28, 30, 32), 0, 5, [item], []))
    options = {**OPTIONS, "name": "aibl", "exclude_patients_of": [tmp_path / "held"]}
    assert prepare("folder", tmp_path / "source", tmp_path / "out", **options) == 0
    assert load_datalist(tmp_path / "out").patients == {"124"}


def test_sessions_baseline_all_and_named(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=2, labels=False, sessions=("ses-M000", "ses-M006", "ses-M012"))
    counts = {}
    for sessions in ("baseline", "all", "ses-M006,ses-M012"):
        output = tmp_path / sessions
        prepare("bids", str(root), str(output), **OPTIONS, sessions=sessions.split(","))
        datalist = load_datalist(output)
        counts[sessions] = [item["session"] for item in datalist.items if item["patient_id"] == "002_S_0295"]
        assert len({(item["patient_id"], item["fold"]) for item in datalist.items}) == 2
    assert counts == {
        "baseline": ["ses-M000"],
        "all": ["ses-M000", "ses-M006", "ses-M012"],
        "ses-M006,ses-M012": ["ses-M006", "ses-M012"],
    }


def test_diagnoses_and_required_labels(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=4)
    next(root.glob("derivatives/hippocampus/*S0295/**/*_dseg.nii.gz")).unlink()
    status = prepare("bids", str(root), str(tmp_path / "a"), **OPTIONS, diagnoses=["CN"], labels="require")
    datalist = load_datalist(tmp_path / "a")
    assert [(item["subject_id"], item["diagnosis"]) for item in datalist.items] == [("sub-ADNI002S0296", "CN")]
    assert status == 1
    assert prepare("bids", str(root), str(tmp_path / "b"), **OPTIONS, labels="none", diagnoses=["CN", "ADD"]) == 1
    assert not any("label" in item for item in load_datalist(tmp_path / "b").items)
    assert "nobody has the diagnosis ADD" in {row["reason"] for row in findings(tmp_path / "b")}


def test_small_types_read_back_as_zero_to_one(tmp_path):
    """With the error that the datalist states, by whatever reads them; half of a step by arithmetic."""
    root = tiny.make_bids(tmp_path / "source", subjects=1, labels=False)
    items = {}
    for name in ("float32", "uint16", "uint8"):
        prepare("bids", str(root), str(tmp_path / name), **OPTIONS, dtype=name)
        datalist = load_datalist(tmp_path / name)
        check_volumes(datalist, deep=True)
        items[name] = datalist.items[0]
        check_contents(items[name])
    full = nib.load(items["float32"]["image"]).get_fdata()
    assert items["float32"]["dtype"] == "float32" and items["float32"]["max_error"] == 0
    for name, bound in (("uint16", 1 / 131070), ("uint8", 1 / 510)):
        item = items[name]
        assert nib.load(item["image"]).get_data_dtype() == np.dtype(name) == np.dtype(item["dtype"])
        assert item["max_error"] == bound
        ours = LoadScand("image", OPTIONS["spacing"], OPTIONS["shape"])(item)["image"][0].numpy()
        monai = LoadImage(reader="NibabelReader", image_only=True)(item["image"]).numpy()
        for read in (ours, monai, nib.load(item["image"]).get_fdata()):
            assert read.min() >= 0 and read.max() <= 1 + 1e-6
            # The scale factor is a float32, which has its own error.
            assert bound / 2 < np.abs(read - full).max() <= bound + 2**-23


def test_strict_leaves_marked_volumes_out(tmp_path):
    root = tmp_path / "source"
    for i in range(3):
        tiny.save_head(root / f"ok{i}.nii.gz", seed=i)
    tiny.save_head(root / "tilted.nii.gz", turn=tiny.rotation(0, 0, 30), seed=9)
    assert prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS) == 0
    assert len(load_datalist(tmp_path / "out")) == 4
    assert prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS, strict=True) == 0
    datalist = load_datalist(tmp_path / "out")
    assert len(datalist) == 3 and "oblique by 30 degrees" in datalist.excluded[0]["reason"]
    assert datalist.excluded[0]["kind"] == "choice"


def test_same_voxels_under_two_ids_are_reported(tmp_path):
    root = tmp_path / "source"
    tiny.save_head(root / "anna.nii.gz", "LPS")
    image = nib.load(root / "anna.nii.gz")
    turned = nib.as_closest_canonical(image)
    nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine).to_filename(root / "otto.nii")
    assert prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS) == 1
    row = next(row for row in findings(tmp_path / "out") if row["kind"] == "problem")
    assert row["subject"] == "otto" and row["reason"] == "the same voxels as anna (anna.nii.gz)"


@pytest.mark.parametrize("lost", ["no T1w", "damaged"])
def test_the_books_balance_where_nothing_is_left(tmp_path, capsys, lost):
    root = tiny.make_bids(tmp_path / "source", subjects=2, labels=False)
    for scan in root.rglob("*_T1w.nii*"):
        scan.unlink() if lost == "no T1w" else scan.write_bytes(b"")
    with pytest.raises(InputError, match=r"no scan is left|no volume could be prepared"):
        prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    assert (
        "people: 2 found = 0 prepared + 0 left out by your options + 2 left out by problems" in capsys.readouterr().out
    )
    named = {row["subject"] for row in findings(tmp_path / "out") if row["kind"] == "problem"}
    assert len(named & {path.name for path in root.glob("sub-*")}) == 2


def test_missing_orientation_can_be_given(tmp_path):
    shape, affine = tiny.grid("LPS")
    voxels = tiny.head(shape, affine)
    image = nib.Nifti1Image(voxels.astype(np.int16), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    (tmp_path / "source").mkdir()
    image.to_filename(tmp_path / "source/a.nii.gz")
    with pytest.raises(InputError, match="no volume could be prepared"):
        prepare("folder", str(tmp_path / "source"), str(tmp_path / "out"), **OPTIONS)
    prepare("folder", str(tmp_path / "source"), str(tmp_path / "lps"), **OPTIONS, assume_orientation="LPS")
    centre = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    found = tiny.find_landmark(load_datalist(tmp_path / "lps").items[0]["image"])
    assert np.linalg.norm(found + centre - tiny.LANDMARK) < 0.5


def test_the_guides_way_from_raw_data_to_a_pretraining_set(prepared, tmp_path, capsys):
    _, harp, _ = prepared("harp")
    _, brats, _ = prepared("brats")
    root = tiny.make_bids(tmp_path / "ADNI", subjects=5, labels=False)
    words = ["--shape", "28,30,32", "--workers", "1", "--exclude-patients-of", str(harp)]
    adni = tmp_path / "adni"
    assert main(["prepare", "--layout", "bids", "--source", str(root), "--output", str(adni), *words]) == 0
    merged = tmp_path / "pretrain"
    assert main(["merge", str(adni), str(brats), "--output", str(merged), "--name", "pretrain"]) == 0
    assert main(["check", str(merged), str(harp), "--deep"]) == 0
    assert main(["check", str(merged), str(adni)]) == 1
    datalist = load_datalist(merged)
    assert datalist.name == "pretrain" and {item["cohort"] for item in datalist.items} == {"adni", "brats"}
    assert "002_S_0295" not in datalist.patients and len(datalist) == 9
