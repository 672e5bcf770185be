# SPDX-License-Identifier: Apache-2.0
"""Runs a bundle's inference on scans as they are: what ``volta3d embed`` and ``volta3d segment`` have in common."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from volta_components.data.geometry import axis_codes
from volta_components.downstream.inits import find_overlay
from volta_components.errors import InputError, find_input_error
from volta_components.files import read_json
from volta_components.inference.given import choose_scans, expand_source
from volta_components.inference.scans import find_volumes, result_root
from volta_components.inference.trust import check_trust


def find_bundle(given: Path | str | None, default: str, output: tuple[str, str], trust: bool) -> Path:
    """A bundle's folder, absolute; one whose metadata say that it gives something else is refused.

    So is, unless it is trusted, one that runs what none of the project's own bundles runs; see ``check_trust``.
    """
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
    root = root.resolve()
    check_trust(root, trust)
    return root


def apply_bundle(
    root: Path,
    source: Sequence[Path | str],
    output: Path,
    overlays: Sequence[str],
    device: str | None,
    skip_bad: bool,
    assume_orientation: str | None,
    settings: Mapping[str, Any],
    follow_links: bool = False,
) -> int:
    """Run a bundle's ``inference.json`` on scans; how many are done, now or before.

    ``settings`` are ids of the config to change; the rest are the options of ``volta3d segment``.

    Raises:
        InputError: if the bundle, its weights, the output or, without ``skip_bad``, a scan cannot be used.
    """
    configs = root / "configs"
    files = [configs / "inference.json", *(find_overlay(configs, name) for name in overlays)]
    target = output.resolve()
    changes: dict[str, Any] = {"bundle_root": str(root), "output_dir": str(target), **settings}
    codes = axis_codes(assume_orientation)
    if codes is not None:
        changes["assume_orientation"] = codes
    if device is not None:
        _check_device(device)
        changes["device"] = f"$torch.device({device!r})"
    parts = expand_source(source, target)
    with _plain_errors():
        workflow = ConfigWorkflow(
            config_file=list(map(str, files)), logging_file=False, workflow_type="infer", **changes
        )
        _check_weights(workflow)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{target}: cannot write there ({error.strerror}); choose another --output") from error
        chosen = choose_scans(parts, target, skip_bad, codes, follow_links)
        if common := result_root(chosen):
            print(f"file names are not unique: results are written to folders like those of the scans below {common}")
        # Absolute paths as plain text: nothing in them is taken for a config's expression or reference.
        workflow.parser["source"] = [str(path) for path in chosen]
        workflow.parser["check_volumes"] = False
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    return len(find_volumes(chosen))


@contextmanager
def _plain_errors() -> Iterator[None]:
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


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: cannot be used here ({reason}); try --device cpu") from error


def _check_weights(workflow: ConfigWorkflow) -> None:
    """Miss the weights before the scans are read."""
    for name in ("model_path", "encoder_path"):
        if name in workflow.parser and not Path(str(workflow.parser.get_parsed_content(name))).is_file():
            raise InputError(
                f"{workflow.parser.get_parsed_content(name)}: no such weights; train the bundle first, download one "
                "with weights (--bundle DIR), or add --overlays tiny for the quick start's"
            )
