# SPDX-License-Identifier: Apache-2.0
"""The formatter of JSON files changes the layout of a file and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.format_json import LINE_LENGTH, format_json

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.format_json", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@given(documents)
def test_the_content_and_the_order_of_keys_stay(document):
    formatted = format_json(json.dumps(document))
    # Compared as text, since 1 == 1.0 == True in Python and dictionaries compare without order.
    assert json.dumps(json.loads(formatted)) == json.dumps(document)
    assert format_json(formatted) == formatted


def test_lists_of_plain_values_stand_on_one_line_and_objects_do_not():
    text = (
        '{"size":[96,\n96,96],"names":["a","b"],"grid":[[0,1],[2,3]],"steps":[{"keys":["image"]}],"none":[],"empty":{}}'
    )
    assert (
        format_json(text)
        == """{
    "size": [96, 96, 96],
    "names": ["a", "b"],
    "grid": [[0, 1], [2, 3]],
    "steps": [
        {
            "keys": ["image"]
        }
    ],
    "none": [],
    "empty": {}
}
"""
    )


@pytest.mark.parametrize("number", ["1e-05", "1E-5", "0.00001", "1.0", "1.50", "-0", "12345678901234567890", "1e400"])
def test_a_number_keeps_its_spelling(number):
    assert format_json(f'{{"rate":{number},"rates":[{number},2]}}') == (
        f'{{\n    "rate": {number},\n    "rates": [{number}, 2]\n}}\n'
    )


def test_a_word_that_looks_like_a_number_stays_a_word():
    assert format_json('["1e-05", 1e-05]') == '["1e-05", 1e-05]\n'


def test_letters_beyond_ascii_stay_readable():
    assert format_json('["96\\u00b3 µm"]') == '["96³ µm"]\n'


@pytest.mark.parametrize("expressions, lines", [(1, 1), (2, 5)])
def test_several_expressions_have_a_line_each(expressions, lines):
    items = ["$f()"] * expressions + ["word"] * (3 - expressions)
    assert len(format_json(json.dumps(items)).splitlines()) == lines


def test_a_list_is_broken_only_if_it_does_not_fit_with_its_key_and_comma():
    room = LINE_LENGTH - len('    "k": [""],')
    fits = format_json(json.dumps({"k": ["x" * room], "z": 0})).splitlines()
    too_long = format_json(json.dumps({"k": ["x" * (room + 1)], "z": 0})).splitlines()
    assert fits[1] == f'    "k": ["{"x" * room}"],' and len(fits[1]) == LINE_LENGTH
    assert too_long[1:4] == ['    "k": [', f'        "{"x" * (room + 1)}"', "    ],"]


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"fold": 0, "other": {"fold": 1}, "fold": 2}', 'the key "fold" appears twice'),
        ("[NaN]", "NaN is not JSON"),
        ("[1,]", "line 1 column"),
        ("", "line 1 column 1"),
    ],
)
def test_a_bad_file_is_named_and_left_alone(tmp_path, text, reason):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text(text)
    good.write_text("[1,\n2]")
    result = run(bad, good)
    assert result.returncode == 1
    assert str(bad) in result.stderr and reason in result.stderr
    assert bad.read_text() == text
    assert good.read_text() == "[1, 2]\n", "the files after a bad one are formatted all the same"


def test_check_reports_files_and_changes_none(tmp_path):
    messy, tidy = tmp_path / "messy.json", tmp_path / "tidy.json"
    messy.write_bytes(b"[1,\r\n2]\r\n")
    tidy.write_text("[1, 2]\n")
    checked = run("--check", messy, tidy)
    assert checked.returncode == 1
    assert str(messy) in checked.stderr and str(tidy) not in checked.stderr
    assert messy.read_bytes() == b"[1,\r\n2]\r\n"
    assert run(messy, tidy).returncode == 1, "pre-commit learns from the exit status that a file was changed"
    assert messy.read_bytes() == tidy.read_bytes()
    assert run("--check", messy, tidy).returncode == 0


def test_every_config_is_formatted_and_the_lint_target_checks_it():
    assert len(CONFIGS) > 30
    assert run("--check", *CONFIGS).returncode == 0
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint and "tools.format_json --check bundles/*/configs/*.json" in lint[1]
