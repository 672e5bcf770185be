# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on a CPU."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer
from torch import nn

from volta_components.downstream.amp import AmpInferer
from volta_components.errors import InputError


def test_products_are_of_numbers_rounded_to_bfloat16_and_losses_get_float32() -> None:
    """1 + 2**-9 and 1 + 2**-8 lie between numbers of bfloat16, which has 8 bits: both are rounded to 1."""
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1 + 2**-9)
    image = torch.tensor([[1 + 2**-8]])
    exact = AmpInferer(SimpleInferer(), amp=False)(image, network)
    assert exact.item() == pytest.approx((1 + 2**-9) * (1 + 2**-8), abs=1e-7)
    rounded = AmpInferer(SimpleInferer(), amp=True)(image, network)
    assert rounded.item() == 1.0 and rounded.dtype == torch.float32
    rounded.sum().backward()
    assert network.weight.grad is not None and network.weight.grad.dtype == torch.float32


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match=r"float16 is for GPUs.*--amp False"):
        AmpInferer(SimpleInferer(), amp=True, dtype=torch.float16)(torch.ones(1, 1), nn.Identity())
