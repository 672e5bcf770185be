# SPDX-License-Identifier: Apache-2.0
"""Runs a bundle's inference on scans as they are: what ``volta3d embed`` and ``volta3d segment`` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volta_components.data.geometry import axis_codes
from volta_components.errors import InputError
from volta_components.inference.bundles import (
    check_device,
    check_weights,
    config_files,
    make_workflow,
    plain_errors,
)
from volta_components.inference.given import choose_scans, expand_source
from volta_components.inference.scans import find_volumes, result_root


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
    files = config_files(root, overlays)
    target = output.resolve()
    changes: dict[str, Any] = {"bundle_root": str(root), "output_dir": str(target), **settings}
    codes = axis_codes(assume_orientation)
    if codes is not None:
        changes["assume_orientation"] = codes
    if device is not None:
        changes["device"] = f"$torch.device({check_device(device)!r})"
    parts = expand_source(source, target)
    with plain_errors():
        workflow = make_workflow(files, changes)
        check_weights(workflow)
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
