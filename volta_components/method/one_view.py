# SPDX-License-Identifier: Apache-2.0
"""The DiCoM losses' share of one of the student's two global views, so that only one has to be remembered at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from volta_components.method.cross_entropy import TokenCrossEntropy
from volta_components.method.losses import DiCoMLoss, PatchAlignmentLoss
from volta_components.method.networks import GlobalOutput, StudentOutput
from volta_components.method.projection import TokenLogits


def share_of_first_view(
    loss: DiCoMLoss,
    student: StudentOutput,
    teacher: GlobalOutput,
    image: Tensor,
    masked: Tensor,
    teacher_temperature: float | Tensor,
    patch_teacher_temperature: float | Tensor,
    views: int,
) -> Tensor:
    """What depends on the first view in ``loss``, but for the last layer of the patch branch; nothing moves.

    The rest follows when ``loss`` is computed with ``both_views``, in which the first view is a constant. The gradient
    of the patch branch's last layer comes from there, for both views.

    Args:
        loss: without KoLeo and a patch loss of masked tokens, which compare the views with each other.
        student: outputs for the first view of B volumes.
        teacher: outputs for both views.
        image: what is reconstructed, as ``loss`` takes it.
        masked: where the student's crops were replaced, as ``loss`` takes it.
        teacher_temperature: tau_t of eq. 2.
        patch_teacher_temperature: tau_t of eq. 4.
        views: of the student, with local crops, ``V``.
    """
    taught = teacher.logits.unflatten(0, (2, image.shape[1]))
    targets = loss.global_loss.targets.sharpen(taught, teacher_temperature)
    # The first view is compared with the teacher's second.
    pairs = loss.global_loss.share(student.globals_.logits[None], targets[1:], views)
    patch = _patch_loss(loss.patch_loss, student.globals_.patch_logits, teacher.patch_logits, patch_teacher_temperature)
    restored = loss.reconstruction_loss(student.reconstruction, image[0], masked[0])
    both = loss.patch_weight * patch + loss.reconstruction_weight * restored
    return loss.global_weight * pairs + both / 2


def _patch_loss(
    loss: PatchAlignmentLoss, student: TokenLogits, teacher: TokenLogits, temperature: float | Tensor
) -> Tensor:
    """The patch loss of the first half of the crops, with a gradient for their tokens alone."""
    target_of = loss.targets_of(loss.centred(teacher, moves=False), temperature, moves=False)
    elsewhere = student.units[-1].detach()
    found: Tensor = TokenCrossEntropy.apply(
        student.units, student.prototypes.detach(), elsewhere, target_of, loss.student_temperature
    )[0]
    return found


def both_views(first: StudentOutput, second: StudentOutput) -> StudentOutput:
    """Outputs of both views; the first is a constant."""
    one, two = first.globals_, second.globals_
    units = torch.cat([one.patch_logits.units.detach(), two.patch_logits.units])
    return StudentOutput(
        GlobalOutput(
            torch.cat([one.summary.detach(), two.summary]),
            torch.cat([one.logits.detach(), two.logits]),
            two.patch_logits._replace(units=units),
        ),
        torch.cat([first.reconstruction.detach(), second.reconstruction]),
    )
