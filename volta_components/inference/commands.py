# SPDX-License-Identifier: Apache-2.0
"""The commands ``volta3d embed`` and ``volta3d segment``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from volta_components.errors import InputError


def embed(
    source: Sequence[Path | str],
    output: Path | str,
    *,
    bundle: Path | str | None = None,
    overlays: Sequence[str] = (),
    weights: Path | str | None = None,
    attention: bool = False,
    device: str | None = None,
    skip_bad: bool = False,
    assume_orientation: str | None = None,
    trust: bool = False,
    follow_links: bool = False,
) -> int:
    """Turn scans into embeddings: embeddings.csv and embeddings.npz, with a row for each scan.

    Scans may have any orientation and spacing. An interrupted command, or one that is given more scans, does only what
    is missing. Tables keep the scans of earlier commands with the same output.

    Args:
        source: Folders (of scans, or of DICOM series), scans, datalists, or patterns in quotes such as
            'bids/**/*_acq-iso_T1w.nii.gz'. Of a BIDS folder, its T1w scans.
        output: Folder of the results.
        bundle: Folder of the pretrained bundle, as downloaded; bundles/pretrain by default.
        overlays: More configuration files, merged last: names in the bundle's configs, or paths. "tiny" for the models
            of the quick start.
        weights: An exported encoder instead of the bundle's own.
        attention: Also write where the summary looks, as NIfTI on the grid of the scan, with mean 1.
        device: Such as cuda:0 or cpu; by default the first GPU, or else the CPU.
        skip_bad: Leave out scans that cannot be used, instead of ending there.
        assume_orientation: Axis codes such as RAS for scans whose header has none; without it these are errors.
        trust: Run a bundle whose configs run what none of VolTA-3D's own bundles runs; without it, that is listed.
        follow_links: Also take scans by links that leave a folder of the source. Without it these are errors; links of
            git-annex and DataLad into their data set are always followed.

    Returns:
        0.

    Raises:
        InputError: if bundle, weights or scans cannot be used.
    """
    changes = {"save_attention": attention, **_weights("encoder_path", weights)}
    # Here, since it imports torch: help and mistakes should not wait for it.
    from volta_components.inference.apply import apply_bundle, find_bundle

    root = find_bundle(bundle, "bundles/pretrain", ("type", "feature"), trust)
    apply_bundle(root, source, Path(output), overlays, device, skip_bad, assume_orientation, changes, follow_links)
    return 0


def segment(
    source: Sequence[Path | str],
    output: Path | str,
    *,
    bundle: Path | str | None = None,
    overlays: Sequence[str] = (),
    weights: Path | str | None = None,
    device: str | None = None,
    skip_bad: bool = False,
    assume_orientation: str | None = None,
    trust: bool = False,
    follow_links: bool = False,
) -> int:
    """Outline both hippocampi: NAME_hippocampus.nii.gz on the grid of each scan (1 left, 2 right), and volumes.csv.

    Scans may have any orientation and spacing. An interrupted command, or one that is given more scans, does only what
    is missing. Tables keep the scans of earlier commands with the same output.

    Args:
        source: Folders (of scans, or of DICOM series), scans, datalists, or patterns in quotes such as
            'bids/**/*_acq-iso_T1w.nii.gz'. Of a BIDS folder, its T1w scans.
        output: Folder of the results.
        bundle: Folder of the segmentation bundle, as downloaded; bundles/harp_hippocampus by default.
        overlays: More configuration files, merged last: names in the bundle's configs, or paths. "tiny" for the models
            of the quick start, "starter" for the small model that ships. A bundle without a trained model of its own
            uses that one.
        weights: A trained model instead of the bundle's own.
        device: Such as cuda:0 or cpu; by default the first GPU, or else the CPU.
        skip_bad: Leave out scans that cannot be used, instead of ending there.
        assume_orientation: Axis codes such as RAS for scans whose header has none; without it these are errors.
        trust: Run a bundle whose configs run what none of VolTA-3D's own bundles runs; without it, that is listed.
        follow_links: Also take scans by links that leave a folder of the source. Without it these are errors; links of
            git-annex and DataLad into their data set are always followed.

    Returns:
        0.

    Raises:
        InputError: if bundle, weights or scans cannot be used.
    """
    changes = _weights("model_path", weights)
    # Here, since it imports torch: help and mistakes should not wait for it.
    from volta_components.inference.apply import apply_bundle, find_bundle

    root = find_bundle(bundle, "bundles/harp_hippocampus", ("format", "segmentation"), trust)
    starter = root / "models" / "model_starter.pt"
    if not overlays and weights is None and starter.is_file() and not (root / "models" / "model.pt").is_file():
        overlays = ("starter",)
        print(
            f"{starter.name}: the small model that ships, trained on synthetic heads alone and never scored on manual "
            "labels; look at each mask, and do not use it for patients"
        )
    apply_bundle(root, source, Path(output), overlays, device, skip_bad, assume_orientation, changes, follow_links)
    return 0


def _weights(name: str, given: Path | str | None) -> dict[str, str]:
    """The id of a config that names weights, if they are given."""
    if given is None:
        return {}
    if not Path(given).is_file():
        raise InputError(f"--weights {given}: no such file")
    return {name: str(Path(given).absolute())}
