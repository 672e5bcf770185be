# SPDX-License-Identifier: Apache-2.0
"""Label maps of heads made of ellipsoids, in FreeSurfer's numbering."""

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (96, 112, 100)
CENTRES = {17: (28.0, 52.0, 40.0), 53: (67.0, 52.0, 40.0)}


def ellipsoid(centre, radii):
    """``SHAPE`` bool: voxels within."""
    axes = np.meshgrid(*(np.arange(n, dtype=float) for n in SHAPE), indexing="ij", sparse=True)
    return sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) <= 1


def toy_labels(seed: int = 0, skull: bool = True, scale: float = 1.0) -> np.ndarray:
    """A head of 96x112x100 mm; ``seed`` moves its structures a little, ``scale`` sets the hippocampi's size."""
    rng = np.random.default_rng(seed)
    middle = np.array([47.5, 55.0, 50.0])
    labels = np.zeros(SHAPE, np.int16)
    if skull:
        labels[ellipsoid(middle, (46, 54, 48))] = 511
        labels[ellipsoid(middle, (44, 52, 46))] = 507
        labels[ellipsoid(middle, (41, 49, 43))] = 515
    labels[ellipsoid(middle, (38, 46, 40))] = 24
    left = np.arange(SHAPE[0])[:, None, None] < middle[0]
    for radii, sides in (((35, 43, 37), (3, 42)), ((30, 38, 32), (2, 41))):
        inside = ellipsoid(middle, radii)
        labels[inside & left], labels[inside & ~left] = sides

    def both(centre, radii, sides):
        shift = rng.uniform(-1, 1, 3)
        for side, number in zip((-1, 1), sides, strict=True):
            place = middle + np.array(centre) * (side, 1, 1) + shift
            labels[ellipsoid(place, radii)] = number

    both((10, 2, 8), (5, 14, 7), (4, 43))
    both((9, -2, -2), (6, 8, 6), (10, 49))
    both((19.5, -3, -10), np.array((5, 13, 5.5)) * scale, (17, 53))
    both((19.5, 14, -10), (4, 4, 4), (18, 54))
    labels[ellipsoid(middle + np.array((0, -14, -26)), (8, 8, 14))] = 16
    return labels


def write_labels(path: Path, labels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a label map; RAS and 1 mm by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    stored = labels.astype(np.int32) if path.suffix == ".mgz" else labels
    nib.save(kind(stored, np.eye(4) if affine is None else affine), path)
    return path


def toy_folder(folder: Path, count: int = 3, skull: bool = True) -> Path:
    """A folder of toy label maps ``head-1.nii.gz`` ..."""
    for number in range(1, count + 1):
        write_labels(folder / f"head-{number}.nii.gz", toy_labels(number, skull))
    return folder
