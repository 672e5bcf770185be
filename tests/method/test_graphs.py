# SPDX-License-Identifier: Apache-2.0
"""What can be known of a recorded function without a GPU; test_gpu.py records and starts a whole step."""

from __future__ import annotations

import torch
from torch import Tensor

from volta_components.method.graphs import GraphedFunction


def test_a_smaller_last_batch_is_computed_by_the_function_itself() -> None:
    """Copied to where a whole batch was recorded, it would be repeated there in silence."""

    def scaled_sum(batch: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return (batch.sum() * factor,)

    graphed = GraphedFunction(scaled_sum)
    graphed._arguments = [torch.zeros(2, 3), torch.zeros(())]  # of a first call with two rows
    assert graphed([torch.ones(1, 3)], [2.0])[0] == 6.0
    assert not graphed._arguments[0].any()
