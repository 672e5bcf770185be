# SPDX-License-Identifier: Apache-2.0
"""Plans without processes; then real processes of a bundle that trains in milliseconds."""

from __future__ import annotations

import json

import pytest

from volta_components.cli import main
from volta_components.crossval.command import crossval
from volta_components.errors import InputError


def test_jobs_and_executor_are_checked(place):
    for options in ({"jobs": 0}, {"gpus_per_run": 99}):
        with pytest.raises(InputError, match="--"):
            crossval("fake", "datalist.json", folds=1, **options)


def test_an_option_given_twice_is_not_half_forgotten(place, capsys):
    words = ["crossval", "--bundle", "fake", "--datalist", "datalist.json", "--folds", "1"]
    assert main([*words, "--seed", "1", "--seed=2"]) == 2
    assert "--seed is given twice" in capsys.readouterr().err
    assert main([*words, "--set", "epochs=1", "--set=hidden=[1]", "--dry-run"]) == 0
    ids = json.loads(next(place.glob("runs/fake/volta_fold0*/run.json")).read_text())
    assert (ids["epochs"], ids["hidden"]) == (1, [1])


def test_command_line_values_arrive_as_meant(place, capsys):
    words = ["crossval", "--bundle", "fake", "--datalist", "datalist.json", "--inits", "volta,linear_scratch"]
    words += ["--folds", "1", "--fractions", "0.5,1.0", "--set", "epochs=1,hidden=[1,2]", "--overlays", "tiny.json"]
    assert main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"{init}_fold0_frac{fraction}_seed0" for fraction in ("0.5", "1") for init in ("volta", "linear_scratch")
    ]
    assert all("to do" in line and "monai.bundle run --config_file" in line for line in lines)
    assert json.loads(next(place.glob("runs/fake/*/run.json")).read_text())["hidden"] == [1, 2]
