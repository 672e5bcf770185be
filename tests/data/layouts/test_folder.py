# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import tiny_datasets as tiny
from prepare_helpers import OPTIONS, findings

from volta_components.data.datalist import load_datalist
from volta_components.data.layouts.common import LayoutOptions
from volta_components.data.layouts.folder import read
from volta_components.data.prepare import prepare
from volta_components.errors import InputError


def listed(root, *files, table=None, **options):
    """The listing of a folder of empty files: readers look at names and tables only."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if table:
        (root / "participants.csv").write_text(table)
    return read(LayoutOptions(root, **options))


def scans(listing):
    return sorted((scan.patient_id, scan.session, scan.source) for scan in listing.scans)


def found(listing, kind="problem"):
    return {(f.subject, f.reason) for f in listing.findings if f.kind == kind}


def test_runs_of_bids_names_in_a_flat_folder_are_one_patient(tmp_path):
    names = [f"sub-0{i}_run-{run}_T1w.nii.gz" for i in (1, 2) for run in (1, 2)]
    listing = listed(tmp_path, *names, table="participant_id,sex\nsub-01,F\nsub-02,M\n", sessions=("all",))
    assert scans(listing) == [("sub-01", None, names[0]), ("sub-02", None, names[2])]
    assert [(scan.subject_id, scan.sex) for scan in listing.scans] == [("sub-01", "F"), ("sub-02", "M")]
    assert {who for who, _ in found(listing, "quirk")} == {"sub-01", "sub-02"} and not found(listing)


def test_sessions_of_bids_names_are_one_patient(tmp_path):
    listing = listed(tmp_path, "sub-1_ses-9_T1w.nii", "sub-1_ses-10_T1w.nii", "sub-1_ses-9_T2w.nii")
    assert scans(listing) == [("sub-1", "ses-9", "sub-1_ses-9_T1w.nii")] and not found(listing)


def test_archives_with_dates_in_folders_give_the_first_visit(tmp_path):
    """The digits in these file names are when a scan was processed; the later visit was processed first."""
    place = "002_S_0295/{}/{}_08_20_30.0/{}/ADNI_002_S_0295_MR_{}_Br_{}_S1_{}.nii"
    first = place.format("MPR", "2006-04-18", "I102001", "MPR", "20080410151230", "I102001")
    later = place.format("MPR-R", "2007-05-25", "I64039", "MPR-R", "20070803113054", "I64039")
    listing = listed(tmp_path, first, later)
    assert scans(listing) == [("002_S_0295", "ses-20060418", first)] and not found(listing)
    listing = read(LayoutOptions(tmp_path, sessions=("all",)))
    assert [scan.visit for scan in sorted(listing.scans, key=lambda scan: str(scan.date))] == [0, 1]


def test_a_repeat_of_a_session_is_not_taken_before_the_original(tmp_path):
    place = "002_S_0295/{}/2006-04-18_08_20_30.0/I1/ADNI_002_S_0295_MR_{}_Br_2008.nii"
    original, repeat = (place.format(kind, kind) for kind in ("MPRAGE", "MPR-R"))
    assert [source for _, _, source in scans(listed(tmp_path, original, repeat))] == [original]


def test_visits_that_nothing_puts_in_order_are_named(tmp_path):
    listing = listed(tmp_path, "ADNI_002_S_0295_a.nii", "ADNI_002_S_0295_b.nii")
    assert len(listing.scans) == 1 and any("is the first is not known" in why for _, why in found(listing))
    assert len(read(LayoutOptions(tmp_path, sessions=("all",))).scans) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("p1_visit1", "p1_visit2"),
        ("p1_pre", "p1_post"),
        ("p1_scan_1", "p1_scan_2"),
        ("p1_20200101", "p1_20210101"),
        ("p1-m06-T1w", "p1-m12-T1w"),
        ("p1", "p1_rescan"),
    ],
)
def test_names_that_differ_in_a_visit_are_one_patient_with_a_word(tmp_path, names):
    files = [f"{name}.nii" for name in (*names, "p2")]
    listing = listed(tmp_path / "a", *files, sessions=("all",))
    assert len({scan.patient_id for scan in listing.scans}) == 2
    assert any(who == "p1" and "taken for one person" in why for who, why in found(listing))
    table = "id,sex\np1,F\np2,M\n"
    sure = listed(tmp_path / "b", *files, table=table, sessions=("all",))
    assert {(scan.patient_id, scan.sex) for scan in sure.scans} == {("p1", "F"), ("p2", "M")} and not found(sure)
    stems = [name.removesuffix("-T1w") for name in (*names, "p2")]
    table = "id,sex\n" + "".join(f"{stem},F\n" for stem in stems)
    apart = listed(tmp_path / "c", *files, table=table, sessions=("all",))
    assert {scan.patient_id for scan in apart.scans} == set(stems) and not found(apart)


@pytest.mark.parametrize("names", [("p1", "p2"), ("scan1", "scan2"), ("p_001", "p_002"), ("anna", "anna2")])
def test_names_of_different_people_stay_apart_without_a_word(tmp_path, names):
    listing = listed(tmp_path, *(f"{name}.nii" for name in names))
    assert {scan.patient_id for scan in listing.scans} == set(names) and not listing.findings


def test_oasis_repeats_are_one_patient(tmp_path):
    listing = listed(tmp_path, "OAS1_0001_MR1.nii", "OAS1_0001_MR2.nii")
    assert scans(listing) == [("OAS1_0001", "ses-MR1", "OAS1_0001_MR1.nii")] and not found(listing)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    listing = listed(tmp_path / "a", "anna/anat/T1.mgz", "bert/anat/T1.mgz")
    assert scans(listing) == [("anna", None, "anna/anat/T1.mgz"), ("bert", None, "bert/anat/T1.mgz")]
    assert not found(listing) and len(found(listing, "quirk")) == 2
    listing = listed(tmp_path / "b", "anna/v1/T1.nii", "anna/v2/T1.nii", "bert/v1/T1.nii", sessions=("all",))
    assert {(scan.patient_id, scan.session) for scan in listing.scans} == {
        ("anna", "ses-v1"),
        ("anna", "ses-v2"),
        ("bert", "ses-v1"),
    }
    assert {who for who, _ in found(listing)} == {"anna", "bert"}


def test_other_contrasts_are_no_scans_and_nobody_is_lost_by_them(tmp_path):
    listing = listed(tmp_path, "p1_T1w.nii", "p1_FLAIR.nii", "p2_T2w.nii", "p1_desc-brain_mask.nii")
    assert scans(listing) == [("p1", None, "p1_T1w.nii")]
    assert found(listing) == {("p2", "has no T1 scan, only T2w")} and ("p2", None) not in found(listing, "skipped")


def test_t2_may_be_a_time_point(tmp_path):
    listing = listed(tmp_path, "p1_t0.nii", "p1_t2.nii", "p1_t3.nii")
    assert any("T2 may be a contrast or a time point" in why for _, why in found(listing))


def test_only_other_contrasts_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no volume .* only p1_T2w.nii"):
        listed(tmp_path, "p1_T2w.nii")


@pytest.mark.parametrize("place, taken", [("A", "A/scan.nii"), ("A/old", "A/old/scan.nii")])
def test_a_label_belongs_to_the_image_beside_it(tmp_path, place, taken):
    listing = listed(tmp_path, "A/scan.nii", "A/old/scan.nii", f"{place}/scan_label.nii")
    assert [scan.source for scan in listing.scans if scan.labels] == [taken]


def test_labels_belong_to_their_subject_and_session(tmp_path):
    listing = listed(
        tmp_path,
        "sub-1/anat/sub-1_T1w.nii",
        "derivatives/x/sub-1/anat/sub-1_desc-hippocampus_dseg.nii",
        "derivatives/y/sub-1/anat/sub-1_desc-preproc_T1w.nii",
        "sub-2/anat/sub-2_ses-1_T1w.nii",
        "derivatives/x/sub-2/anat/sub-2_ses-2_dseg.nii",
    )
    labels = {scan.patient_id: [label.path.name for label in scan.labels] for scan in listing.scans}
    assert labels == {"sub-1": ["sub-1_desc-hippocampus_dseg.nii"], "sub-2": []}
    assert found(listing) == {("sub-2", "label without image")}


def test_names_that_are_not_utf8_are_readable_and_unique(tmp_path):
    raw = os.fsdecode(b"M\xfcller_T1w.nii.gz")
    listing = listed(tmp_path / "a", raw, "p2_T1w.nii.gz")
    assert [scan.subject_id for scan in sorted(listing.scans, key=lambda scan: scan.key)] == ["Müller", "p2"]
    assert all(scan.source.encode() for scan in listing.scans) and not listing.findings
    listing = listed(tmp_path / "b", raw, "Müller_T1w.nii.gz")
    assert len(listing.scans) == 1 and any("double subject" in why for _, why in found(listing))


def test_a_name_that_is_too_long_for_a_file_gets_a_shorter_key(tmp_path):
    names = ["a" * 230 + end for end in "xy"]
    keys = {scan.key for scan in listed(tmp_path, *(f"{name}.nii" for name in names)).scans}
    assert len(keys) == 2 and all(len(key.encode()) <= 150 for key in keys)


@pytest.mark.parametrize(
    "name", ["p3_T1w.nii.gz.part", "p3_T1w.nii (1).gz", "p3_T1w.nii.gz.zip", "p3_T1w.nii.crdownload"]
)
def test_parts_of_downloads_are_named(tmp_path, name):
    assert found(listed(tmp_path, "p1.nii", name)) == {("p3_T1w", "no volume by its name: a part, or packed")}


def test_dicom_files_archives_and_dead_links_are_named(tmp_path):
    tmp_path.joinpath("p4").symlink_to("gone")
    listing = listed(tmp_path, "p1.nii", "p2/IM1.dcm", "p2/IM2.dcm", "p3.zip", "p2.tar.gz", "p1.nii.json")
    archive = "an archive, not looked into"
    # An archive may hold somebody who is nowhere else.
    assert found(listing) == {("p2", "DICOM files, not read"), ("p4", "a link to nothing"), ("p3", archive)}
    assert found(listing, "quirk") == {("(archives)", archive)}


@pytest.mark.parametrize("folders", [("2019", "2020"), ("03112019", "04122020"), ("0", "12"), ("one", "two")])
def test_folders_with_files_of_one_persons_name_are_not_taken_for_people_silently(tmp_path, folders):
    listing = listed(tmp_path, *(f"{folder}/anna.nii" for folder in folders))
    assert {who for who, reason in found(listing) if "taken for" in reason} >= set(folders)


@pytest.mark.parametrize("file", ["T1", "t1_mpr_sag_iso", "brain", "orig", "anat"])
def test_folders_with_files_of_a_protocols_name_are_people(tmp_path, file):
    listing = listed(tmp_path, f"anna/{file}.nii", f"bert/{file}.nii")
    assert {who for who, _, _ in scans(listing)} == {"anna", "bert"} and not found(listing)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("pre/P1", "pre/P2", "post/P1"), {("P1", "ses-pre"), ("P2", "ses-pre"), ("P1", "ses-post")}),
        (("pre/P1/T1", "pre/P2/T1", "post/P1/T1"), {("P1", "ses-pre"), ("P2", "ses-pre"), ("P1", "ses-post")}),
        (("v1/anna/T1", "v2/anna/T1", "v1/bob/T1"), {("anna", "ses-v1"), ("anna", "ses-v2"), ("bob", "ses-v1")}),
        (("pre/anna/T1", "post/anna/T1"), {("anna", "ses-pre"), ("anna", "ses-post")}),
        (("pre/1", "pre/2", "post/1"), {("1", "ses-pre"), ("2", "ses-pre"), ("1", "ses-post")}),
        (("001/T1", "002/T1"), {("001", None), ("002", None)}),
        (("sub01_T1_pre", "sub01_T1_post"), {("sub01", "ses-pre"), ("sub01", "ses-post")}),
        (("p3_2019", "p3_2021"), {("p3", "ses-2019"), ("p3", "ses-2021")}),
    ],
)
def test_names_of_time_points_are_sessions_not_people(tmp_path, files, expected):
    listing = listed(tmp_path, *(f"{file}.nii" for file in files), sessions=("all",))
    assert {(who, session) for who, session, _ in scans(listing)} == expected


def test_runs_behind_hyphens_are_one_patient(tmp_path):
    listing = listed(tmp_path, "sub-05-run-1.nii.gz", "sub-05-run-2.nii.gz", sessions=("all",))
    assert scans(listing) == [("sub-05", None, "sub-05-run-1.nii.gz")]


def test_names_that_may_be_visits_ask_unless_a_table_has_each(tmp_path):
    files = ("P1a.nii", "P1b.nii", "P2a.nii")
    assert [why for _, why in found(listed(tmp_path, *files))] == [
        "P1a and P1b: taken for different people, but may be scans of one"
    ]
    assert not found(listed(tmp_path, *files, table="id,sex\nP1a,F\nP1b,M\nP2a,F\n"))


def test_a_number_behind_a_bids_name_is_a_person_if_the_table_says_so(tmp_path):
    files, table = ("sub-1_1.nii", "sub-1_2.nii"), "id,sex\nsub-1_1,F\nsub-1_2,M\n"
    listing = listed(tmp_path / "a", *files, table=table)
    assert {(scan.patient_id, scan.sex) for scan in listing.scans} == {("sub-1_1", "F"), ("sub-1_2", "M")}
    assert set(listing.people) == {"sub-1_1", "sub-1_2"} and not found(listing)
    assert {scan.patient_id for scan in listed(tmp_path / "b", *files).scans} == {"sub-1"}


def test_of_freesurfers_volumes_the_t1_is_taken(tmp_path):
    names = ("T1", "orig", "brain", "aseg", "aparc+aseg", "wm", "orig/001")
    listing = listed(tmp_path, *(f"{who}/mri/{name}.mgz" for who in ("anna", "bert") for name in names))
    assert scans(listing) == [(who, None, f"{who}/mri/T1.mgz") for who in ("anna", "bert")]
    assert not found(listing) and set(listing.people) == {"anna", "bert"}
    listing = listed(tmp_path / "visits", *(f"p1_visit{number}/mri/T1.mgz" for number in (1, 2)))
    assert [scan.patient_id for scan in listing.scans] == ["p1"] and found(listing)
    # Of one person alone, and without T1.mgz.
    listing = listed(tmp_path / "one", "carl/mri/orig.mgz", "carl/mri/aseg.mgz")
    assert scans(listing) == [("carl", None, "carl/mri/orig.mgz")] and not found(listing)


@pytest.mark.parametrize("file", ["{}.nii.gz", "{}_T1.nii.gz", "{}/T1/T1.nii.gz", "{}/T1/T1_{}.nii.gz"])
def test_names_of_uk_biobank_say_who_and_when(tmp_path, file):
    """Person, field, visit, number."""
    names = ("1000123_20252_2_0", "1000123_20252_3_0", "1000456_20252_2_0")
    listing = listed(tmp_path / "all", *(file.format(name, name) for name in names))
    who_and_when = {(scan.subject_id, scan.patient_id, scan.session) for scan in listing.scans}
    assert who_and_when == {("1000123", "1000123", "ses-2"), ("1000456", "1000456", "ses-2")}
    assert not found(listing) and set(listing.people) == {"1000123", "1000456"}
    # Of one person alone as well.
    listing = listed(tmp_path / "one", file.format(names[1], names[1]))
    assert [(scan.subject_id, scan.patient_id, scan.session) for scan in listing.scans] == [
        ("1000123",) * 2 + ("ses-3",)
    ]


def test_what_tools_make_of_a_scan_is_no_person_without_a_word(tmp_path):
    for number, names in enumerate((("p1_T1", "p1_Warped"), ("s01", "c1s01", "ms01"), ("a", "a (1)"))):
        listing = listed(tmp_path / str(number), *(f"{name}.nii.gz" for name in (*names, "other")))
        assert any("may be scans of one" in reason for _, reason in found(listing))


def test_columns_that_may_be_meant_are_named(tmp_path):
    table = "participant_id,Age (months),sex\np1,720,F\np2,730,M\n"
    listing = listed(tmp_path, "p1_T1w.nii", "p2_T1w.nii", table=table)
    assert [scan.age for scan in listing.scans] == [None, None]
    assert found(listing, "quirk") == {("(all)", "age is not read from Age (months)")}
    table = "ID,Alter,Geschlecht\np1,72,w\np2,73,m\n"
    told = {reason for _, reason in found(listed(tmp_path, "p1_T1w.nii", "p2_T1w.nii", table=table), "quirk")}
    assert told == {"no sex, no age, no diagnosis, no site is read of its columns Alter, Geschlecht, ID"}
    table = "participant_id,age,Gender (1=M; 2=F),Dx group,Site name\np1,72,1,CN,A\np2,73,2,AD,B\n"
    told = {reason for _, reason in found(listed(tmp_path, "p1_T1w.nii", "p2_T1w.nii", table=table), "quirk")}
    columns = {"sex": "Gender (1=M; 2=F)", "diagnosis": "Dx group", "site": "Site name"}
    assert told == {f"{fact} is not read from {column}" for fact, column in columns.items()}


def test_scans_of_formats_that_are_not_read_are_named_with_the_conversion(tmp_path):
    shape, affine = tiny.grid()
    tiny.save(tmp_path / "in/p1.nii.gz", tiny.head(shape, affine), affine)
    for name in ("p1.nrrd", "p2.nrrd", "p3.MHA", "p4.mif", "p5.mgh.gz", "p6.nii.gz.gz", "p1_seg.nrrd", "p7.hdr"):
        (tmp_path / "in" / name).write_bytes(b"x" * 400)
    assert prepare("folder", tmp_path / "in", tmp_path / "out", **OPTIONS) == 1
    assert [item["subject_id"] for item in load_datalist(tmp_path / "out").items] == ["p1"]
    told = {
        row["file"]: (row["reason"], row["remedy"]) for row in findings(tmp_path / "out") if row["kind"] == "problem"
    }
    assert told == {
        "p2.nrrd": (".nrrd files are not read", "convert it (Convert3D: c3d p2.nrrd -o p2.nii.gz)"),
        "p3.MHA": (".mha files are not read", "convert it (Convert3D: c3d p3.MHA -o p3.nii.gz)"),
        "p4.mif": (".mif files are not read", "convert it (MRtrix3: mrconvert p4.mif p4.nii.gz)"),
        "p5.mgh.gz": (".mgh.gz files are not read", "name it p5.mgz"),
        "p6.nii.gz.gz": (".nii.gz.gz files are not read", "unpack it (gunzip p6.nii.gz.gz)"),
        "p1_seg.nrrd": (
            "label of a format that is not read",
            "convert it (Convert3D: c3d p1_seg.nrrd -o p1_seg.nii.gz)",
        ),
        "p7.hdr": ("half of a pair: its voxels are missing", "add p7.img, or remove it"),
    }


def test_folders_without_a_volume_are_named_and_missing_people_are_problems(tmp_path):
    (tmp_path / "a/carl").mkdir(parents=True)
    (tmp_path / "a/dora").mkdir()
    (tmp_path / "a/dora/IM0001").write_bytes(bytes(128) + b"DICM")
    listing = listed(tmp_path / "a", "anna/T1.nii", "bert/T1.nii", "emil/notes.txt", "code/x.py")
    assert found(listing) == {
        ("carl", "has no volume in it"),
        ("dora", "DICOM files, not read"),
        ("emil", "has no volume, only notes.txt and the like"),
    }
    assert set(listing.people) == {"anna", "bert", "carl", "dora", "emil"}
    listing = listed(tmp_path / "b", "anna.nii", "bert.nii", "logs/a.txt")
    assert not found(listing) and found(listing, "quirk") == {("logs", "has no volume, only a.txt and the like")}
    assert set(listing.people) == {"anna", "bert"}


def test_folders_of_contrasts_are_not_silently_people(tmp_path):
    listing = listed(tmp_path, *(f"{kind}/{who}.nii" for kind in ("T1", "FLAIR") for who in ("anna", "bert")))
    remedies = {finding.subject: finding.remedy for finding in listing.findings if "taken for" in finding.reason}
    assert "give --source .../T1;" in remedies["T1"]
    assert "give the folder of T1 scans alone as --source;" in remedies["FLAIR"]


def test_people_of_two_data_sets_with_one_id_are_not_passed_off_as_one_persons_scans(tmp_path):
    listing = listed(tmp_path, *(f"study{x}/sub-01/anat/sub-01_T1w.nii.gz" for x in "AB"))
    (finding,) = (one for one in listing.findings if one.kind == "problem")
    assert finding.file == "studyB/sub-01/anat/sub-01_T1w.nii.gz"
    assert "studyA/sub-01/anat/sub-01_T1w.nii.gz is used" in finding.reason
    assert "prepare each folder on its own if these are different people" in finding.remedy
