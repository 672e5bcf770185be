# SPDX-License-Identifier: Apache-2.0
import re
import shutil

import numpy as np
import pydicom
import pytest
import tiny_datasets as tiny

from volta_components.data.layouts.common import LayoutOptions
from volta_components.data.layouts.dicom import read, subject_of, why_not_t1
from volta_components.data.layouts.series import convert_series
from volta_components.data.volumes import read_volume

SHAPE, AFFINE = tiny.grid("RAS", (1.0, 1.0, 1.0), (20, 22, 24))
HEAD = tiny.head(SHAPE, AFFINE)


def write(folder, description="MPRAGE", **options):
    return tiny.write_series(folder, options.pop("voxels", HEAD), options.pop("affine", AFFINE), description, **options)


def listed(root, **options):
    return read(LayoutOptions(root, **options))


def found(listing, kind="problem"):
    return [(f.subject, f.file, f.reason) for f in listing.findings if f.kind == kind]


# --- one volume ------------------------------------------------------------------------------------------------------


def test_a_series_in_two_folders_is_one_volume(tmp_path):
    write(tmp_path / "ds/P1/DIR000", patient="P1")
    files = sorted((tmp_path / "ds/P1/DIR000").iterdir())
    (tmp_path / "ds/P1/DIR001").mkdir()
    for path in files[15:]:
        path.rename(tmp_path / "ds/P1/DIR001" / path.name)
    listing = listed(tmp_path / "ds")
    assert len(listing.scans) == 1 and len(listing.scans[0].series) == 24
    ((who, _, reason),) = found(listing, "quirk")
    assert who == "P1" and "2 folders, taken together: P1/DIR000 and P1/DIR001" in reason and not found(listing)
    (tmp_path / "out").mkdir()
    volume = read_volume(convert_series(listing.scans[0].series, tmp_path / "out")[0])
    assert sorted(volume.voxels.shape) == sorted(SHAPE)
    # The brightest voxel is the landmark, wherever its slice lay.
    peak = np.unravel_index(np.argmax(volume.voxels), volume.voxels.shape)
    assert np.linalg.norm(volume.affine[:3] @ [*peak, 1] - tiny.LANDMARK) < 1.5


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        (set(range(24)) - {8, 9, 10}, "about 3 slices missing: 4.00 mm between two of 21 slices, 1.00 mm as a rule"),
        (set(range(24)) - {3}, "about 1 slices missing"),
        (set(range(0, 24, 2)), "only every 2. slice is there: 2.00 mm apart, 1.00 mm thick"),
    ],
)
def test_missing_slices_are_named_with_their_folder(tmp_path, slices, reason):
    write(tmp_path / "P2/MPRAGE", patient="P2", slices=slices)
    listing = listed(tmp_path)
    assert listing.scans == []
    ((who, file, why),) = found(listing)
    assert (who, file) == ("P2", "P2/MPRAGE") and reason in why


@pytest.mark.parametrize(
    ("name", "value"), [("ImagePositionPatient", None), ("PixelSpacing", None), ("PixelSpacing", [0, 0])]
)
def test_a_series_of_no_known_place_or_size_is_named(tmp_path, name, value):
    """The converter would make up both."""
    write(tmp_path / "P1/A", patient="P1")
    for path in (tmp_path / "P1/A").iterdir():
        data = pydicom.dcmread(path)
        setattr(data, name, value)
        data.save_as(path)
    listing = listed(tmp_path)
    assert listing.scans == []
    assert [(who, file) for who, file, reason in found(listing) if name in reason] == [("P1", "P1/A")]


def test_a_slice_that_is_missing_at_the_end_is_none_the_worse(tmp_path):
    write(tmp_path / "P3/MPRAGE", patient="P3", slices=set(range(23)))
    assert len(listed(tmp_path).scans[0].series) == 23


def test_uneven_slices_are_no_volume(tmp_path):
    uid = write(tmp_path / "P1", patient="P1", slices=set(range(16)))
    moved = AFFINE.copy()
    moved[2, 3] += 0.4
    write(tmp_path / "P1", patient="P1", slices=set(range(16, 24)), affine=moved, uid=uid, number=2)
    assert "uneven distances of slices" in found(listed(tmp_path))[0][2]


def test_copies_of_an_image_are_used_once_and_others_at_its_place_are_a_problem(tmp_path):
    uid = write(tmp_path / "a/P1/one", patient="P1")
    shutil.copytree(tmp_path / "a/P1/one", tmp_path / "a/P1/copy")
    listing = listed(tmp_path / "a")
    assert len(listing.scans[0].series) == 24 and "24 doubled instances" in found(listing, "quirk")[0][2]
    write(tmp_path / "b/P1/one", patient="P1", uid=uid)
    write(tmp_path / "b/P1/again", patient="P1", uid=uid)
    listing = listed(tmp_path / "b")
    ((_, file, reason),) = found(listing)
    assert listing.scans == [] and file == "P1/again and P1/one"
    assert "24 slices lie where others do (doubled instances)" in reason


@pytest.mark.parametrize("patient", ["", "Anonymous"])
def test_people_who_share_all_their_uids_stay_apart(tmp_path, patient):
    """Some anonymisers give the same UIDs to everybody."""
    for i, folder in enumerate(("anna", "bert")):
        voxels = tiny.head(SHAPE, AFFINE, seed=i)
        write(
            tmp_path / folder, patient="x", uid="1.2.3", voxels=voxels, PatientID=patient or None, PatientName=patient
        )
        for k, path in enumerate(sorted((tmp_path / folder).iterdir())):
            data = pydicom.dcmread(path)
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.4.{k}"
            data.save_as(path)
    listing = listed(tmp_path)
    assert {(scan.patient_id, len(scan.series)) for scan in listing.scans} == {("anna", 24), ("bert", 24)}
    assert {who for who, _, _ in found(listing)} == {"anna", "bert"}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"PixelSpacing": ["0.8", "0.8"]}, "its slices have pixels of 2 kinds"),
        ({"Rows": 0}, "no pixels: 0 rows"),
    ],
)
def test_a_slice_of_other_pixels_is_named(tmp_path, facts, reason):
    write(tmp_path / "P1/A", patient="P1")
    path = sorted((tmp_path / "P1/A").iterdir())[12]
    data = pydicom.dcmread(path)
    for name, value in facts.items():
        setattr(data, name, value)
    data.save_as(path)
    listing = listed(tmp_path)
    assert not listing.scans and any(reason in text for _, _, text in found(listing))


def test_damaged_and_absent_files_are_named(tmp_path):
    write(tmp_path / "P1", patient="P1")
    files = sorted((tmp_path / "P1").iterdir())
    files[3].write_bytes(files[3].read_bytes()[:900])
    files[20].unlink()
    files[20].symlink_to("../.git/annex/objects/K/K")
    reasons = " | ".join(reason for _, _, reason in found(listed(tmp_path)))
    assert "1 of 24 DICOM files are damaged (truncated: " in reasons
    assert "1 of 24 DICOM files have no content" in reasons and "about 2 slices missing" in reasons


def test_an_image_of_many_frames_is_a_volume(tmp_path):
    tiny.write_enhanced(tmp_path / "ds/P1/scan.dcm", HEAD, AFFINE, patient="P1")
    listing = listed(tmp_path / "ds")
    assert [scan.patient_id for scan in listing.scans] == ["P1"] and not found(listing)
    (tmp_path / "out").mkdir()
    volume = read_volume(convert_series(listing.scans[0].series, tmp_path / "out")[0])
    peak = np.unravel_index(np.argmax(volume.voxels), volume.voxels.shape)
    assert np.linalg.norm(volume.affine[:3] @ [*peak, 1] - tiny.LANDMARK) < 1.5
    tiny.write_enhanced(tmp_path / "gap/P1/scan.dcm", HEAD, AFFINE, patient="P1", slices=set(range(24)) - {8, 9})
    assert "about 2 slices missing" in found(listed(tmp_path / "gap"))[0][2]


# --- which series ----------------------------------------------------------------------------------------------------

THICK = {"MRAcquisitionType": "2D", "SliceThickness": "6", "ScanningSequence": "SE", "InversionTime": None}


@pytest.mark.parametrize(
    ("description", "facts", "slices"),
    [
        ("T1_SE_AX", THICK, None),
        ("T1_localizer", {}, {10, 11, 12}),
        ("AAHead_Scout T1", {}, None),
        ("MPRAGE Repeat", {}, None),
        ("MPRAGE +C", {}, None),
        ("MPRAGE post Gd", {}, None),
        ("MPRAGE", {"ContrastBolusAgent": "Gadovist"}, None),
        ("MPRAGE", {}, set(range(24)) - {8}),
    ],
)
def test_a_whole_native_thin_3d_t1_is_preferred_whatever_comes_first(tmp_path, description, facts, slices):
    write(tmp_path / "P1/A", description, patient="P1", number=1, slices=slices, **facts)
    wanted = write(tmp_path / "P1/B", "MPRAGE", patient="P1", number=7)
    listing = listed(tmp_path)
    assert [scan.source for scan in listing.scans] == ["P1/B"] and not found(listing)
    ((who, file, reason),) = found(listing, "skipped")
    assert (who, file) == ("P1", "P1/A") and "skipped" in reason and wanted


def test_a_thick_t1_is_taken_where_there_is_no_other_and_named(tmp_path):
    step = AFFINE @ np.diag([1, 1, 2, 1])
    write(tmp_path / "P1/A", "T1_SE_AX", patient="P1", voxels=HEAD[:, :, ::2], affine=step, **THICK)
    listing = listed(tmp_path)
    assert len(listing.scans) == 1 and "no 3-D scan: 12 slices 2.0 mm apart" in found(listing, "quirk")[0][2]


def test_two_t1s_of_equal_rank_and_different_kind_are_a_problem(tmp_path):
    write(tmp_path / "P1/A", "MPRAGE SAG", patient="P1", number=3)
    write(tmp_path / "P1/B", "T1 TFE", patient="P1", number=5)
    listing = listed(tmp_path)
    assert [scan.source for scan in listing.scans] == ["P1/A"]
    assert "series 'T1 TFE' skipped" in found(listing)[0][2]


def test_folders_without_dicom_files_are_people_too(tmp_path):
    write(tmp_path / "P1/A", patient="P1")
    (tmp_path / "P2/A").mkdir(parents=True)
    (tmp_path / "P2/A/IM1.dcm.gz").write_bytes(b"packed")
    (tmp_path / "P3").mkdir()
    listing = listed(tmp_path)
    reasons = {who: reason for who, _, reason in found(listing)}
    assert reasons == {"P2": "has no DICOM file, only IM1.dcm.gz and the like", "P3": "has no DICOM file in it"}


def test_whoever_has_no_t1_is_a_problem(tmp_path):
    write(tmp_path / "P1/A", patient="P1")
    write(tmp_path / "P2/A", "Sag Anatomy", patient="P2", ScanningSequence="SE", InversionTime=None)
    write(tmp_path / "P3/A", "Axial T2", patient="P3")
    tiny.save_head(tmp_path / "P4/scan_T1w.nii.gz")
    listing = listed(tmp_path)
    reasons = {who: reason for who, _, reason in found(listing)}
    assert set(reasons) == {"P2", "P3", "scan_T1w"} or set(reasons) == {"P2", "P3", "P4"}
    assert "has no T1 series ('Sag Anatomy': not known as a T1" in reasons["P2"] and "another contrast" in reasons["P3"]


@pytest.mark.parametrize(
    "text", ["3 Plane Localizer", "localiser", "LOC", "T1_loc_sag", "AAHScout", "Survey", "3PL", "T1 SCOUT 3D"]
)
def test_localisers_are_none_whatever_else_their_name_says(text):
    assert why_not_t1({"SeriesDescription": text}) == "localiser"


@pytest.mark.parametrize(
    "text", ["MPRAGE local_shim", "t1_mprage_sag_p2_iso", "IR-FSPGR", "Sag 3D T1 BRAVO", "velocity t1"]
)
def test_t1s_are_no_localisers(text):
    assert why_not_t1({"SeriesDescription": text}) is None


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ("t1_mp2rage_sag_p3_UNI_Images", ["DERIVED", "PRIMARY", "M", "ND", "UNI"], None),
        ("t1_mp2rage_sag_p3_UNI-DEN", ["DERIVED", "PRIMARY", "M"], None),
        ("t1_mp2rage_sag_p3_INV1", ["ORIGINAL", "PRIMARY", "M", "ND"], "one of MP2RAGE's inversions, no T1"),
        ("t1_mp2rage_sag_p3_INV2", ["ORIGINAL", "PRIMARY", "M", "ND"], "one of MP2RAGE's inversions, no T1"),
        ("t1_mp2rage_T1_Images", ["DERIVED", "T1 MAP"], "derived (ImageType DERIVED/T1 MAP)"),
    ],
)
def test_of_mp2rage_the_uniform_image_is_the_t1(text, kinds, reason):
    assert why_not_t1({"SeriesDescription": text, "ImageType": kinds}) == reason


# --- who -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Anonymous", "ANON^", "0000", "unknown", "Patient"])
def test_a_patient_id_that_says_nothing_is_not_guessed_silently(tmp_path, name):
    for folder, date in (("anna", "20060101"), ("bert", "20070101")):
        write(tmp_path / folder / "A", patient=folder, date=date, PatientID=name or None, PatientName=name)
    listing = listed(tmp_path)
    assert {scan.patient_id for scan in listing.scans} == {"anna", "bert"}
    assert {who for who, _, _ in found(listing)} == {"anna", "bert"}
    assert not found(listed(tmp_path, patients="folder"))


def test_patients_of_other_letters_and_numbers_have_names_of_their_own(tmp_path):
    patients = ["\u5f20\u4e09", "\u738b\u4e94", "1.12", "11.2"]
    for place, patient in enumerate(patients):
        write(tmp_path / f"f{place}" / "A", patient=patient, SpecificCharacterSet="ISO_IR 192")
    listing = listed(tmp_path)
    names = {scan.patient_id: scan.subject_id for scan in listing.scans}
    assert names.keys() == set(patients) and len(set(names.values())) == 4
    assert (names["1.12"], names["11.2"]) == ("sub-1x12", "sub-11x2")
    assert all(re.fullmatch("sub-[A-Za-z0-9]+", name) for name in names.values())
    # Nobody's name depends on who else is there.
    shutil.rmtree(tmp_path / "f1")
    assert all(names[scan.patient_id] == scan.subject_id for scan in listed(tmp_path).scans)


@pytest.mark.parametrize(
    ("patient", "name"),
    [
        ("P_01", "sub-P01"),
        ("2019-0045", "sub-2019x0045"),
        ("002_S_0295", "sub-ADNI002S0295"),
        ("OAS1_0001", "sub-OAS10001"),
    ],
)
def test_patients_are_named_as_bids_has_it(patient, name):
    assert subject_of(patient) == name


def test_a_patient_id_of_two_people_is_not_one_person(tmp_path):
    for folder, birth, date in (("anna", "19400101", "20060101"), ("bert", "19500202", "20070101")):
        write(tmp_path / folder / "A", patient="7", date=date, PatientBirthDate=birth)
    listing = listed(tmp_path)
    assert len({scan.patient_id for scan in listing.scans}) == 2
    assert all("PatientID '7' has 2 birth dates" in reason for _, _, reason in found(listing))
    assert {scan.patient_id for scan in listed(tmp_path, patients="folder").scans} == {"anna", "bert"}
    assert {scan.patient_id for scan in listed(tmp_path, patients="id", sessions=("all",)).scans} == {"7"}


@pytest.mark.parametrize(("folders", "people"), [(("siteA", "siteB"), 2), (("visit1", "visit2"), 1)])
def test_one_id_in_folders_of_different_studies_is_named(tmp_path, folders, people):
    for folder, date in zip(folders, ("20060101", "20070101"), strict=True):
        write(tmp_path / folder / "A", patient="P1", date=date)
    listing = listed(tmp_path, sessions=("all",))
    assert len({scan.patient_id for scan in listing.scans}) == people
    assert found(listing) and all("PatientID 'P1' is in several folders" in reason for _, _, reason in found(listing))


def test_one_person_over_folders_is_one_where_something_confirms_it(tmp_path):
    for folder, date in (("visit1", "20060101"), ("visit2", "20070101")):
        write(tmp_path / folder / "A", patient="P1", date=date, PatientBirthDate="19400101")
    listing = listed(tmp_path)
    assert len(listing.scans) == 1 and not found(listing)
    assert (listing.scans[0].session, listing.scans[0].date) == ("ses-20060101", "2006-01-01")


def test_studies_without_a_date_are_not_put_in_order(tmp_path):
    nothing = dict.fromkeys(("StudyDate", "SeriesDate", "AcquisitionDate"))
    for folder, study in (("A", "1.2.3"), ("B", "1.2.4")):
        write(tmp_path / "P1" / folder, patient="P1", StudyInstanceUID=study, **nothing)
    listing = listed(tmp_path)
    assert len(listing.scans) == 1 and "is the first is not known" in found(listing)[0][2]


def test_series_of_one_slice_each_are_named_once(tmp_path):
    for i in range(24):
        write(tmp_path / f"P1/{i}", patient="P1", slices={i})
    ((who, _, reason),) = found(listed(tmp_path))
    assert who == "P1" and "24 series of one slice each" in reason and reason.count("SeriesInstanceUID") == 1


@pytest.mark.parametrize(
    ("written", "sex"), [("F", "F"), ("male", "M"), ("FEMALE", "F"), ("f", "F"), (None, None), ("O", None)]
)
def test_the_sex_is_read_in_any_spelling_or_named(tmp_path, written, sex):
    write(tmp_path / "P1/MPRAGE", patient="P1", PatientSex=written)
    listing = listed(tmp_path)
    assert [scan.sex for scan in listing.scans] == [sex] and not found(listing)
    quirks = [reason for _, _, reason in found(listing, "quirk") if "PatientSex" in reason]
    assert quirks == (["unknown sex code 'O' (PatientSex); left empty"] if written == "O" else [])


def test_sexes_of_one_person_are_compared_in_any_spelling(tmp_path):
    write(tmp_path / "A/MPRAGE", patient="7", PatientSex="male")
    write(tmp_path / "B/MPRAGE", patient="7", PatientSex="FEMALE", date="20070418")
    assert any("2 sexes" in reason for _, _, reason in found(listed(tmp_path)))


@pytest.mark.parametrize(("sex", "age"), [("F", 76.5), ("M", 75), ("F", 70)])
def test_a_header_that_contradicts_the_table_is_a_problem(tmp_path, sex, age):
    """The header says F, 75 years."""
    write(tmp_path / "ds/P1/MPRAGE", patient="P1")
    (tmp_path / "t.csv").write_text(f"id,sex,age\nP1,{sex},{age}\n")
    listing = listed(tmp_path / "ds", table=tmp_path / "t.csv")
    assert [(scan.sex, scan.age) for scan in listing.scans] == [(sex, age)]
    reasons = ["sex M by the table, F by the header (PatientSex)"] * (sex == "M")
    reasons += ["age 70.0 by the table, 75.0 by the header (PatientAge)"] * (age == 70)
    assert found(listing) == [("P1", "P1/MPRAGE", reason) for reason in reasons]


@pytest.mark.parametrize("is_adnimerge", [False, True])
def test_whoever_has_a_row_and_no_scan_is_named_or_of_adnimerge_counted(tmp_path, is_adnimerge):
    write(tmp_path / "ds/A/MPRAGE", patient="002_S_0001")
    more = (",RID,COLPROT,VISCODE", ",1,ADNI1,bl") if is_adnimerge else ("", "")
    rows = [f"002_S_000{i},F{more[1]}" for i in range(1, 4)]
    (tmp_path / "t.csv").write_text("\n".join([f"PTID,sex{more[0]}", *rows]))
    listing = listed(tmp_path / "ds", table=tmp_path / "t.csv")
    problems = [] if is_adnimerge else ["002_S_0002", "002_S_0003"]
    assert [(who, why) for who, _, why in found(listing)] == [(who, "has a row but no DICOM files") for who in problems]
    assert set(listing.people) == {"002_S_0001", *problems}
    counted = [why for _, _, why in found(listing, "quirk") if "people have rows" in why]
    assert counted == ["2 people have rows but no DICOM files: 002_S_0002, 002_S_0003"] * is_adnimerge
