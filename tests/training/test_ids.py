# SPDX-License-Identifier: Apache-2.0
"""What a command gives a config and MONAI would take without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai.bundle
import pytest
from monai.bundle import ConfigWorkflow
from prepared import ROOT

from volta_components.errors import find_input_error
from volta_components.files import write_json
from volta_components.training.ids import undone_parts, wrong_ids

CONFIGS = ROOT / "bundles" / "ixi_sex" / "configs"
CONTENT: dict[str, Any] = {
    "imports": ["$import volta_components.bundle as volta"],
    "epochs": 3,
    "cache": True,
    "amp": "$@epochs > 5",
    "init": "volta",
    "suffix": "",
    "loss": {"_target_": "DiceLoss", "softmax": True},
    "train": {"dataset": {"_target_": "Dataset", "data": []}, "length": 3},
    "targets": {"sex": ["M", "F"]},
    "initialize": ["$volta.check_ids()"],
    "run": [],
}
NO_ID = "no such id in train.json"


def refusal(call: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    found = find_input_error(caught.value)
    assert found is not None, caught.value
    return str(found)


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ({"epoch": 9}, ("--epoch", f"{NO_ID}; did you mean --epochs?")),
        ({"unheard": 9}, ("--unheard", NO_ID)),
        ({"train": {**CONTENT["train"], "lenght": 9}}, ("--train#lenght", f"{NO_ID}; did you mean --train#length?")),
        ({"train": {**CONTENT["train"], "epoch": 9}}, ("--train#epoch", NO_ID)),
        ({"cache": "nope"}, ("--cache", "'nope' is a text; write True or False")),
        ({"amp": "False"}, ("--amp", "'False' is a text; write True or False")),
        ({"loss": {"softmax": "false"}}, ("--loss#softmax", "'false' is a text; write True or False")),
        (
            {"init": "x_scratch"},
            ("--init", "it has the init 'volta'; add configs/x_scratch.json to --config_file instead"),
        ),
    ],
)
def test_what_does_nothing_is_named(given: dict[str, Any], row: tuple[str, str], tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", CONTENT)
    assert wrong_ids({**CONTENT, **given}, [tmp_path / "train.json"], are_named=True) == [row]


@pytest.mark.parametrize(
    "given",
    [
        {"cache": False, "amp": True, "suffix": "nope", "loss": {"softmax": "$True"}},
        {
            "cache": "@amp",
            "amp": 0,
            "_meta_": {"answer": "no"},
            "tracking_uri": "x",
            "experiment_name": "y",
            "finalize": [],
        },
        {"rate": 3, "epochs": "$@rate * 2"},
        {"targets": {"handedness": ["L", "R"]}, "loss": {"_target_": "DiceLoss", "jaccard": True}},
        {"train": {**CONTENT["train"], "other": 3}, "epochs": "$@train#other"},
    ],
)
def test_whatever_has_an_effect_is_taken(given: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", CONTENT)
    assert wrong_ids({**CONTENT, **given}, [tmp_path / "train.json"], are_named=True) == []


def test_ids_of_an_overlay_are_taken(tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", CONTENT)
    write_json(tmp_path / "mine.json", {"note": "abc", "+initialize": [], "loss#gamma": 2, "init": "x_scratch"})
    files = [str(tmp_path / name) for name in ("train.json", "mine.json")]
    monai.bundle.run(config_file=files, meta_file=[], loss={"_target_": "DiceLoss"}, tracking_uri="x")
    said = refusal(lambda: monai.bundle.run(config_file=files[:1], meta_file=[], note="abc", init="x_scratch"))
    assert "--note" in said and "add configs/x_scratch.json" in said


def test_an_overlay_that_undoes_an_earlier_one_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overlays: dict[str, dict[str, Any]] = {
        "train": CONTENT,
        "part": {"suffix": "_part", "loss#gamma": 2, "epochs": 5, "+run": [1]},
        "block": {"suffix": "_block", "loss": {"_target_": "DiceLoss"}, "+run": [2]},
        "size": {"epochs": 1},
    }
    for name, content in overlays.items():
        write_json(tmp_path / f"{name}.json", content)

    def files(*names: str) -> list[Path]:
        return [tmp_path / f"{name}.json" for name in names]

    assert undone_parts(files("train", "block", "part")) == []
    assert not caplog.records
    row = ("loss#gamma in part.json", "block.json replaces loss; name block.json before part.json")
    assert undone_parts(files("train", "part", "block")) == [row]
    monai.bundle.run(config_file=[str(path) for path in files("train", "block", "part", "size")], meta_file=[])
    said = [message for message in caplog.messages if "another value" in message]
    assert said == ["epochs: size.json has another value than part.json, and is the later one"]
    wrong = [str(path) for path in files("train", "part", "block")]
    assert "name block.json before part.json" in refusal(lambda: monai.bundle.run(config_file=wrong, meta_file=[]))


def test_every_training_refuses_what_does_nothing() -> None:
    """By ``monai.bundle run`` the files are known by name; a workflow in Python knows their folder."""
    files = [str(CONFIGS / name) for name in ("train.json", "tiny.json")]
    wrong: dict[str, Any] = {"epoch": 3, "allow_leak": "false", "init": "swin_scratch"}
    said = refusal(lambda: monai.bundle.run(config_file=files, **wrong))
    assert "no such id in train.json, tiny.json; did you mean --epochs?" in said
    assert "--allow_leak" in said and "add configs/swin_scratch.json" in said
    said = refusal(ConfigWorkflow(config_file=files, logging_file=False, **wrong).initialize)
    assert "--epoch " in said and "--allow_leak" in said
    ConfigWorkflow(config_file=files[0], logging_file=False, swin_depths=[1]).initialize()  # tiny.json is beside it


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("bundles/*/configs/*.json")), ids=lambda path: "-".join(path.parts[-3::2])
)
def test_every_config_looks_at_its_ids(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if '"initialize": [' in text and '"+initialize"' not in text:
        assert "volta.prepare_tracking()" in text or "volta.check_ids()" in text
