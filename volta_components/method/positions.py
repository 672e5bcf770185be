# SPDX-License-Identifier: Apache-2.0
"""Position embeddings on another token grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from volta_components.errors import InputError


def resample_position_embedding(embedding: Tensor, grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Resample a learned position embedding from one token grid to another (trilinear, ``align_corners=False``).

    Args:
        embedding: ``[1, N, D]`` with ``N = prod(grid)``.
        grid: token counts along each axis that the embedding was learned for.
        new_grid: token counts along each axis that are wanted.

    Returns:
        ``[1, prod(new_grid), D]``; the input itself when both grids are equal.

    Raises:
        InputError: if ``N`` is not ``prod(grid)``.
    """
    if embedding.shape[1] != math.prod(grid):
        raise InputError(
            f"position embedding of {embedding.shape[1]} tokens does not fit a grid of {'x'.join(map(str, grid))}; "
            "give the grid (image size / patch size) it was trained on"
        )
    if tuple(grid) == tuple(new_grid):
        return embedding
    volume = embedding.transpose(1, 2).reshape(1, -1, *grid)
    # float32: the CPU kernel has no bfloat16, and the cost is that of a few thousand tokens.
    volume = functional.interpolate(volume.float(), size=tuple(new_grid), mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(embedding.dtype)
