# SPDX-License-Identifier: Apache-2.0
"""The commands `volta3d embed` and `volta3d segment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volta_components.errors import InputError
from volta_components.inference.bundles import (
    check_device,
    check_weights,
    config_files,
    find_bundle,
    make_workflow,
    plain_errors,
)
from volta_components.inference.given import choose_scans, expand_source
from volta_components.inference.scans import find_volumes, result_root


def embed(
    source: str | Sequence[str],
    output: str,
    *,
    bundle: str | None = None,
    overlays: str | Sequence[str] | None = None,
    weights: str | None = None,
    attention: bool = False,
    device: str | None = None,
    skip_bad: bool = False,
) -> int:
    """Turn scans into embeddings: embeddings.csv and embeddings.npz, a row for each scan.

    Scans may have any orientation and spacing. Started again, with scans added or after a break, it goes on with those
    that are not done. Exit status: 0 done, 2 nothing could be done.

    Args:
        source: a folder (scans or DICOM series), a scan, a datalist, a pattern in quotes such as
            'bids/**/*_acq-iso_T1w.nii.gz', or several of these separated by commas. Of a BIDS folder, its T1w scans.
        output: folder of the results.
        bundle: folder of the pretrained bundle, as downloaded; bundles/pretrain by default.
        overlays: further configuration files, separated by commas, merged last: names in the bundle's configs, or
            paths; tiny for the quick start's models.
        weights: an exported encoder instead of the bundle's own.
        attention: also write where the summary looks, as NIfTI on the scan's own grid, mean 1.
        device: cuda:0, cpu, ...; by default the first GPU, or the CPU.
        skip_bad: leave out scans that cannot be used instead of ending there.
    """
    root = find_bundle(bundle, "bundles/pretrain", ("type", "feature"))
    settings = {"save_attention": bool(attention), **_weights("encoder_path", weights)}
    target, items = _apply(root, source, output, overlays, device, skip_bad, settings)
    print(f"{len(items)} embeddings in {target / 'embeddings.csv'} and .npz")
    return 0


def segment(
    source: str | Sequence[str],
    output: str,
    *,
    bundle: str | None = None,
    overlays: str | Sequence[str] | None = None,
    weights: str | None = None,
    device: str | None = None,
    skip_bad: bool = False,
) -> int:
    """Outline both hippocampi: NAME_hippocampus.nii.gz on each scan's own grid (1 left, 2 right), and volumes.csv.

    Scans may have any orientation and spacing. Started again, with scans added or after a break, it goes on with those
    that are not done. Exit status: 0 done, 2 nothing could be done.

    Args:
        source: a folder (scans or DICOM series), a scan, a datalist, a pattern in quotes such as
            'bids/**/*_acq-iso_T1w.nii.gz', or several of these separated by commas. Of a BIDS folder, its T1w scans.
        output: folder of the results.
        bundle: folder of the segmentation bundle, as downloaded; bundles/harp_hippocampus by default.
        overlays: further configuration files, separated by commas, merged last: names in the bundle's configs, or
            paths; tiny for the quick start's models.
        weights: a trained model instead of the bundle's own.
        device: cuda:0, cpu, ...; by default the first GPU, or the CPU.
        skip_bad: leave out scans that cannot be used instead of ending there.
    """
    root = find_bundle(bundle, "bundles/harp_hippocampus", ("format", "segmentation"))
    _apply(root, source, output, overlays, device, skip_bad, _weights("model_path", weights))
    return 0


def _weights(name: str, given: str | None) -> dict[str, str]:
    """The id of a config that names weights, if they are given."""
    if given is None:
        return {}
    path = Path(str(given)).expanduser()
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file")
    return {name: str(path.absolute())}


def _apply(
    root: Path,
    source: str | Sequence[str],
    output: str,
    overlays: str | Sequence[str] | None,
    device: str | None,
    skip_bad: bool,
    settings: Mapping[str, Any],
) -> tuple[Path, list[dict[str, Any]]]:
    """Run the bundle's inference on scans; the output folder, and the items of the scans."""
    files = config_files(root, overlays)
    target = Path(str(output)).expanduser().resolve()
    changes: dict[str, Any] = {"bundle_root": str(root), "output_dir": str(target), **settings}
    if device is not None:
        changes["device"] = f"$torch.device({check_device(str(device))!r})"
    parts = expand_source(source, target)
    with plain_errors():
        workflow = make_workflow(files, changes)
        check_weights(workflow)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{target}: cannot write there ({error.strerror}); choose another --output") from error
        chosen = choose_scans(parts, target, skip_bad)
        if common := result_root(chosen):
            print(f"file names are not unique: results lie in folders like those of the scans below {common}")
        # Absolute paths as plain text: nothing in them is taken for a config's expression or reference.
        workflow.parser["source"] = [str(path) for path in chosen]
        workflow.parser["check_volumes"] = False
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    return target, find_volumes(chosen)
