# SPDX-License-Identifier: Apache-2.0
"""CLS-style summariser (paper, section II-B)."""

from __future__ import annotations

import math

import torch
from monai.networks.blocks.mlp import MLPBlock
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor, nn
from torch.nn import functional

from volta_components.errors import InputError


class ClsSummariser(nn.Module):
    """CLS-style summariser (paper, section II-B): a learned token that attends to all patch tokens.

    A trainable ``[1, 1, D]`` token is expanded to the batch and prepended to the patch tokens; one transformer block
    (LayerNorm, multi-head self-attention, residual, LayerNorm, GELU MLP, residual) follows. Only the summary's own row
    of the block is computed, since the block's patch outputs are discarded: the same number for ``1/N`` of the cost.
    MONAI's ``TransformerBlock`` computes every row, hence a module of our own around its ``SABlock`` and ``MLPBlock``.

    Args:
        hidden_size: token size ``D``.
        num_heads: attention heads; 8 in the paper.
        mlp_dim: hidden size of the MLP.

    Raises:
        InputError: if ``hidden_size`` is not divisible by ``num_heads``.
    """

    def __init__(self, hidden_size: int = 768, num_heads: int = 8, mlp_dim: int = 3072) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads, "summary_heads")
        self.num_heads = num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = SABlock(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = MLPBlock(hidden_size, mlp_dim)

    def _query_key_value(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        sequence = self.norm1(torch.cat([cls_token, tokens], dim=1))
        weight = self.attn.qkv.weight
        size = cls_token.shape[-1]
        query = functional.linear(sequence[:, :1], weight[:size])  # type: ignore[index]
        key, value = functional.linear(sequence, weight[size:]).chunk(2, dim=-1)  # type: ignore[index]
        return cls_token, self._heads(query), self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` as ``[B, heads, N, D / heads]``."""
        return x.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Summarise patch tokens ``[B, N, D]`` into ``[B, D]``."""
        cls_token, query, key, value = self._query_key_value(tokens)
        attended = functional.scaled_dot_product_attention(query, key, value)
        summary = cls_token + self.attn.out_proj(attended.transpose(1, 2).flatten(2))
        summary = summary + self.mlp(self.norm2(summary))
        return summary[:, 0]

    def attention(self, tokens: Tensor) -> Tensor:
        """Attention of the summary to each patch token, ``[B, N]``, averaged over heads.

        The share that the summary gives to itself is left out, and the rest sums to 1.
        """
        _, query, key, _ = self._query_key_value(tokens)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        weights = weights.mean(dim=1)[:, 0, 1:]
        return weights / weights.sum(dim=-1, keepdim=True)


def check_heads(hidden_size: int, num_heads: int, name: str = "num_heads") -> None:
    """Refuse a token size that the attention heads (by their name in a config) cannot share.

    Raises:
        InputError: if ``num_heads`` does not divide ``hidden_size``.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise InputError(f"hidden_size {hidden_size} is not divisible by {name} {num_heads}")
