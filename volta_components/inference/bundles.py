# SPDX-License-Identifier: Apache-2.0
"""Opens a bundle for inference."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from volta_components.downstream.inits import find_overlay
from volta_components.errors import InputError, find_input_error
from volta_components.files import read_json


def find_bundle(given: Path | str | None, default: str, output: tuple[str, str]) -> Path:
    """A bundle's folder, absolute; one whose metadata say that it gives something else is refused."""
    root = Path(given or default)
    if given is None and not root.is_dir() and Path("configs/inference.json").is_file():
        root = Path()  # run from within a bundle
    config = root / "configs" / "inference.json"
    if not config.is_file():
        raise InputError(
            f"{config}: no such bundle; give its folder (--bundle DIR), download one (python -m monai.bundle "
            "download), copy those of the package here (volta3d init .), or run from the repository's root"
        )
    meta = config.with_name("metadata.json")
    key, wanted = output
    try:
        found = read_json(meta)["network_data_format"]["outputs"]["pred"][key]
    except (KeyError, TypeError) as error:
        raise InputError(f"{meta}: does not say what the bundle's network gives; fetch the bundle again") from error
    if found != wanted:
        raise InputError(
            f"{root}: its network gives {key} {found!r} instead of {wanted!r}; give another --bundle "
            f"(its own task: python -m monai.bundle run --config_file {config})"
        )
    return root.resolve()


def config_files(root: Path, overlays: Sequence[str]) -> list[str]:
    """The bundle's ``inference.json`` and overlays, by name or path."""
    configs = root / "configs"
    return [str(configs / "inference.json"), *(str(find_overlay(configs, name)) for name in overlays)]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input as itself, not wrapped into what ``monai.bundle`` makes of it, nor said once more in a log."""
    hook = sys.excepthook
    logs = [logging.getLogger(name) for name in ("monai.bundle.workflows", "ignite")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause = find_input_error(error)
        if cause is None:
            raise
        raise cause from None
    finally:
        sys.excepthook = hook  # the configs set their own
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def check_device(device: str) -> str:
    """The device, if it can be used here."""
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: cannot be used here ({reason}); try --device cpu") from error
    return device


def make_workflow(files: Sequence[str], changes: Mapping[str, Any]) -> ConfigWorkflow:
    """MONAI's workflow of the bundle's inference."""
    return ConfigWorkflow(config_file=list(files), logging_file=False, workflow_type="infer", **changes)


def check_weights(workflow: ConfigWorkflow) -> None:
    """Miss the weights before the scans are read."""
    for name in ("model_path", "encoder_path"):
        if name in workflow.parser and not Path(str(workflow.parser.get_parsed_content(name))).is_file():
            raise InputError(
                f"{workflow.parser.get_parsed_content(name)}: no such weights; train the bundle first, download one "
                "with weights (--bundle DIR), or add --overlays tiny for the quick start's"
            )
