# SPDX-License-Identifier: Apache-2.0
from volta_components.data.finish import print_findings
from volta_components.data.layouts import Finding


def test_what_is_the_same_of_many_people_hides_nothing_else(capsys):
    code = ("participants.tsv", "unknown sex code '1'", "write M, F or n/a in the table")
    same = [Finding("problem", f"sub-{i:03d}", *code) for i in range(500)]
    three = [Finding("problem", f"sub-{i}", f"{i}.nii", "empty file", "fetch it again") for i in range(3)]
    print_findings([*same, *three, Finding("quirk", "sub-4", "", "odd")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "503 problems:" and lines[-2:] == ["1 quirks:", "  sub-4  (none)  odd"]
    assert [line.split("  ")[1].strip() for line in lines[1:5]] == ["sub-000 and 499 more", "sub-0", "sub-1", "sub-2"]
    assert lines[5] == "qc/findings.csv has all of them"


def test_more_rows_than_are_shown_are_counted(capsys):
    print_findings([Finding("problem", f"sub-{i}", "", f"reason {i}") for i in range(32)])
    assert capsys.readouterr().out.splitlines()[-2:] == ["  ... and 2 more", "qc/findings.csv has all of them"]
