# SPDX-License-Identifier: Apache-2.0
"""GMML, group masked model learning: masks and their filling (paper, section II-B)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from volta_components.errors import InputError

VISIBLE, ZEROS, NOISE = 0, 1, 2


@dataclass(eq=False)
class GroupMask:
    """Random boxes until a share of the voxels is covered; each box is filled with zeros or with noise.

    Boxes are drawn on a grid of cells, on the host, where placing a box costs next to nothing; the grid is then
    enlarged on the device. MONAI's ``RandCoarseDropout`` places a fixed number of boxes, whatever they cover.

    Attributes:
        coverage: share of the voxels to be covered at least, in (0, 1); 0.5 in the paper.
        min_side: smallest box side as a share of the volume's side.
        max_side: largest box side as a share of the volume's side, in (0, 1].
        noise_share: chance that a box holds noise rather than zeros.
        cell: voxels along each axis to which box faces are aligned; 1 for any position, the patch size to mask
            whole patches.

    Raises:
        InputError: if a share is out of range.

    Source: box sizes from MC-SSL (Atito et al., 2021).
    """

    coverage: float = 0.5
    min_side: float = 0.05
    max_side: float = 0.3
    noise_share: float = 0.5
    cell: int | Sequence[int] = 4

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise InputError(f"mask coverage {self.coverage} is not between 0 and 1")
        if not 0 < self.min_side <= self.max_side <= 1:
            raise InputError(f"mask box sides {self.min_side} to {self.max_side} are not within (0, 1]")
        if not 0 <= self.noise_share <= 1:
            raise InputError(f"mask noise_share {self.noise_share} is not within [0, 1]")
        self._cell = (self.cell,) * 3 if isinstance(self.cell, int) else tuple(self.cell)

    def draw(self, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """Labels (``VISIBLE``, ``ZEROS``, ``NOISE``) of the ``ceil(shape / cell)`` cells of a volume, uint8.

        Raises:
            InputError: if a single cell is already larger than the largest box.
        """
        if any(self.max_side * side < cell for side, cell in zip(shape, self._cell, strict=True)):
            raise InputError(
                f"mask cells of {'x'.join(map(str, self._cell))} voxels are larger than the largest box, "
                f"{self.max_side:g} of a crop of {'x'.join(map(str, shape))}; set a smaller mask_cell"
            )
        counts = [-(-side // cell) for side, cell in zip(shape, self._cell, strict=True)]
        # The last cell of an axis may stick out of the volume: weigh each by the voxels it really holds.
        extents = [
            np.minimum(cell, side - cell * np.arange(count))
            for side, cell, count in zip(shape, self._cell, counts, strict=True)
        ]
        weights = extents[0][:, None, None] * extents[1][None, :, None] * extents[2][None, None, :]
        largest = [int(self.max_side * side // cell) for side, cell in zip(shape, self._cell, strict=True)]
        smallest = [
            min(big, max(1, round(self.min_side * side / cell)))
            for side, cell, big in zip(shape, self._cell, largest, strict=True)
        ]
        labels = np.zeros(counts, dtype=np.uint8)
        enough, largest_cell = self.coverage * float(np.prod(shape)), int(np.prod(self._cell))
        # Boxes may overlap. Counting covered voxels is slow, so it waits until the boxes' volumes could be enough.
        at_most = 0
        while True:
            for (a, b, c), (x, y, z), is_noise in self._draw_boxes(smallest, largest, counts, rng):
                labels[x : x + a, y : y + b, z : z + c] = NOISE if is_noise else ZEROS
                at_most += a * b * c * largest_cell
                if at_most >= enough:
                    at_most = int(weights[labels != VISIBLE].sum())
                    if at_most >= enough:
                        return labels

    def _draw_boxes(
        self, smallest: Sequence[int], largest: Sequence[int], counts: Sequence[int], rng: np.random.Generator
    ) -> Iterator[tuple[list[int], list[int], bool]]:
        """Sides and starts in cells, and the filling, of many boxes at once: one by one is slow."""
        many = 256
        sides = rng.integers(smallest, np.asarray(largest) + 1, size=(many, 3))
        starts = rng.integers(0, np.asarray(counts) - sides + 1)
        is_noise = rng.random(many) < self.noise_share
        return zip(sides.tolist(), starts.tolist(), is_noise.tolist())

    def enlarge(self, labels: Tensor, shape: Sequence[int]) -> Tensor:
        """Labels of voxels ``[D, H, W]`` (uint8) from labels of cells, on their device."""
        volume = labels
        for axis, cell in enumerate(self._cell):
            if cell > 1:
                volume = volume.repeat_interleave(cell, dim=axis)
        return volume[tuple(slice(0, side) for side in shape)]

    @staticmethod
    def fill(image: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """Replace what is masked in images ``[..., D, H, W]`` in [0, 1]; three deviations of the noise span [0, 1]."""
        filling = (noise / 6.0).add_(0.5).clamp_(0.0, 1.0).masked_fill_(labels == ZEROS, 0.0)
        return torch.where(labels == VISIBLE, image, filling)
