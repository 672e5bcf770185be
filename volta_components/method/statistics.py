# SPDX-License-Identifier: Apache-2.0
"""Numbers about targets and logits, for monitoring; ``GlobalAlignmentLoss`` says what they mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from volta_components.distributed import mean_over_processes


def entropy_share(distribution: Tensor) -> Tensor:
    """Entropy along the last axis as a share of ``ln K``: 1 is uniform, 0 a single prototype."""
    return torch.special.entr(distribution).sum(dim=-1) / math.log(distribution.shape[-1])


@torch.no_grad()
def of_targets(
    share: Tensor, mean_target: Tensor, loss: Tensor, marginal: Tensor, counted: Tensor | None = None
) -> dict[str, Tensor]:
    """``teacher_entropy``, ``information``, ``divergence``.

    Args:
        share: mean entropy of the targets, as a share of ``ln K``.
        mean_target: ``[K]``.
        loss: mean cross-entropy with the student, in nats.
        marginal: running mean of earlier targets, ``[K]``; moves.
        counted: ``share`` with each target counted as the loss counts it; by default all count alike.
    """
    nats = math.log(len(mean_target))
    mean_target = mean_over_processes(mean_target)
    marginal.copy_(torch.where(marginal.any(), marginal, mean_target))
    # The mean of earlier targets only: in one that holds these as well, less would look like information.
    unconditional = -(mean_target * marginal.clamp_min(1e-12).log()).sum()
    marginal.lerp_(mean_target, 0.02)
    return {
        "teacher_entropy": share,
        "information": unconditional / nats - share,
        "divergence": loss.detach() - (share if counted is None else counted) * nats,
    }


def of_logits(mean: Tensor, deviation: Tensor, centre: Tensor | None) -> dict[str, Tensor]:
    """``logit_spread``, and with a centre ``centre_alignment``.

    Args:
        mean: of the teacher's logits over rows, ``[K]``.
        deviation: of the same logits, over the same rows, ``[K]``.
        centre: of the targets, ``[K]``.
    """
    statistics = {"logit_spread": deviation.mean()}
    if centre is not None:
        statistics["centre_alignment"] = functional.cosine_similarity(mean, centre, dim=0)
    return statistics
