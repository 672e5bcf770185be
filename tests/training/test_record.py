# SPDX-License-Identifier: Apache-2.0
"""What a run was made from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from monai.bundle import ConfigParser

from volta_components import __version__
from volta_components.training.people import patient_key
from volta_components.training.record import (
    code_version,
    other_settings,
    provenance,
    run_settings,
    settings_of,
    shown_settings,
)

CONFIG: dict[str, Any] = {
    "_desc_": "an experiment",
    "imports": ["$from volta_components.training.record import run_settings"],
    "run_name": "first",
    "size": [8, 8],
    "rate": 0.1,
    "last_rate": "@rate",
    "half": "$@size[0] // 2",
    "network": {"_target_": "torch.nn.Linear", "in_features": "@half", "out_features": 2},
    "train": {
        "handlers": [
            {"_target_": "StatsHandler", "name": "train"},
            {"_target_": "my_package.Teacher", "_desc_": "follows", "momentum": 0.9},
        ],
        "data": [{"image": "/home/somebody/a.nii"}],
    },
    "settings": "$run_settings(half=@half, hash='abc')",
}


def test_provenance_tells_whom_an_encoder_has_seen_without_their_names() -> None:
    items = [{"patient_id": name, "session": str(i)} for i, name in enumerate(["sub-0002", "sub-0001", "sub-0002"])]
    record = provenance({"seed": 0}, "abc", iter(items), "phantom")
    assert (record["volumes"], record["cohort"]) == (3, "phantom")
    assert record["patient_ids"] == sorted({patient_key("sub-0001"), patient_key("sub-0002")})
    assert len(record["patient_ids"]) == 2
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in record["patient_ids"])
    assert "sub-0001" not in json.dumps(record)


def test_a_device_that_renders_other_noise_is_another_run() -> None:
    runs = [settings_of({"device": "cpu", "render_device": device}) for device in ("cpu", "cuda")]
    assert other_settings(*runs) == [("render_device", "cpu", "cuda")]


@pytest.mark.parametrize(
    ("cohorts", "name", "phantom"),
    [
        ((None, None), "phantom_pretrain", True),
        (("phantom", "Phantom_2"), "ours", True),
        (("phantom", "adni"), "phantom_and_adni", False),
        ((None,), "adni", False),
        ((), "phantom", False),
    ],
)
def test_provenance_says_whether_everybody_is_a_phantom(
    cohorts: tuple[str | None, ...], name: str, phantom: bool
) -> None:
    items = [
        {"patient_id": str(i)} | ({} if cohort is None else {"cohort": cohort}) for i, cohort in enumerate(cohorts)
    ]
    assert provenance({}, "abc", items, name)["phantom"] is phantom


def test_the_version_of_the_code_is_known() -> None:
    assert code_version().startswith(__version__)


def changed(**ids: Any) -> dict[str, Any]:
    parser = ConfigParser(json.loads(json.dumps(CONFIG)))
    parser.update({name.replace("__", "#"): value for name, value in ids.items()})
    return parser.get_parsed_content("settings")


def test_settings_are_all_that_a_config_says() -> None:
    assert changed() == {
        "size": [8, 8],
        "rate": 0.1,
        "last_rate": 0.1,
        "network.class": "torch.nn.Linear",
        "network.out_features": 2,
        "processes": 1,
        "half": 4,
        "hash": "abc",
        "config": {
            "imports": CONFIG["imports"],
            "network.in_features": "@half",
            "train.handlers.0.class": "my_package.Teacher",
            "train.handlers.0.momentum": 0.9,
            "train.data": settings_of(CONFIG)["config"]["train.data"],
        },
    }
    assert "somebody" not in str(changed())
    with pytest.raises(RuntimeError, match="expression in a config"):
        run_settings()


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        ({"size": [8, 4]}, "size"),
        ({"rate": 0.2}, "rate"),
        ({"last_rate": 0.0}, "last_rate"),
        ({"half": 3}, "half"),
        ({"another": {}}, "another"),
        ({"network__in_features": 4}, "network.in_features"),
        ({"network___target_": "torch.nn.Identity"}, "network.class"),
        ({"train__handlers__1__momentum": 0.5}, "train.handlers.0.momentum"),
        ({"train__data": [{"image": "b.nii"}]}, "train.data"),
    ],
)
def test_whatever_changes_a_result_changes_the_settings(ids: dict[str, Any], name: str) -> None:
    assert name in {row[0] for row in other_settings(changed(), changed(**ids))}


def test_names_comments_and_handlers_that_only_watch_change_nothing() -> None:
    watchers = [{"_target_": "ignite.handlers.ProgressBar"}, {"_target_": "MLFlowHandler", "tracking_uri": "x"}]
    handlers = [*watchers, *CONFIG["train"]["handlers"][1:]]
    same = changed(run_name=7, _desc_="other words", train__handlers=handlers, rate=0.1, last_rate=0.1)
    assert other_settings(changed(), same) == []


def test_a_run_is_resumed_with_or_without_a_recorded_graph() -> None:
    """As the error of a mini-batch that cannot be recorded advises."""
    plain = {"train": {"trainer": {"_target_": "VoltaTrainer", "amp": "@amp"}}}
    without = {"train": {"trainer": {**plain["train"]["trainer"], "cuda_graph": False}}}
    assert settings_of(plain) == settings_of(without)
    # Checkpoints from before it was harmless have it.
    old = settings_of(plain)
    old["config"]["train.trainer.cuda_graph"] = True
    assert other_settings(old, settings_of(without)) == []


def test_people_see_values_and_a_hash_of_the_rest() -> None:
    shown = shown_settings(changed())
    assert len(shown.pop("config")) == 12
    assert shown == {name: value for name, value in changed().items() if name != "config"}


def test_a_class_of_another_module_is_another_setting() -> None:
    """One of this package may move; a user's own of the same name is another class."""

    def of(target: str) -> dict[str, Any]:
        return settings_of({"loss": {"_target_": target}})

    assert of("volta_components.method.losses.DiCoMLoss") == of("volta_components.method.dicom.DiCoMLoss")
    assert other_settings(of("volta_components.method.losses.DiCoMLoss"), of("mine.DiCoMLoss"))
    assert other_settings(of("torch.optim.AdamW"), of("mine.AdamW"))


def test_null_is_not_the_same_as_absent() -> None:
    assert other_settings(settings_of({"a": 1}), settings_of({"a": 1, "foreach": None})) == [
        ("foreach", "None", "None")
    ]


def test_what_is_run_is_a_setting() -> None:
    assert other_settings(settings_of({"run": ["$@trainer.run()"]}), settings_of({"run": ["$1", "$@trainer.run()"]}))
