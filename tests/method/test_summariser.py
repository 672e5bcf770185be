# SPDX-License-Identifier: Apache-2.0
"""The summariser against PyTorch's own attention."""

from __future__ import annotations

import torch
from method_helpers import HIDDEN
from torch import nn

from volta_components.method.summariser import ClsSummariser


def reference_summary(summariser: ClsSummariser, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole transformer block, every row of it, by ``nn.MultiheadAttention``; and the heads' mean attention."""
    size = tokens.shape[-1]
    attention = nn.MultiheadAttention(size, summariser.num_heads, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(summariser.attn.qkv.weight)
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(summariser.attn.out_proj.weight)
        attention.out_proj.bias.copy_(summariser.attn.out_proj.bias)
    sequence = torch.cat([summariser.cls_token.expand(len(tokens), 1, size), tokens], dim=1)
    normal = nn.functional.layer_norm(sequence, (size,), summariser.norm1.weight, summariser.norm1.bias)
    attended, weights = attention(normal, normal, normal)
    sequence = sequence + attended
    normal = nn.functional.layer_norm(sequence, (size,), summariser.norm2.weight, summariser.norm2.bias)
    inner = nn.functional.gelu(summariser.mlp.linear1(normal))
    sequence = sequence + summariser.mlp.linear2(inner)
    return sequence[:, 0], weights[:, 0]


def test_summariser_equals_a_whole_transformer_block() -> None:
    summariser = ClsSummariser(HIDDEN, num_heads=8, mlp_dim=40).eval()
    with torch.no_grad():
        for parameter in summariser.parameters():  # norms and biases away from 1 and 0
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randn(3, 7, HIDDEN)
    expected, weights = reference_summary(summariser, tokens)
    torch.testing.assert_close(summariser(tokens), expected, atol=1e-5, rtol=1e-4)
    shares = weights[:, 1:] / weights[:, 1:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(summariser.attention(tokens), shares, atol=1e-5, rtol=1e-4)
