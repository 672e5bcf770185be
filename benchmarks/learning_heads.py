# SPDX-License-Identifier: Apache-2.0
"""A lever of ``learning.py`` that is no option of the package: projection heads apart for summary and patch tokens."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from volta_components.method.projection import ProjectionHead, TokenLogits


class SeparateHeads(ProjectionHead):
    """Summary and patch tokens share no layer, not even the MLP; iBOT (Zhou et al., 2022) compares both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patch_mlp = copy.deepcopy(self.mlp)
        for module in self.patch_mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def patches(self, tokens: Tensor) -> TokenLogits:
        """Logits of patch tokens ``[B, N, D]``."""
        weight = self.patch_last_layer.weight
        assert isinstance(weight, Tensor)
        unit = nn.functional.normalize(self.patch_mlp(tokens).float(), dim=-1, eps=1e-6)
        return TokenLogits(unit, weight)
