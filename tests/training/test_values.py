# SPDX-License-Identifier: Apache-2.0
"""Values that MONAI would take, and train with or fail on."""

from __future__ import annotations

import json
from typing import Any

import monai.bundle
import pytest
import torch
from prepared import ROOT

from volta_components.errors import find_input_error
from volta_components.training.values import RULES, wrong_values

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fold", [1.0, True, -1, "one", NAN]),
        ("seed", [1.5, "abc", False]),
        ("epochs", [0, 2.5, "2"]),
        ("val_interval", [0]),
        ("num_workers", [-1]),
        ("fraction", [NAN, "abc", "0.5", 0, 1.1]),
        ("validation_fraction", [NAN, 1, -0.1]),
        ("augment_probability", [2, -0.5]),
        ("threshold", [2, "best", NAN]),
        ("learning_rate", [-1, "abc", NAN, float("inf")]),
        ("final_learning_rate", [-1]),
        ("weight_decay", [-1, NAN, [0, 1]]),
        ("warmup_epochs", [-1]),
        ("checkpoint_minutes", [NAN]),
        ("spacing", ["abc", 0, [1, 1], [1, 1, 0]]),
        ("image_size", [48, [48, 48], [48, 48, 0]]),
        ("input_extent_mm", [192, [192, 192, -1]]),
        ("device", ["cud", "cuda:99", "cpu:7", "meta", None.__class__]),
        ("classes", ["M", ["M"], ["M", "M"], ["CN", "MCI", "AD"]]),
        ("suffix", [7, None.__class__]),
        ("dataset_dir", [2024]),
        ("class_names", ["ab", ["a"], ["a", "a"]]),
    ],
)
def test_what_cannot_be_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        [(option, said)] = wrong_values({name: value})
        assert option == f"--{name}" and said.startswith(f"{value!r}: must be "), value


def test_what_can_be_is_taken() -> None:
    taken: dict[str, list[Any]] = {
        "fold": [0, "all", None, "$1"],
        "fraction": [1, 0.3, "@other"],
        "threshold": [0, 0.5, "youden", None],
        "device": ["cpu", torch.device("cpu"), "$volta.local_device()"],
        "image_size": [(48, 32, 16)],
        "weight_decay": [0],
        "learning_rate": [0, 0.1],
        "spacing": [1, [1, 1, 1.2]],
        "classes": [[0, 1], ("CN", "AD"), "$['CN', 'AD']"],
        "unknown": [-1],
    }
    assert not [value for name, values in taken.items() for value in values if wrong_values({name: value})]


def test_some_depend_on_others() -> None:
    assert wrong_values({"learning_rate": 0.1, "final_learning_rate": 0.1, "bundle": "pretrain"}) == []
    [(name, said)] = wrong_values({"learning_rate": 0.1, "final_learning_rate": 1})
    assert name == "--final_learning_rate" and "no more than the learning_rate, 0.1" in said
    # A rate of 0 alone would rise to the last one.
    assert len(wrong_values({"learning_rate": 0, "final_learning_rate": 1e-6})) == 1
    assert wrong_values({"learning_rate": 0, "final_learning_rate": 0}) == []
    [(name, said)] = wrong_values({"classes": ["M", "F"], "class_names": ["a", "b", "c"]})
    assert name == "--class_names" and "one name for each of the classes, ['M', 'F']" in said
    assert wrong_values({"bundle": "pretrain", "weight_decay": [0, 0.4]}) == []
    assert len(wrong_values({"bundle": "pretrain", "weight_decay": 0.4})) == 1


def test_the_shipped_configs_have_such_values_only() -> None:
    seen = set()
    for path in ROOT.glob("bundles/*/configs/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert not wrong_values({"bundle": path.parts[-3], **content}), path
        seen |= content.keys() & RULES.keys()
    assert seen == RULES.keys()  # no rule for an id that nothing has


@pytest.mark.parametrize("bundle", ["ixi_sex", "harp_hippocampus", "pretrain"])
def test_a_training_names_all_of_them_and_reads_nothing(bundle: str) -> None:
    files = [str(ROOT / "bundles" / bundle / "configs" / name) for name in ("train.json", "tiny.json")]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        monai.bundle.run(config_file=files, seed=1.5, learning_rate=-1, weight_decay=-1, batch_size=None)
    said = str(find_input_error(caught.value))
    assert "--seed" in said and "--learning_rate" in said and "--weight_decay" in said
    assert "--batch_size" in said and "leave the option out, or write '$None'" in said
