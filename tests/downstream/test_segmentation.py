# SPDX-License-Identifier: Apache-2.0
"""Windows of a volume, and which scans are shown."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import SlidingWindowInferer

from volta_components.downstream.segmentation import FloatWindowInferer, shown_scans


def test_windows_are_added_up_in_float32_in_mixed_precision() -> None:
    """Windows that agree on every voxel: their weighted mean is what each of them says."""

    def network(image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, 2 * image - 1.003], dim=1).bfloat16()

    image = torch.rand(1, 1, 20, 24, 16, generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = {"roi_size": (16, 16, 16), "sw_batch_size": 3, "overlap": 0.5, "mode": "gaussian"}
    logits = FloatWindowInferer(**sizes)(image, network)
    assert isinstance(logits, torch.Tensor) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, network(image).float(), atol=1e-6, rtol=1e-6)
    rounded = SlidingWindowInferer(**sizes)(image, network)
    assert (rounded - network(image).float()).abs().max() > 1e-3  # type: ignore[operator]


def test_mirror_images_are_averaged_with_left_and_right_exchanged() -> None:
    def network(image: torch.Tensor) -> torch.Tensor:
        """Class 1 where it is bright on the left, class 2 on the right; and class 1 is seen a little better."""
        place = torch.arange(image.shape[2]).view(1, 1, -1, 1, 1)
        left = (place < image.shape[2] / 2).float()
        return torch.cat([0 * image, 3 * image * left, 1 * image * (1 - left)], dim=1)

    image = torch.rand(1, 1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = {"roi_size": (16, 8, 8), "sw_batch_size": 1, "overlap": 0.0}
    logits = FloatWindowInferer(**sizes, mirrored=True)(image, network)
    expected = torch.zeros(1, 3, 16, 8, 8)
    expected[:, 1, :8], expected[:, 2, 8:] = 2 * image[:, 0, :8], 2 * image[:, 0, 8:]
    torch.testing.assert_close(logits, expected)


def test_all_of_a_few_scans_are_shown_and_of_many_the_worst_median_and_best() -> None:
    assert shown_scans([0.3, 0.1, 0.2], 4) == {0, 1, 2}
    dices = [0.5 + 0.01 * ((8 * place) % 21) for place in range(21)]
    worst, median, best = (dices.index(value) for value in (min(dices), sorted(dices)[10], max(dices)))
    assert shown_scans(dices, 21) == {worst, median, best}
