# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy of patch tokens with the teacher's distributions (paper, eq. 4-5), a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from volta_components.method.projection import full_float32
from volta_components.method.statistics import entropy_share

TOKENS_AT_ONCE = 512


class TokenCrossEntropy(torch.autograd.Function):
    """Mean of ``-sum_k target_k ln softmax(u W^T / tau)_k`` over tokens, and its gradient, computed along with it.

    PyTorch's own functions would keep several arrays of ``[tokens, K]`` in float32 until the backward pass: 85 MB each
    at the paper's size. Here ``TOKENS_AT_ONCE`` rows exist at a time. With ``p`` the softmax and ``t`` the target, the
    loss of a token is ``logsumexp(u W^T / tau) - u (t W) / tau``, its gradient ``(p - t) W / tau`` for ``u`` and
    ``(p - t)^T u / tau`` for ``W``. Targets are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        units: Tensor,
        prototypes: Tensor,
        elsewhere: Tensor,
        target_of: Callable[[slice], Tensor],
        temperature: float,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss, and four numbers for monitoring, without gradients.

        Args:
            ctx: of the backward pass.
            units: ``[B, N, d]``, the student's tokens, ``u``.
            prototypes: ``[K, d]``, the student's last layer, ``W``.
            elsewhere: ``[N, d]``, the student's tokens of another volume.
            target_of: the targets ``[rows, K]`` of some tokens, all crops' tokens being in one row.
            temperature: tau_s.
            weights: ``[B * N]``, how much each token counts in both losses; all alike by default.

        Returns:
            The loss; the mean entropy of the targets as a share of ``ln K``, of all tokens alike and by their weights;
            their mean, ``[K]``; and the loss that the student's outputs for the same tokens of the other volume would
            have.
        """
        count = units.shape[:-1].numel()
        rows, strangers = units.flatten(0, 1).float(), elsewhere.float().expand(units.shape).flatten(0, 1)
        share = torch.ones_like(rows[:, 0]) if weights is None else weights * (count / weights.sum().clamp_min(1e-6))
        totals = torch.zeros(5, device=units.device)  # of logsumexp, agreement, the loss elsewhere, both entropies
        mean_target = torch.zeros(len(prototypes), device=units.device)
        learns, fits = ctx.needs_input_grad[:2]
        units_gradient = torch.empty_like(rows) if learns or fits else None
        prototypes_gradient = torch.zeros_like(prototypes) if fits else None
        with full_float32(units.device):
            for start in range(0, count, TOKENS_AT_ONCE):
                chosen = slice(start, min(start + TOKENS_AT_ONCE, count))
                own, target = rows[chosen], target_of(chosen)
                logits = (own @ prototypes.T).div_(temperature)
                level = logits.logsumexp(dim=-1, keepdim=True)
                pulled = target @ prototypes / temperature
                stranger, weight = strangers[chosen], share[chosen]
                elsewhere_level = (stranger @ prototypes.T).div_(temperature).logsumexp(dim=-1)
                rest = [(each * pulled).sum(dim=-1) @ weight for each in (own, stranger)]
                other = elsewhere_level @ weight - rest[1]
                entropies = entropy_share(target)
                totals += torch.stack([level[:, 0] @ weight, rest[0], other, entropies.sum(), entropies @ weight])
                mean_target += target.sum(dim=0)
                if units_gradient is not None:
                    probabilities = logits.sub_(level).exp_()
                    torch.sub(probabilities @ prototypes / temperature, pulled, out=units_gradient[chosen])
                    units_gradient[chosen].mul_(weight[:, None])
                if prototypes_gradient is not None:
                    difference = probabilities.sub_(target).mul_(weight[:, None])
                    prototypes_gradient.addmm_(difference.T, own, alpha=1 / (temperature * count))
        level_mean, agreement, other, entropy, counted = (totals / count).unbind()
        if units_gradient is not None:
            ctx.save_for_backward(units_gradient.div_(count).view(units.shape), prototypes_gradient)
        results = (entropy, counted, mean_target / count, other)
        ctx.mark_non_differentiable(*results)
        return (level_mean - agreement, *results)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients that ``forward`` has computed, times the loss's own."""
        units, prototypes = ctx.saved_tensors
        return units * gradient, None if prototypes is None else prototypes * gradient, None, None, None, None
