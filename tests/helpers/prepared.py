# SPDX-License-Identifier: Apache-2.0
"""A small prepared data set, and settings that make a bundle small enough for it.

A module rather than fixtures, since tests of several folders and child processes use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from volta_components.data.datalist import make_content
from volta_components.files import sha256_file, write_json

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "bundles" / "pretrain" / "configs"
SIDE = 32

# Sizes at which a run of the pretraining bundle takes a second or two.
TINY_SIZES: dict[str, Any] = {
    "volume_size": [SIDE] * 3,
    "patch_size": [16] * 3,
    "hidden_size": 32,
    "mlp_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "summary_heads": 4,
    "head_hidden_dim": 24,
    "head_bottleneck_dim": 8,
    "head_out_dim": 32,
    "global_size": [SIDE] * 3,
    "global_extent_mm": [SIDE] * 3,
    "local_size": [16] * 3,
    "local_side_mm": [12, SIDE],
    "num_local": 2,
    "translation_mm": 2,
    "mask_cell": 2,
}


def make_prepared(
    folder: Path, count: int = 12, folds: int = 3, shape: tuple[int, int, int] = (SIDE, SIDE, SIDE)
) -> Path:
    """Write volumes of ``shape`` at 1 mm in [0, 1] and their datalist, as ``volta3d prepare`` would.

    Smooth random anatomy; women's volumes are brighter, patients with AD have a dark centre, so that probes have
    something to find. Sex and diagnosis alternate, so that every fold holds both; the grid is shifted and shared.

    Returns:
        ``folder``, with ``datalist.json`` in it.
    """
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [-15.5, -20.0, 7.0]
    (folder / "images").mkdir(parents=True)
    axes = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    items = []
    for number in range(count):
        sex, diagnosis = "FM"[number % 2], ("CN", "AD")[number // 2 % 2]
        waves = sum(
            rng.normal() * np.cos(rng.uniform(1, 4) * axis + rng.uniform(0, 6)) for axis in axes for _ in range(2)
        )
        volume = 0.45 + 0.06 * waves + 0.1 * (sex == "F")
        centre = sum(axis**2 for axis in axes) < 0.15
        volume[centre] -= 0.2 * (diagnosis == "AD")
        subject = f"sub-{number:04d}"
        name = f"images/{subject}_ses-M000.nii"
        nib.save(nib.Nifti1Image(np.clip(volume, 0, 1).astype(np.float32), affine), folder / name)
        digest = sha256_file(folder / name)
        items.append(
            {
                "image": name,
                "subject_id": subject,
                "patient_id": subject,
                "session": "ses-M000",
                "site": "AB"[number // 4 % 2],
                "cohort": "fake",
                "sex": sex,
                "diagnosis": diagnosis,
                "age": 60.0 + number,
                "fold": number // 4 % folds,
                "source": name,
                "source_sha256": digest,
                "sha256": digest,
            }
        )
    write_json(folder / "datalist.json", make_content("fake", [1.0] * 3, list(shape), 0, folds, items, []))
    return folder
