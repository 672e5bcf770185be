# SPDX-License-Identifier: Apache-2.0
"""What the values of a config's ids must be: whole numbers, shares, sizes, devices."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from volta_components.training.record import callers


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_in(text: str) -> Callable[[Any], bool]:
    """A test for an interval, such as ``(0, 1]``."""
    low, high = map(float, text[1:-1].split(","))
    lower, upper = (low, text[0] == "["), (high, text[-1] == "]")
    return lambda value: (
        _is_number(value)
        and (value > lower[0] or (lower[1] and value == lower[0]))
        and (value < upper[0] or (upper[1] and value == upper[0]))
    )


def _is_three(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) == 3 and all(map(each, value))


def _are_different(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(set(map(str, value))) == len(value) > 1


def _is_device(value: Any) -> bool:
    try:
        device = torch.device(value)
        return (device.index or 0) < int(getattr(torch, device.type).device_count())
    except (AttributeError, RuntimeError, TypeError):  # a kind of devices that is not computed on, such as meta
        return False


_whole, _count, _above, _least = _is_whole(0), _is_whole(1), _is_in("(0, inf)"), _is_in("[0, inf)")

# What a value must be, in words and as a test, and the ids that it holds for. None is what a file may have.
KINDS: Sequence[tuple[str, Callable[[Any], bool], tuple[str, ...]]] = (
    (
        "a whole number of at least 1",
        _count,
        (
            *("epochs", "batch_size", "accumulation_steps", "crops_per_volume", "val_interval", "picture_interval"),
            *("log_interval", "heads_per_epoch", "window_batch_size", "num_layers", "num_heads", "summary_heads"),
            *("hidden_size", "mlp_dim", "feature_size"),
        ),
    ),
    (
        "a whole number of at least 0",
        _whole,
        (
            *("seed", "num_workers", "frozen_epochs", "unfrozen_blocks", "frozen_last_layer_epochs", "num_local"),
            *("collapse_grace_epochs", "collapse_patience_epochs", "show_all_below", "validation_fold"),
        ),
    ),
    ("a whole number of at least 0, or 'all'", lambda value: value == "all" or _whole(value), ("fold",)),
    ("a share above 0 and at most 1", _is_in("(0, 1]"), ("fraction", "encoder_rate", "layer_decay")),
    ("a share of at least 0 and below 1", _is_in("[0, 1)"), ("validation_fraction", "window_overlap")),
    (
        "a share between 0 and 1",
        _is_in("[0, 1]"),
        (
            *("augment_probability", "flip_probability", "foreground_share", "mask_coverage", "mask_noise_share"),
            *("skull_share", "mirrored_share", "augment_zoom"),
        ),
    ),
    ("between 0 and 1, or 'youden'", lambda value: value == "youden" or _is_in("[0, 1]")(value), ("threshold",)),
    (
        "a number of at least 0",
        _least,
        (
            # At a learning rate of 0, a pretraining writes an encoder that has learned nothing: a control.
            *("learning_rate", "final_learning_rate", "weight_decay", "warmup_epochs", "checkpoint_minutes"),
            *("clip_norm", "augment_noise"),
            *("augment_rotation_degrees", "augment_translation_mm", "teacher_temperature_epochs"),
        ),
    ),
    ("a number above 0, in mm, or three", lambda value: _above(value) or _is_three(_above)(value), ("spacing",)),
    (
        "three whole numbers of at least 1, such as [96, 96, 96]",
        _is_three(_count),
        ("volume_size", "image_size", "patch_size", "global_size", "local_size"),
    ),
    ("three numbers above 0, in mm", _is_three(_above), ("input_extent_mm", "global_extent_mm")),
    (
        "two different values, such as ['CN', 'AD']",
        lambda value: _are_different(value) and len(value) == 2,
        ("classes",),
    ),
    ("different names, such as ['healthy', 'AD']", _are_different, ("class_names",)),
    (
        "a text; of digits, in two kinds of quotes (\"'7'\")",
        lambda value: isinstance(value, (str, os.PathLike)),
        (
            *("suffix", "label_key", "dataset_dir", "datalist_path", "encoder_path", "ckpt_dir", "output_dir"),
            "model_path",
        ),
    ),
    ("'cpu', or 'cuda:N' of a GPU that is there", _is_device, ("device", "render_device")),
)
RULES = {name: (words, test) for words, test, names in KINDS for name in names}
# The pretraining's weight decay.
PAIR = "two numbers of at least 0, at the beginning and at the end, such as [0.04, 0.04]"


def wrong_values(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows (id, its value and what it must be) of a config's ids; expressions and references are not followed."""
    rows = []
    for name, value in config.items():
        if name not in RULES or value is None or (isinstance(value, str) and re.match("[$@%]", value)):
            continue
        words, test = RULES[name]
        if name == "weight_decay" and config.get("bundle") == "pretrain":
            words, test = (
                PAIR,
                lambda pair: isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_least, pair)),
            )
        if not test(value):
            rows.append((f"--{name}", f"{value!r}: must be {words}"))
    classes, names = (config.get(name, ()) for name in ("classes", "class_names"))
    if _are_different(classes) and _are_different(names) and len(names) != len(classes):
        rows.append(("--class_names", f"{names!r}: must be one name for each of the classes, {classes!r}"))
    first, last = (config.get(name, -1) for name in ("learning_rate", "final_learning_rate"))
    if _least(first) and _least(last) and last > first:
        rows.append(("--final_learning_rate", f"{last!r}: must be no more than the learning_rate, {first!r}"))
    return rows


def given_as_none(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows (id, what happens) of what ``monai.bundle run`` was given as None: MONAI leaves the file's value."""
    for frame in callers():
        given = frame.f_locals.get("override")
        if frame.f_code.co_name == "run" and isinstance(given, Mapping):
            return [
                (f"--{name}", f"None leaves it at {config[name]!r}; leave the option out, or write '$None'")
                for name, value in given.items()
                if value is None and config.get(name) is not None
            ]
    return []
