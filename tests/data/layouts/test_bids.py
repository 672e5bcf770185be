# SPDX-License-Identifier: Apache-2.0
import pandas as pd
import pytest

from volta_components.data.layouts.bids import read
from volta_components.data.layouts.common import LayoutOptions

DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(100)


def listed(root, *files, **options):
    """The listing of empty files, or of (file, text); readers look at names and tables only."""
    for file in files:
        name, text = file if isinstance(file, tuple) else (file, "")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return read(LayoutOptions(root, **options))


def t1(subject, session=None, more=""):
    parts = [subject, *([session] if session else [])]
    return f"{'/'.join(parts)}/anat/{'_'.join(parts)}{more}_T1w.nii.gz"


def found(listing, kind="problem"):
    return {(f.subject, f.file, f.reason) for f in listing.findings if f.kind == kind}


def people(*subjects):
    return "participants.tsv", "participant_id\tsex\n" + "".join(f"{subject}\tF\n" for subject in subjects)


@pytest.mark.parametrize(
    ("sessions", "first"),
    [
        (("M48", "M108"), "M48"),
        (("M6", "M12"), "M6"),
        (("9", "10"), "9"),
        (("pre", "post"), "pre"),
        (("bl", "M6"), "bl"),
    ],
)
def test_the_first_session_is_the_first_in_time(tmp_path, sessions, first):
    files = [t1("sub-1", f"ses-{session}") for session in sessions]
    listing = listed(tmp_path, people("sub-1"), *files)
    assert [scan.session for scan in listing.scans] == [f"ses-{first}"] and not found(listing)
    assert [kind for kind in (f.kind for f in listing.findings)] == ["choice"]


@pytest.mark.parametrize("table", ["sub-1/sub-1_sessions.tsv", "scans"])
def test_dates_put_sessions_in_order_that_names_do_not(tmp_path, table):
    files = [t1("sub-1", "ses-A"), t1("sub-1", "ses-B")]
    if table == "scans":
        tables = [
            (f"sub-1/ses-{x}/sub-1_ses-{x}_scans.tsv", f"filename\tacq_time\nanat/sub-1_ses-{x}_T1w.nii.gz\t{day}\n")
            for x, day in (("A", "2020-03-01T10:00:00"), ("B", "2019-03-01T10:00:00"))
        ]
    else:
        tables = [(table, "session_id\tacq_time\tage\nses-A\t2020-03-01\t61\nses-B\t2019-03-01\t60\n")]
    listing = listed(tmp_path, people("sub-1"), *files, *tables)
    assert [(scan.session, scan.date) for scan in listing.scans] == [("ses-B", "2019-03-01")] and not found(listing)


def test_dates_that_are_not_read_are_asked_for_in_the_form_that_is(tmp_path):
    listing = listed(tmp_path, people("sub-1"), t1("sub-1", "ses-25062020"), t1("sub-1", "ses-01072019"))
    (finding,) = [f for f in listing.findings if f.kind == "problem"]
    assert "is the first is not known" in finding.reason and "write dates as YYYYMMDD" in finding.remedy


def test_sessions_without_any_order_are_a_problem(tmp_path):
    listing = listed(tmp_path, people("sub-1"), t1("sub-1", "ses-A"), t1("sub-1", "ses-B"))
    ((who, file, reason),) = found(listing)
    assert who == "sub-1" and file.endswith("ses-B_T1w.nii.gz")
    assert reason == "which of ses-A and ses-B is the first is not known; ses-A is used"


def test_a_session_is_found_in_its_table_in_any_spelling_or_is_a_problem(tmp_path):
    table = "sub-1/sub-1_sessions.tsv", "session_id\tage\nM06\t61\nses-M000\t60\n"
    files = [t1("sub-1", "ses-M006"), t1("sub-1", "ses-M0"), t1("sub-1", "ses-M12")]
    listing = listed(tmp_path, people("sub-1"), *files, table, sessions=("all",))
    assert {scan.session: scan.age for scan in listing.scans} == {"ses-M0": 60, "ses-M006": 61, "ses-M12": None}
    ((who, file, reason),) = found(listing)
    assert (who, file) == ("sub-1", "sub-1/sub-1_sessions.tsv") and "ses-M12 has no row of its own" in reason


@pytest.mark.parametrize("columns", ["age\tdiagnosis", "Age\tDiagnosis", "age_at_scan\tDX"])
def test_a_session_s_own_table_wins_whatever_its_columns_are_called(tmp_path, columns):
    whole = "participants.tsv", "participant_id\tage\tdiagnosis\tsex\nsub-1\t74\tCN\tF\n"
    own = "sub-1/sub-1_sessions.tsv", f"session_id\t{columns}\nses-1\t72\tAD\nses-2\t\tAD\n"
    listing = listed(tmp_path, whole, own, t1("sub-1", "ses-1"), t1("sub-1", "ses-2"), sessions=("all",))
    facts = {scan.session: (scan.age, scan.diagnosis, scan.sex) for scan in listing.scans}
    assert facts == {"ses-1": (72, "AD", "F"), "ses-2": (74, "AD", "F")} and not found(listing)


@pytest.mark.parametrize(
    ("units", "age"),
    [("months", 60), ("Mo", 60), ("Years", 720), ("year(s)", 720), ("n/a", 720), ("weeks", 13.7988), ("moons", None)],
)
def test_ages_have_the_units_of_the_file_beside_their_table(tmp_path, units, age):
    whole = "participants.tsv", "participant_id\tage\nsub-1\t720\nsub-2\tn/a\n"
    own = "sub-2/sub-2_sessions.tsv", "session_id\tage\nses-1\t720\n"
    sidecars = [(name, f'{{"age": {{"Units": "{units}"}}}}') for name in ("participants.json", "sessions.json")]
    listing = listed(tmp_path, whole, own, *sidecars, t1("sub-1"), t1("sub-2", "ses-1"))
    assert [scan.age for scan in listing.scans] == [None if age == 720 else age] * 2
    told = {(file, why) for _, file, why in found(listing) if "units" in why}
    why = "age in units of 'moons'"
    places = ("participants.tsv", "participants.json"), ("sub-2/sub-2_sessions.tsv", "sessions.json")
    assert told == ({(file, f"{sidecar}: {why}") for file, sidecar in places} if age is None else set())


@pytest.mark.parametrize(("cell", "age"), [("89+", 7.4167), (">89", 7.4167), ("60y", 60), ("720 d", 1.9713)])
def test_a_unit_of_the_cells_own_counts_first(tmp_path, cell, age):
    table = "participants.tsv", f"participant_id\tage\nsub-1\t{cell}\n"
    listing = listed(tmp_path, table, ("participants.json", '{"age": {"Units": "months"}}'), t1("sub-1"))
    assert listing.scans[0].age == age and not found(listing)


@pytest.mark.parametrize("sessions", [("all",), ("ses-M24",)])
@pytest.mark.parametrize("column", ["diagnosis_sc", "DX_bl"])
def test_what_is_of_the_baseline_is_not_of_a_later_session(tmp_path, sessions, column):
    whole = "participants.tsv", f"participant_id\tage_bl\t{column}\nsub-1\t60\tCN\nsub-2\t60\tCN\n"
    own = "sub-2/sub-2_sessions.tsv", "session_id\tage\tdiagnosis\nses-M00\t60\tCN\nses-M24\t62.5\tCN\n"
    files = [t1(who, f"ses-{name}") for who in ("sub-1", "sub-2") for name in ("M00", "M06", "M24")]
    listing = listed(tmp_path, whole, own, *files[:3], files[3], files[5], sessions=sessions)
    facts = {(scan.subject_id, scan.session): (scan.age, scan.diagnosis) for scan in listing.scans}
    assert facts[("sub-1", "ses-M24")] == (62, None) and facts[("sub-2", "ses-M24")] == (62.5, "CN")
    if sessions == ("all",):
        assert facts[("sub-1", "ses-M00")] == (60, "CN") and facts[("sub-1", "ses-M06")] == (60.5, None)
    reason = "diagnosis CN is the baseline's, not surely that of session ses-"
    later = ("M06", "M24") if sessions == ("all",) else ("M24",)
    assert {why for _, _, why in found(listing)} == {f"{reason}{name}" for name in later}
    assert not found(read(LayoutOptions(tmp_path)))


def test_dates_of_a_session_s_table_tell_the_order_of_day_and_month(tmp_path):
    own = "sub-1/sub-1_sessions.tsv", "session_id\tacq_time\nses-1\t05.06.2020\nses-2\t25.06.2022\n"
    listing = listed(tmp_path, people("sub-1"), own, t1("sub-1", "ses-1"), t1("sub-1", "ses-2"), sessions=("all",))
    assert [scan.date for scan in listing.scans] == ["2020-06-05", "2022-06-25"] and not found(listing)


def test_the_first_scan_that_there_is_may_be_of_a_later_session(tmp_path):
    table = "participants.tsv", "participant_id\tage_bl\tdiagnosis_sc\nsub-1\t60\tCN\n"
    listing = listed(tmp_path, table, t1("sub-1", "ses-M24"))
    assert [(scan.age, scan.diagnosis) for scan in listing.scans] == [(62, None)]
    assert {why.partition(",")[0] for _, _, why in found(listing)} == {"diagnosis CN is the baseline's"}


def test_a_sex_in_which_the_two_tables_differ_is_unknown(tmp_path):
    own = "sub-1/sub-1_sessions.tsv", "session_id\tsex\nses-1\tM\nses-2\tfemale\n"
    listing = listed(tmp_path, people("sub-1"), own, t1("sub-1", "ses-1"), t1("sub-1", "ses-2"), sessions=("all",))
    assert {scan.session: scan.sex for scan in listing.scans} == {"ses-1": None, "ses-2": "F"}
    assert found(listing) == {("sub-1", "participants.tsv", "sex F here, M in the session's own table")}


def test_rows_of_other_visits_are_no_problem_where_the_session_s_own_table_has_all(tmp_path):
    whole = "participants.tsv", "participant_id\tsession_id\tage\tdiagnosis\nsub-1\tses-9\t60\tCN\n"
    own = "sub-1/sub-1_sessions.tsv", "session_id\tage_at_scan\tDX\nses-1\t72\tAD\n"
    listing = listed(tmp_path, whole, own, t1("sub-1", "ses-1"))
    assert [(scan.age, scan.diagnosis) for scan in listing.scans] == [(72, "AD")] and not found(listing)


def test_ids_of_the_table_in_other_spellings(tmp_path):
    listing = listed(tmp_path, ("participants.tsv", "participant_id;sex\n1;F\n02;M\n"), t1("sub-01"), t1("sub-02"))
    assert {scan.patient_id: scan.sex for scan in listing.scans} == {"sub-01": "F", "sub-02": "M"}
    assert not found(listing)


def test_hidden_files_and_folders_are_nothing(tmp_path):
    files = [t1("sub-1"), "derivatives/m/sub-1/anat/sub-1_desc-hippocampus_dseg.nii.gz"]
    listed(tmp_path, people("sub-1"), *files, ".git/sub-9/anat/sub-9_T1w.nii.gz")
    for name in (*files, "participants.tsv", "sub-1"):
        (tmp_path / name).with_name("._" + (tmp_path / name).name).write_bytes(DOUBLE)
    listing = read(LayoutOptions(tmp_path))
    assert [scan.labels[0].path.name for scan in listing.scans] == ["sub-1_desc-hippocampus_dseg.nii.gz"]
    assert not listing.findings


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("sub-1/anat/sub-1_MPRAGE.nii.gz", "has no T1w image, but sub-1_MPRAGE.nii.gz"),
        ("sub-1/sub-1_T1w.nii.gz", "has no T1w image, but sub-1_T1w.nii.gz"),
        ("sub-1/anat/sub-1_T2w.nii.gz", "has no T1w image, but sub-1_T2w.nii.gz"),
        ("sub-1/anat/sub-2_T1w.nii.gz", "its name says sub-2, its folder sub-1"),
        ("sub-1/ses-1/anat/sub-1_ses-2_T1w.nii.gz", "its name says sub-1 ses-2, its folder sub-1 ses-1"),
        ("sub-1/anat/sub-1_T1w.nrrd", "has no T1w image, but sub-1_T1w.nrrd"),
        ("sub-1/anat/sub-1_T1w.hdr", "half of a pair: its voxels are missing"),
        ("sub-1/anat/sub-1_T1w.mgz", "has no T1w image, but sub-1_T1w.mgz"),
    ],
)
def test_whoever_has_no_scan_that_is_understood_is_a_problem(tmp_path, file, reason):
    listing = listed(tmp_path, people("sub-0", "sub-1"), t1("sub-0"), file)
    assert [(who, why) for who, _, why in found(listing)] == [("sub-1", reason)]
    assert [scan.patient_id for scan in listing.scans] == ["sub-0"]


def test_folders_that_are_no_subjects_are_named_if_they_hold_scans(tmp_path):
    listing = listed(tmp_path, people("sub-1"), t1("sub-1"), "Sub-2/anat/x.nii.gz", "code/x.nii", "sourcedata/y.nii")
    ((who, place, reason),) = found(listing)
    assert place == "Sub-2" and reason == "is no sub-* folder, but holds x.nii.gz" and who


def test_of_several_t1ws_the_rule_decides_or_it_is_a_problem(tmp_path):
    listing = listed(tmp_path / "a", people("sub-1"), t1("sub-1", more="_run-2"), t1("sub-1", more="_run-1"))
    assert "run-1" in listing.scans[0].source and not found(listing)
    listing = listed(tmp_path / "b", people("sub-1"), t1("sub-1", more="_acq-A"), t1("sub-1", more="_acq-B"))
    assert "acq-A" in listing.scans[0].source
    assert "sub-1_acq-A_T1w.nii.gz is used, by name alone" in next(iter(found(listing)))[2]


@pytest.mark.parametrize("part", ["phase", "real", "imag"])
def test_a_part_of_a_complex_image_is_no_t1(tmp_path, part):
    files = [t1("sub-1", more=f"_part-{part}"), t1("sub-1", more="_part-mag"), t1("sub-2", more=f"_part-{part}")]
    listing = listed(tmp_path, people("sub-1", "sub-2"), *files)
    assert [scan.source for scan in listing.scans] == [files[1]]
    assert {(file, reason) for _, file, reason in found(listing, "skipped")} == {
        (file, f"no T1 scan by its name (part-{part})") for file in (files[0], files[2])
    }
    assert found(listing) == {("sub-2", "sub-2", f"has no T1w image, but sub-2_part-{part}_T1w.nii.gz")}


def test_only_a_scan_with_contrast_agent_is_told(tmp_path):
    files = [t1("sub-1", more="_ce-gd"), t1("sub-2", more="_ce-gd"), t1("sub-2")]
    listing = listed(tmp_path, people("sub-1", "sub-2"), *files)
    assert {scan.source for scan in listing.scans} == {files[0], files[2]}
    told = {(who, why) for who, _, why in found(listing, "quirk") if "agent" in why}
    assert told == {("sub-1", "with contrast agent, by its name; there is no T1 without")} and not found(listing)


def test_a_session_may_be_in_the_name_alone(tmp_path):
    files = [f"sub-1/anat/sub-1_ses-{n}_T1w.nii.gz" for n in (1, 2)]
    own = "sub-1/sub-1_sessions.tsv", "session_id\tage\nses-1\t60\nses-2\t62\n"
    listing = listed(tmp_path, people("sub-1"), own, *files, sessions=("all",))
    assert [(scan.session, scan.source, scan.age) for scan in listing.scans] == [
        ("ses-1", files[0], 60),
        ("ses-2", files[1], 62),
    ]
    assert not found(listing)


def test_an_unpacked_folder_of_a_scans_name_is_the_scan(tmp_path):
    listing = listed(tmp_path, people("sub-1"), f"{t1('sub-1')}/0057_t1.nii")
    assert [scan.image.name for scan in listing.scans] == ["0057_t1.nii"] and not listing.findings


def test_named_sessions_are_taken_in_any_spelling_and_missing_ones_named(tmp_path):
    files = [t1("sub-1", "ses-M006"), t1("sub-1", "ses-M012")]
    listing = listed(tmp_path, people("sub-1"), *files, sessions=("M6", "M24"))
    assert [scan.session for scan in listing.scans] == ["ses-M006"]
    assert {why for _, _, why in found(listing)} == {"nobody has a session M24"}


def test_dates_that_cannot_be_read_and_ages_against_names_are_named(tmp_path):
    table = "sub-1/sub-1_sessions.tsv", "session_id\tacq_time\tage\nses-1\t05.06.2020\t72\nses-2\t20-Jun-2019\t70\n"
    listing = listed(tmp_path, people("sub-1"), table, t1("sub-1", "ses-1"), t1("sub-1", "ses-2"))
    assert {why for _, _, why in found(listing)} == {
        "date '05.06.2020' cannot be read for certain",
        "the names of its sessions and their ages say different orders",
    }


@pytest.mark.parametrize("spelling", ["SUB-01", "SUB-001", "Sub_1", "sub-01", "01", "1"])
def test_the_table_may_write_ids_in_any_case_with_or_without_their_prefix(tmp_path, spelling):
    listing = listed(tmp_path, ("participants.tsv", f"participant_id\tsex\n{spelling}\tF\n"), t1("sub-01"))
    assert [scan.sex for scan in listing.scans] == ["F"] and not found(listing)


def label(subject, more=""):
    return f"derivatives/h/{subject}/anat/{subject}{more}_desc-hippocampus_dseg.nii.gz"


@pytest.mark.parametrize(
    ("scans", "of", "given"),
    [
        (("_run-1", "_run-2"), "_run-1", True),
        (("_run-1", "_run-2"), "_run-01_space-T1w", True),
        (("_run-1", "_run-2"), "_run-2", "_run-2_T1w.nii.gz, which is not the T1w that is used"),
        (("_acq-mprage", "_acq-tse"), "_acq-tse", "_acq-tse_T1w.nii.gz, which is not the T1w that is used"),
        (("_run-1", "_run-2"), "", "label of several images"),
        (("", "_rec-norm"), "", True),
        (("_run-1",), "", True),
        (("_run-1",), "_run-2", "label without image"),
        (("",), "_acq-tse", "label without image"),
    ],
)
def test_a_label_map_is_given_to_its_own_image_only(tmp_path, scans, of, given):
    images = [t1("sub-1", more=more) for more in scans]
    listing = listed(tmp_path, people("sub-1"), *images, label("sub-1", of))
    (scan,) = listing.scans
    assert scan.source == images[0] and [part.path.name for part in scan.labels] == (
        [label("sub-1", of).split("/")[-1]] if given is True else []
    )
    reasons = [why for _, file, why in found(listing) if file == label("sub-1", of)]
    assert reasons == [] if given is True else given in reasons[0]


def test_scans_tsv_is_read_without_sessions(tmp_path):
    table = "sub-1/sub-1_scans.tsv", "filename\tacq_time\nanat/sub-1_T1w.nii.gz\t2021-06-20T10:00:00\n"
    listing = listed(tmp_path, people("sub-1"), t1("sub-1"), table)
    assert [scan.date for scan in listing.scans] == ["2021-06-20"] and not found(listing)


def test_a_session_in_a_format_that_is_not_read_is_a_problem(tmp_path):
    files = [
        t1("sub-1", "ses-1"),
        t1("sub-1", "ses-2").replace("nii.gz", "nrrd"),
        t1("sub-1", "ses-1").replace(".nii.gz", ".mha"),
    ]
    listing = listed(tmp_path, people("sub-1"), *files)
    (problem,) = [finding for finding in listing.findings if finding.kind == "problem"]
    assert (problem.file, problem.reason) == (
        files[1],
        "is no NIfTI file",
    ) and "c3d sub-1_ses-2_T1w.nrrd" in problem.remedy


@pytest.mark.parametrize("name", ["participants.csv", "Participants.TSV", "participants.xlsx"])
def test_the_table_of_people_may_be_csv_or_a_sheet_in_any_case(tmp_path, name):
    frame = pd.DataFrame({"participant_id": ["sub-1"], "sex": ["F"], "age": [60]})
    if name.endswith("xlsx"):
        frame.to_excel(tmp_path / name, index=False)
    else:
        frame.to_csv(tmp_path / name, sep="," if name.endswith("csv") else "\t", index=False)
    listing = listed(tmp_path, t1("sub-1"), ("demographics.csv", "id,sex\nsub-1,M\n"))
    assert [(scan.sex, scan.age) for scan in listing.scans] == [("F", 60.0)] and not listing.findings


def test_tables_that_may_be_meant_are_named_where_there_is_none_of_the_people(tmp_path):
    texts = [
        (name, "x") for name in ("participants.tsv.txt", "people.XLSX", "README.txt", "._people.csv", "code/a.csv")
    ]
    listing = listed(tmp_path, t1("sub-1"), *texts)
    assert found(listing) == {("(all)", "participants.tsv", "is missing")}
    reason = "a table that is not read"
    assert found(listing, "quirk") == {("(all)", name, reason) for name in ("participants.tsv.txt", "people.XLSX")}


def test_archives_and_links_beside_the_subjects_lose_nobody(tmp_path):
    """As heudiconv leaves the DICOM files of each subject, and as raw data are linked."""
    beside = (
        "sourcedata/sub-1/anat/sub-1_T1w.dicom.tgz",
        "derivatives/freesurfer/sub-1.tar.gz",
        "code/old.nii.gz.part",
    )
    (tmp_path / "elsewhere").mkdir()
    files = [(name, "x") for name in beside]
    listing = listed(tmp_path / "ds", people("sub-1"), t1("sub-1"), *files)
    assert not listing.findings
    (tmp_path / "ds/sourcedata/raw").symlink_to(tmp_path / "elsewhere")
    listing = read(LayoutOptions(tmp_path / "ds"))
    assert found(listing, "quirk") == {("(links)", "sourcedata/raw", "a link that leaves the source")}
    assert not found(listing) and list(listing.people) == ["sub-1"]
    (tmp_path / "ds/sub-1/anat/more.zip").touch()
    assert {reason for _, _, reason in found(read(LayoutOptions(tmp_path / "ds")))} == {"an archive, not looked into"}


def test_a_session_with_two_rows_is_told_so(tmp_path):
    own = "sub-1/sub-1_sessions.tsv", "session_id\tage\nses-1\t60\nses-1\t61\n"
    findings = [f for f in listed(tmp_path, t1("sub-1", "ses-1"), own).findings if f.file.endswith("_sessions.tsv")]
    assert [f.kind for f in findings] == ["problem"]
    assert findings[0].reason == "none of its rows is surely that of ses-1: ses-1, ses-1"
    assert findings[0].remedy.startswith("keep one of each")
