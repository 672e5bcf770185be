# SPDX-License-Identifier: Apache-2.0
"""Projection head: MLP, L2 normalisation, weight-normalised last layer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: the teacher's logits differ between subjects by less than either of them rounds."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class TokenLogits(NamedTuple):
    """Logits of patch tokens, not multiplied out: at the paper's size they would take 85 MB a network.

    Attributes:
        units: ``[..., d]``, a unit vector for each token.
        prototypes: ``[K, d]``, the last layer's weight; logits are ``units @ prototypes.T``.
        places: ``[n]``, which of the crops' tokens these are, where some are left out.
        total: tokens of a crop, with those left out.
    """

    units: Tensor
    prototypes: Tensor
    places: Tensor | None = None
    total: int = 0

    def rows(self, chosen: slice = slice(None)) -> Tensor:
        """Logits ``[rows, K]`` of some tokens, all crops' tokens being in one row."""
        with full_float32(self.units.device):
            return self.units.flatten(0, -2)[chosen].float() @ self.prototypes.T


class ProjectionHead(nn.Module):
    """Projection branch (paper, section II-B): MLP, L2 normalisation, weight-normalised linear layer.

    The MLP is shared by the summary and the patch tokens; each has its own last layer. The gain of the weight
    normalisation is frozen at 1, so that logits are cosines in [-1, 1].

    Args:
        in_dim: token size.
        hidden_dim: width of the MLP's hidden layers.
        bottleneck_dim: size of the normalised vector.
        out_dim: prototypes, ``K``.
        num_layers: linear layers in the MLP.

    Source: head sizes as DINO (Caron et al., 2021, appendix C), the second last layer as MC-SSL (Atito et al., 2021).
    """

    def __init__(
        self,
        in_dim: int = 768,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 8192,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        sizes = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, next_size), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = self._last_layer(bottleneck_dim, out_dim)
        self.patch_last_layer = self._last_layer(bottleneck_dim, out_dim)
        self.out_dim = out_dim

    @staticmethod
    def _last_layer(bottleneck_dim: int, out_dim: int) -> nn.Module:
        layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        gain = layer.parametrizations.weight.original0
        nn.init.ones_(gain)
        gain.requires_grad_(False)
        return layer

    def project(self, tokens: Tensor) -> Tensor:
        """Unit vectors ``[..., bottleneck_dim]`` of tokens ``[..., D]``."""
        # float32: the norm of a bfloat16 vector is good to two digits only.
        return functional.normalize(self.mlp(tokens).float(), dim=-1, eps=1e-6)

    def forward(self, summary: Tensor) -> Tensor:
        """Logits ``[B, K]`` of summaries ``[B, D]``, in float32 throughout: there are few, and they differ by little.

        In mixed precision the rounding of the encoder, which gives the summaries, stays.
        """
        with full_float32(summary.device):
            return self.last_layer(self.project(summary.float()))

    def patches(self, tokens: Tensor) -> TokenLogits:
        """Logits of patch tokens ``[B, N, D]``."""
        weight = self.patch_last_layer.weight
        assert isinstance(weight, Tensor)
        return TokenLogits(self.project(tokens), weight)
