# SPDX-License-Identifier: Apache-2.0
"""A network that knows left from right, and heads in every orientation."""

from __future__ import annotations

import functools
import itertools

import nibabel as nib
import numpy as np
import torch
from labelled_scans import SIDE
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from volta_components.inference import commands

CUBE = [SIDE] * 3
# The 48 ways to store a volume: each order of the axes, each in either direction.
ORIENTATIONS = [
    np.array(list(zip(order, signs)))
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SHAPE = {"isotropic": (36, 40, 34), "anisotropic": (42, 38, 24), "oblique": (40, 38, 30)}
SPACING = {"isotropic": (1.0, 1.0, 1.0), "anisotropic": (0.9, 1.1, 1.7), "oblique": (1.0, 1.1, 1.3)}


class BrightSides(nn.Module):
    """Knows left and right as trained networks do, by the first axis of the prepared volume: what is bright there."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.7))

    def forward(self, image: Tensor) -> Tensor:
        place = torch.arange(image.shape[2], device=image.device) + 0.5
        is_left = (place < image.shape[2] / 2).view(1, 1, -1, 1, 1)
        bright = image > self.threshold
        left, right = bright & is_left, bright & ~is_left
        return 20.0 * torch.cat([~bright, left, right], dim=1).float()


def affine_of(kind: str) -> np.ndarray:
    """RAS or, for ``oblique``, turned by up to 15 degrees about each axis; the world's origin is in the middle."""
    turn = Rotation.from_euler("xyz", (9, -12, 15), degrees=True).as_matrix() if kind == "oblique" else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(SPACING[kind])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE[kind]) - 1) / 2)
    return affine


def image_of(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return image


# The networks here are no part of VolTA-3D's own bundles.
embed, segment = (functools.partial(command, trust=True) for command in (commands.embed, commands.segment))
