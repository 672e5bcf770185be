# SPDX-License-Identifier: Apache-2.0
"""The projection head in double precision."""

from __future__ import annotations

import torch
from method_helpers import HIDDEN, tiny_head
from torch import nn


def test_head_gives_cosines() -> None:
    head = tiny_head().eval()
    tokens = torch.randn(5, 3, HIDDEN)
    with torch.no_grad():
        inner = tokens.double()
        for layer in head.mlp:
            inner = (
                nn.functional.gelu(inner)
                if isinstance(layer, nn.GELU)
                else inner @ layer.weight.double().T + layer.bias
            )
        unit = inner / inner.norm(dim=-1, keepdim=True)
        patches = head.patches(tokens).rows().unflatten(0, (5, 3))
        for layer, logits in ((head.last_layer, head(tokens[:, 0])), (head.patch_last_layer, patches)):
            direction = layer.parametrizations.weight.original1.double()
            rows = direction / direction.norm(dim=1, keepdim=True)
            expected = (unit[:, 0] if logits.ndim == 2 else unit) @ rows.T
            torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-4)
            assert logits.abs().max() <= 1 + 1e-5
            assert not layer.parametrizations.weight.original0.requires_grad
    assert sum(isinstance(layer, nn.Linear) for layer in head.mlp) == 3


def test_mixed_precision_does_not_round_what_separates_subjects() -> None:
    """Summaries that differ by a thousandth of their size; the MLP's own rounding in bfloat16 is larger."""
    head = tiny_head().eval()
    summaries = torch.randn(1, HIDDEN) + 1e-3 * torch.randn(16, HIDDEN)
    with torch.no_grad():
        expected = head(summaries)
        with torch.autocast("cpu", torch.bfloat16):
            found = head(summaries)
    deviations, errors = expected - expected.mean(dim=0), (found - expected) - (found - expected).mean(dim=0)
    assert errors.norm() < 1e-2 * deviations.norm()
