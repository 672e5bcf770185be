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


def test_all_of_a_few_scans_are_shown_and_of_many_the_worst_median_and_best() -> None:
    assert shown_scans([0.3, 0.1, 0.2], 4) == {0, 1, 2}
    dices = [0.5 + 0.01 * ((8 * place) % 21) for place in range(21)]
    worst, median, best = (dices.index(value) for value in (min(dices), sorted(dices)[10], max(dices)))
    assert shown_scans(dices, 21) == {worst, median, best}
