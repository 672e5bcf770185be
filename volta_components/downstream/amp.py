# SPDX-License-Identifier: Apache-2.0
"""Mixed precision on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from volta_components.errors import InputError


class AmpInferer(Inferer):
    """Another inferer, in mixed precision on a CPU as well.

    With ``amp``, MONAI's trainers and evaluators open CUDA's autocast whatever the device is: on a CPU that does
    nothing but warn. On a GPU this class adds nothing to theirs.

    Args:
        inferer: is called with the network.
        amp: whether to use mixed precision.
        dtype: bfloat16; float16 would need its losses scaled, which is done on a GPU only.
    """

    def __init__(self, inferer: Inferer, amp: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.inferer = inferer
        self.amp = amp
        self.dtype = dtype

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the inferer gives; on a CPU in float32, so that losses are computed in it.

        Raises:
            InputError: for float16 on a CPU.
        """
        if not self.amp or inputs.device.type != "cpu":
            return self.inferer(inputs, network, *args, **kwargs)
        if self.dtype == torch.float16:
            raise InputError("amp_dtype float16 is for GPUs: on a CPU leave it at bfloat16, or say --amp False")
        with torch.autocast("cpu", dtype=self.dtype):
            return self.inferer(inputs, network, *args, **kwargs).float()
