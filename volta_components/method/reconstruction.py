# SPDX-License-Identifier: Apache-2.0
"""Reconstruction of what is masked (paper, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReconstructionLoss(nn.Module):
    """Mean squared error over the masked voxels only (eq. 1): a mean within each crop, then over crops.

    MONAI's ``MaskedLoss`` averages over all voxels and over the batch at once, which would weigh crops by how much
    of them is masked.

    Args:
        everywhere: whether visible voxels count as well. Where another picture than the student's own is restored,
            these have to be translated too. Not in the paper.

    Shapes:
        reconstruction, image, masked: ``[V, C, D, H, W]``; ``masked`` is true where the input was replaced.

    Source: VolTA-3D eq. 1.
    """

    def __init__(self, everywhere: bool = False) -> None:
        super().__init__()
        self.everywhere = everywhere

    def forward(self, reconstruction: Tensor, image: Tensor, masked: Tensor) -> Tensor:
        """A scalar in units of squared intensity."""
        masked = torch.ones_like(masked) if self.everywhere else masked
        squared = (reconstruction.float() - image.float()).square() * masked
        per_crop = squared.flatten(1).sum(dim=1) / masked.flatten(1).sum(dim=1).clamp_min(1)
        return per_crop.mean()
