# SPDX-License-Identifier: Apache-2.0
"""Patch tokens that show nothing but air take no part: an option of pretraining, off in ``train.json``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.blocks import TransformerBlock
from torch import Tensor
from torch.nn import functional

from volta_components.errors import InputError

CELL = 4  # voxels along each axis that are averaged, so that a bright voxel of noise is not tissue


@dataclass(eq=False)
class AirTokens:
    """Finds the patch tokens of crops under which the whole volume holds nothing but air.

    It looks at the volume before any intensity change and before masking, in the loader's workers. A token is kept if
    any cell of ``CELL`` voxels a side that its patch may touch is brighter than air; outside of the volume is air.

    Attributes:
        patch_size: voxels of a patch along each axis.
        below: mean intensity up to which a cell is air, in [0, 1); 0 for air that is exactly 0.

    Raises:
        InputError: if ``below`` is out of range.
    """

    patch_size: Sequence[int]
    below: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.below < 1:
            raise InputError(f"air below {self.below}: give a mean intensity in [0, 1), such as 0.05")

    def kept(self, volume: Tensor, levels: Tensor, readings: Tensor, size: Sequence[int]) -> Tensor:
        """Which tokens of n crops are kept, ``[n, N]``.

        Args:
            volume: ``[C, D, H, W]`` in [0, 1]; what one channel shows is kept.
            levels: those of the crops' ``CropPlan``.
            readings: those of the crops' ``CropPlan``.
            size: voxels of a crop along each axis.
        """
        means = functional.avg_pool3d(volume[None].float(), CELL, ceil_mode=True)[0].amax(dim=0)
        tissue = means.cpu().numpy() > self.below  # a volume may have been rendered on a GPU
        # Cells with tissue before each corner: a box's number follows from its eight corners.
        before = np.pad(tissue.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
        patch = np.asarray(self.patch_size)
        grid = [range(side // length) for side, length in zip(size, self.patch_size, strict=True)]
        half = (patch - 1) / 2
        middles = np.array(list(itertools.product(*grid))) * patch + half
        rows = []
        for level, reading in zip(levels.tolist(), readings.numpy(), strict=True):
            factor = 2**level
            # From the crop's voxels to the volume's edges: normalised -1 is the start of the first voxel.
            scale = np.ceil(np.asarray(volume.shape[1:]) / factor) * factor / 2
            matrix, shift = reading[::-1, :3] * scale[:, None], (reading[::-1, 3] + 1) * scale
            centre = middles @ matrix.T + shift
            reach = np.abs(matrix) @ half + 1.5 * factor  # a reading takes part of the voxels beside it
            low = np.clip(np.floor((centre - reach) / CELL), 0, tissue.shape).astype(int)
            high = np.clip(np.floor((centre + reach) / CELL) + 1, 0, tissue.shape).astype(int)
            count = np.zeros(len(middles), dtype=np.int64)
            for ends in itertools.product((0, 1), repeat=3):
                corner = tuple((high if end else low)[:, axis] for axis, end in enumerate(ends))
                count += (-1) ** (3 - sum(ends)) * before[corner]
            rows.append(torch.from_numpy(count > 0))
        return torch.stack(rows) if rows else torch.ones(0, math.prod(map(len, grid)), dtype=torch.bool)


class Kept(NamedTuple):
    """Which tokens of a mini-batch take part.

    Attributes:
        places: ``[n]``, places in the grid of those of the global crops, the same ones in every crop: what any of them
            keeps. ``None`` for all.
        in_locals: ``[L * B, N]``, true for those of the local crops, on the host. ``None`` for all.
    """

    places: Tensor | None = None
    in_locals: Tensor | None = None


def kept_of(masks: Mapping[str, Tensor] | None, device: torch.device) -> Kept:
    """What a mini-batch keeps, of what ``DrawViewsd`` found for each of its volumes; a crop of air keeps all.

    Args:
        masks: ``globals`` ``[B, 2, N]`` and ``locals`` ``[B, L, N]``, on the host.
        device: where the tokens are.
    """
    if masks is None:
        return Kept()
    in_any = masks["globals"].flatten(0, 1).any(dim=0)
    places = None if in_any.all() or not in_any.any() else in_any.nonzero()[:, 0]
    if places is not None:
        places = (places.pin_memory() if device.type == "cuda" else places).to(device, non_blocking=True)
    in_locals = masks["locals"].transpose(0, 1).flatten(0, 1)
    in_locals = in_locals | ~in_locals.any(dim=1, keepdim=True)
    return Kept(places, None if in_locals.all() else in_locals)


def packed_block(block: TransformerBlock, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """A transformer block on the tokens of several crops in one row ``[T, D]``; each crop attends to itself only.

    MONAI's block takes crops of one length; everything but the attention can be computed for all of them at once.

    Args:
        block: without dropout and cross-attention.
        tokens: of one crop after the other.
        lengths: tokens of each crop.
    """
    attention = block.attn
    parts = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
    attended = [
        functional.scaled_dot_product_attention(*own[:, None]).squeeze(0) for own in parts.split(list(lengths), dim=2)
    ]
    tokens = tokens + attention.out_proj(torch.cat(attended, dim=1).transpose(0, 1).flatten(1))
    return tokens + block.mlp(block.norm2(tokens))
