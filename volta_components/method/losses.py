# SPDX-License-Identifier: Apache-2.0
"""The DiCoM losses of VolTA-3D (paper, eq. 1 to 6), and how teacher logits become targets.

DiCoM (diverse concept modelling) is the framework that VolTA-3D brings to three dimensions: reconstruction of what is
masked (eq. 1), alignment of summaries between views (eq. 2-3) and of patch tokens (eq. 4-5). ``DiCoMLoss`` is their
sum (eq. 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d

from volta_components.distributed import gather_rows, mean_over_processes, process_rank
from volta_components.errors import InputError
from volta_components.method.cross_entropy import TokenCrossEntropy
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.networks import GlobalOutput, StudentOutput
from volta_components.method.projection import TokenLogits, full_float32
from volta_components.method.reconstruction import ReconstructionLoss
from volta_components.method.statistics import entropy_share, of_logits, of_targets


class DiCoMLoss(nn.Module):
    """The weighted sum of the DiCoM losses: ``L = L_global + L_patch + weight * L_rec`` (eq. 6).

    Args:
        global_loss: eq. 2-3.
        patch_loss: eq. 4-5.
        reconstruction_loss: eq. 1.
        reconstruction_weight: lambda_rec; 100 in the paper.
        koleo_loss: spread of the student's summaries; not in the paper, ``None`` for none.
        koleo_weight: its weight in the sum.
        global_weight: of the global loss; 1 in the paper.
        patch_weight: of the patch loss; 1 in the paper.

    Source: VolTA-3D eq. 6; DiCoM (Parida et al., 2024).
    """

    def __init__(
        self,
        global_loss: GlobalAlignmentLoss,
        patch_loss: PatchAlignmentLoss,
        reconstruction_loss: ReconstructionLoss,
        reconstruction_weight: float = 100.0,
        koleo_loss: KoLeoLoss | None = None,
        koleo_weight: float = 0.1,
        global_weight: float = 1.0,
        patch_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.global_loss = global_loss
        self.patch_loss = patch_loss
        self.reconstruction_loss = reconstruction_loss
        self.reconstruction_weight = reconstruction_weight
        self.koleo_loss = koleo_loss
        self.koleo_weight = koleo_weight
        self.global_weight = global_weight
        self.patch_weight = patch_weight

    def forward(
        self,
        student: StudentOutput,
        local_logits: Tensor,
        teacher: GlobalOutput,
        image: Tensor,
        masked: Tensor,
        teacher_temperature: float | Tensor,
        patch_teacher_temperature: float | Tensor,
    ) -> dict[str, Tensor]:
        """The sum and its terms.

        Args:
            student: outputs for the masked global crops.
            local_logits: the student's for the local crops, ``[L * B, K]``; without gradients when ``local_crops`` had
                them propagated back already.
            teacher: outputs for the unmasked global crops.
            image: global crops before any intensity change, ``[2, B, 1, D, H, W]``: what is reconstructed.
            masked: true where the student's crop was replaced, of the same shape.
            teacher_temperature: tau_t of eq. 2.
            patch_teacher_temperature: tau_t of eq. 4.

        Returns:
            Scalars by name: ``loss`` (the sum), ``loss_global``, ``loss_patch``, ``loss_reconstruction``, with KoLeo
            ``loss_koleo``; and the statistics of both alignment losses as ``global_*`` and ``patch_*``, averaged over
            processes.
        """
        pairs, batch = image.shape[:2]
        own, crops, hidden = student.globals_, image.flatten(0, 1), masked.flatten(0, 1)
        logits = torch.cat([own.logits, local_logits]).unflatten(0, (-1, batch))
        output = {
            "loss_global": self.global_loss(logits, teacher.logits.unflatten(0, (pairs, batch)), teacher_temperature),
            "loss_patch": self.patch_loss(own.patch_logits, teacher.patch_logits, patch_teacher_temperature, hidden),
            "loss_reconstruction": self.reconstruction_loss(student.reconstruction, crops, hidden),
        }
        loss = (
            self.global_weight * output["loss_global"]
            + self.patch_weight * output["loss_patch"]
            + self.reconstruction_weight * output["loss_reconstruction"]
        )
        if self.koleo_loss is not None:
            output["loss_koleo"] = self.koleo_loss(own.summary.unflatten(0, (pairs, batch)))
            loss = loss + self.koleo_weight * output["loss_koleo"]
        statistics = {
            f"{branch}_{name}": value
            for branch, module in (("global", self.global_loss), ("patch", self.patch_loss))
            for name, value in module.statistics.items()
        }
        # The same in every process: the collapse monitor of each decides by them whether to stop.
        means = mean_over_processes(torch.stack(list(statistics.values())))
        return {"loss": loss, **output, **dict(zip(statistics, means, strict=True))}

    def local_crops(self, local_logits: Tensor, teacher: GlobalOutput, teacher_temperature: float | Tensor) -> Tensor:
        """The share of the local crops' logits ``[L * B, K]``, which depends on nothing else of the student."""
        taught = teacher.logits.unflatten(0, (2, -1))
        return self.global_weight * self.global_loss.local_crops(
            local_logits.unflatten(0, (-1, taught.shape[1])), taught, teacher_temperature
        )


class CentredTargets(nn.Module):
    """Teacher distributions by centring with a running mean and sharpening (paper, eq. 4 and text below eq. 2).

    ``softmax((t - c) / tau_t)``; afterwards, in training mode, ``c = m * c + (1 - m) * mean(t)``, the mean being taken
    over every row and every process. The first update sets the centre to the mean, so that a slow centre does not
    start far from the logits.

    A running mean is safe only while the logits differ between subjects by about the temperature. Those of aligned
    brains differ by far less at first: then ``t - c`` is close to 0, targets are uniform, and the branch is dead.
    ``target_entropy`` therefore lets the sharpening follow the spread of the logits: the temperature actually used is
    ``tau_t * scale``, where ``scale`` is a running, bounded control variable that rises while the teacher's entropy is
    under its target and falls while it is above.

    Args:
        out_dim: number of prototypes, ``K``.
        momentum: share of the old centre kept at an update, in [0, 1].
        target_entropy: mean entropy that the targets should have, as a share of ``ln K``, in (0, 1); ``None`` leaves
            the temperature as it is given.
        entropy_gain: how fast ``ln(scale)`` follows the error of the entropy, per mini-batch.

    Shapes:
        logits: ``[..., K]``; the targets have the same shape and sum to 1 along the last axis.

    Source: DINO (Caron et al., 2021) for centring and sharpening; the entropy control is this project's own.
    """

    centre: Tensor
    log_scale: Tensor
    updates: Tensor

    def __init__(
        self,
        out_dim: int,
        momentum: float = 0.9,
        target_entropy: float | None = None,
        entropy_gain: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise InputError(f"centre momentum {momentum} is not within [0, 1]")
        if target_entropy is not None and not 0 < target_entropy < 1:
            raise InputError(f"target_entropy {target_entropy} is not a share of ln K between 0 and 1")
        self.out_dim = out_dim
        self.momentum = momentum
        self.target_entropy = target_entropy
        self.entropy_gain = entropy_gain
        self.register_buffer("centre", torch.zeros(out_dim))
        self.register_buffer("log_scale", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Targets ``[..., K]`` of teacher logits; updates the centre in training mode."""
        targets = self.sharpen(logits, temperature)
        if self.training:
            self.update(logits.float().flatten(0, -2).mean(dim=0), entropy_share(targets).mean())
        return targets

    @torch.no_grad()
    def sharpen(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Targets ``[..., K]`` of teacher logits; nothing moves."""
        return ((logits.float() - self.centre) / (temperature * self.log_scale.exp())).softmax(dim=-1)

    @torch.no_grad()
    def update(self, mean: Tensor, entropy: Tensor) -> None:
        """Move the centre to the logits' ``mean`` ``[K]``, and the scale by the targets' ``entropy``, a share."""
        momentum = self.momentum * (self.updates > 0)
        self.centre.lerp_(mean_over_processes(mean), 1.0 - momentum)
        self.updates += 1
        if self.target_entropy is not None:
            self.log_scale += self.entropy_gain * (self.target_entropy - mean_over_processes(entropy))
            self.log_scale.clamp_(min=-12.0, max=3.0)


class SinkhornTargets(nn.Module):
    """Teacher distributions by Sinkhorn-Knopp over a queue of the last teacher outputs.

    Every prototype gets the same total weight over the queue, which rules out both the uniform collapse and the
    collapse to a point, however small the batch. Logits are first divided by their standard deviation over the queue
    (after subtracting each prototype's mean), so that ``epsilon`` is a width in deviations and early, nearly equal
    logits still give distinct targets. The queue holds logits minus a fast running centre. Without that, the drift of a
    network that changes quickly is larger than the differences between subjects, and targets would separate old outputs
    from new ones.

    Args:
        out_dim: number of prototypes, ``K``.
        queue_size: teacher outputs that are remembered.
        epsilon: width of the assignment, in standard deviations of the logits; smaller is sharper.
        num_iterations: row and column normalisations; 3 in SwAV.
        centre_momentum: share of the running centre kept at an update.

    Shapes:
        logits: ``[..., K]``; the targets have the same shape and sum to 1 along the last axis.

    Source: SwAV (Caron et al., 2020, section 3.1 and the queue of appendix C).
    """

    queue: Tensor
    filled: Tensor
    running_centre: Tensor

    def __init__(
        self,
        out_dim: int,
        queue_size: int = 256,
        epsilon: float = 0.5,
        num_iterations: int = 3,
        centre_momentum: float = 0.7,
    ) -> None:
        super().__init__()
        if queue_size < 1 or epsilon <= 0 or num_iterations < 1:
            raise InputError(
                f"sinkhorn needs queue_size >= 1, epsilon > 0, num_iterations >= 1, not {queue_size}, {epsilon}, "
                f"{num_iterations}"
            )
        self.out_dim = out_dim
        self.queue_size = queue_size
        self.epsilon = epsilon
        self.num_iterations = num_iterations
        self.centre_momentum = centre_momentum
        self.register_buffer("queue", torch.zeros(queue_size, out_dim))
        self.register_buffer("running_centre", torch.zeros(out_dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Targets ``[..., K]`` of teacher logits; the queue grows in training mode; ``epsilon`` is the temperature."""
        targets, current, mean = self._assign(logits)
        if self.training:
            self.running_centre.lerp_(mean, 1.0 - self.centre_momentum * (self.filled > 0))
            self.queue.copy_(torch.cat([current, self.queue])[: len(self.queue)])
            self.filled.add_(len(current)).clamp_(max=len(self.queue))
        return targets

    def sharpen(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Targets ``[..., K]`` of teacher logits; the queue stands still."""
        return self._assign(logits)[0]

    @torch.no_grad()
    def _assign(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets, and of all processes together the centred logits ``[rows, K]`` and the mean ``[K]``.

        The queue takes part as a whole, with weight 0 where it is still empty: to look how far it is filled would make
        a GPU wait.
        """
        own = logits.float().flatten(0, -2)
        current = gather_rows(own)
        mean = current.mean(dim=0)
        current = current - torch.where(self.filled > 0, self.running_centre, mean)
        rows = torch.cat([current, self.queue])
        held = (torch.arange(len(rows), device=rows.device) < len(current) + self.filled)[:, None]
        count = held.sum()
        centred = (rows - (rows * held).sum(dim=0) / count) * held
        deviation = (centred.square().sum() / (count * rows.shape[1] - 1)).sqrt()
        scores = centred / deviation.clamp_min(1e-12) / self.epsilon
        for _ in range(self.num_iterations):
            columns = scores.masked_fill(~held, -torch.inf).logsumexp(dim=0, keepdim=True)
            scores = scores - columns - math.log(rows.shape[1])
            scores = scores - scores.logsumexp(dim=1, keepdim=True) - count.log()
        start = process_rank() * len(own)
        return scores[start : start + len(own)].softmax(dim=-1).view(logits.shape), current, mean


class GlobalAlignmentLoss(nn.Module):
    """Cross-entropy between teacher and student summaries over all pairs of different views (eq. 2-3).

    Args:
        targets: turns teacher logits into distributions; ``CentredTargets`` in the paper.
        student_temperature: tau_s; 0.1 in the paper.

    Shapes:
        student: ``[V, B, K]`` logits; the first two views are the teacher's, in the same order.
        teacher: ``[2, B, K]`` logits.

    Attributes:
        statistics: of the last call, for monitoring.

            - ``teacher_entropy``: mean entropy of the targets, as a share of ln K.
            - ``information``: what the targets say beyond their running mean, as a share of ln K; the teacher's drift
              is included.
            - ``predicted``: the cross-entropy of a target with the student's outputs for a volume ``BACK`` mini-batches
              before, minus that with its outputs for other views of the same volume, as a share of ln K. At 0, the
              views of a volume agree on nothing that separates it from other volumes, even when the entropy looks
              healthy. (A fast centre pushes targets away from the last volumes: compared with these, more would look
              predicted.)
            - ``divergence``: mean KL divergence of the targets from the student, in nats.
            - ``logit_spread``: deviation of the teacher's logits over rows.
            - ``centre_alignment``: cosine between the centre and this batch's mean.
        marginal: running mean of earlier targets, ``[K]``.
        previous: the student's mean log-probabilities in the last mini-batches, newest first, ``[BACK, 2, K]``: for
            each teacher view, over the student views that it is compared with.

    Raises:
        ValueError: if the shapes do not fit.

    Source: VolTA-3D eq. 2-3; DINO (Caron et al., 2021).
    """

    BACK = 16

    marginal: Tensor
    previous: Tensor

    def __init__(self, targets: CentredTargets | SinkhornTargets, student_temperature: float = 0.1) -> None:
        super().__init__()
        self.targets = targets
        self.student_temperature = student_temperature
        self.statistics: dict[str, Tensor] = {}
        self.register_buffer("marginal", torch.zeros(targets.out_dim))
        self.register_buffer("previous", torch.zeros(self.BACK, 2, targets.out_dim))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temperature: float | Tensor) -> Tensor:
        """Mean over the ``2 (V - 1)`` pairs and the batch; a scalar."""
        if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:] or len(student) < 2:
            raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} do not fit")
        targets = self.targets(teacher, teacher_temperature)
        log_probabilities = (student.float() / self.student_temperature).log_softmax(dim=-1)
        # Sums, no matrix products, which a GPU rounds to TF32: branches count as dead by differences of a thousandth.
        pairs = -(targets[:, None] * log_probabilities).sum(dim=-1).mean(dim=-1)
        # Weights, no boolean index: that would make a GPU wait.
        different = 1.0 - torch.eye(len(teacher), len(student), device=student.device)
        loss = (pairs * different).sum() / (len(teacher) * (len(student) - 1))
        rows = teacher.float().flatten(0, -2)
        mean_target = targets.flatten(0, -2).mean(dim=0)
        self.statistics = of_targets(entropy_share(targets).mean(), mean_target, loss, self.marginal)
        self.statistics |= of_logits(rows.mean(dim=0), rows.std(dim=0), getattr(self.targets, "centre", None))
        with torch.no_grad():
            # The student's outputs that each target is compared with: here of this volume, then of an earlier one.
            mean = (different[..., None] * log_probabilities.mean(dim=1)).sum(dim=1)
            mean = mean / different.sum(dim=1, keepdim=True)
            earlier = self.previous[-1]
            other = -(targets.mean(dim=1) * earlier).sum(dim=-1).mean()
            # No ``if``: it would make a GPU wait.
            predicted = torch.where(earlier.any(), other - loss.detach(), 0.0)
            self.statistics["predicted"] = predicted / math.log(targets.shape[-1])
            self.previous.copy_(torch.cat([mean_over_processes(mean)[None], self.previous[:-1]]))
        return loss

    def local_crops(self, local: Tensor, teacher: Tensor, teacher_temperature: float | Tensor) -> Tensor:
        """What local crops ``[L, B, K]`` add to the loss when they are the student's views after the first two."""
        return self.share(local, self.targets.sharpen(teacher, teacher_temperature), len(teacher) + len(local))

    def share(self, student: Tensor, targets: Tensor, views: int) -> Tensor:
        """What pairs of some of the student's ``views`` ``[v, B, K]`` and some of the two targets add to the loss."""
        log_probabilities = (student.float() / self.student_temperature).log_softmax(dim=-1)
        return -(targets[:, None] * log_probabilities).sum() / (2 * (views - 1) * student.shape[1])


class PatchAlignmentLoss(nn.Module):
    """Cross-entropy between teacher and student distributions of every patch token of the same crop (eq. 4-5).

    Args:
        targets: turns teacher logits into distributions; ``CentredTargets`` in the paper. Not the one of the global
            branch: each branch has its own centre.
        student_temperature: tau_s.
        token_centre_momentum: if given, the teacher's tokens are first centred at each position of the crop, by a
            running mean that keeps this share. Targets then cannot tell where a token lies, only what is there. Not in
            the paper.
        masked_patch: if given, the size of a patch: tokens then count by how much of their patch is masked, as iBOT has
            it (whole patches: ``mask_cell``). Not in the paper.

    Shapes:
        student, teacher: ``[B, N, K]`` logits of the same crops, token for token, not multiplied out; of fewer tokens
            where some are left out, the mean being over the others.
        masked: ``[B, 1, D, H, W]``, true where the student's crop was replaced.

    Attributes:
        statistics: as ``GlobalAlignmentLoss``; ``predicted`` compares the student's output with that for the same token
            of the last volume of the mini-batch before: the position alone predicts nothing.
        previous: the student's tokens of that volume, ``[N, d]``; the last process's, in every process.
        token_centre: running means of the teacher's tokens, ``[N, d]``.

    Raises:
        ValueError: if the shapes differ.

    Source: VolTA-3D eq. 4-5.
    """

    marginal: Tensor

    def __init__(
        self,
        targets: CentredTargets | SinkhornTargets,
        student_temperature: float = 0.1,
        token_centre_momentum: float | None = None,
        masked_patch: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.targets = targets
        self.student_temperature = student_temperature
        self.token_centre_momentum = token_centre_momentum
        self.masked_patch = masked_patch
        self.statistics: dict[str, Tensor] = {}
        self.register_buffer("marginal", torch.zeros(targets.out_dim))
        self.previous: Tensor | None = None
        self.token_centre: Tensor | None = None

    def get_extra_state(self) -> dict[str, Tensor | None]:
        """What is as large as a crop has tokens, and so not known from the start."""
        return {"previous": self.previous, "token_centre": self.token_centre}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        """Restore what ``get_extra_state`` gave."""
        for name, value in state.items():
            setattr(self, name, None if value is None else value.to(self.marginal.device))

    def forward(
        self,
        student: TokenLogits,
        teacher: TokenLogits,
        teacher_temperature: float | Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:
        """Mean over tokens and crops; a scalar."""
        units = student.units
        weights = None
        if self.masked_patch is not None and masked is not None:
            weights = avg_pool3d(masked.float(), tuple(self.masked_patch)).flatten(1)
            weights = (weights if student.places is None else weights[:, student.places]).flatten()
        if units.shape[:-1] != teacher.units.shape[:-1] or len(student.prototypes) != len(teacher.prototypes):
            raise ValueError(f"student {tuple(units.shape)} and teacher {tuple(teacher.units.shape)} differ")
        teacher = self.centred(teacher, moves=self.training)
        taught = teacher.units.flatten(0, -2).float()
        target_of = self.targets_of(teacher, teacher_temperature, moves=True)
        places, previous = student.places, self.previous
        if previous is None:
            previous = units[-1].detach()
        elif places is not None:
            previous = previous[places]
        loss, entropy, counted, mean_target, other = TokenCrossEntropy.apply(
            units, student.prototypes, previous, target_of, self.student_temperature, weights
        )
        with torch.no_grad(), full_float32(taught.device):
            # Mean and deviation of linear functions of the tokens follow from the tokens' own mean and covariance.
            middle = taught.mean(dim=0)
            covariance = (taught - middle).T @ (taught - middle) / (len(taught) - 1)
            deviation = ((teacher.prototypes @ covariance) * teacher.prototypes).sum(dim=-1).clamp_min(0.0).sqrt()
            mean = teacher.prototypes @ middle
            if isinstance(self.targets, CentredTargets) and self.training:
                self.targets.update(mean, entropy)
            self.statistics = of_targets(entropy, mean_target, loss, self.marginal, counted)
            self.statistics |= of_logits(mean, deviation, getattr(self.targets, "centre", None))
            predicted = (other - loss.detach()) / math.log(self.targets.out_dim)
            self.statistics["predicted"] = predicted * 0.0 if self.previous is None else predicted
            if self.training:
                newest = units[-1].detach()
                if places is not None:
                    # Where this volume has no token, that of an earlier one stays.
                    old = newest.new_zeros(student.total, newest.shape[1]) if self.previous is None else self.previous
                    newest = old.index_copy(0, places, newest)
                # The same in every process: a checkpoint holds that of one.
                newest = gather_rows(newest[None])[-1]
                self.previous = newest.clone() if self.previous is None else self.previous.copy_(newest)
        return loss

    def targets_of(self, teacher: TokenLogits, temperature: float | Tensor, moves: bool) -> Callable[[slice], Tensor]:
        """What gives the targets of some of the teacher's tokens; a queue, which takes them all at once, may move."""
        if isinstance(self.targets, CentredTargets):
            return lambda rows: self.targets.sharpen(teacher.rows(rows), temperature)
        everything = (self.targets if moves else self.targets.sharpen)(teacher.rows(), temperature)
        return lambda rows: everything[rows]

    @torch.no_grad()
    def centred(self, teacher: TokenLogits, moves: bool) -> TokenLogits:
        """The teacher's tokens, with the option without their mean at each position, which may move."""
        if self.token_centre_momentum is None:
            return teacher
        units = teacher.units.float()
        mean = mean_over_processes(units.mean(dim=0))
        centre = mean if self.token_centre is None else self.token_centre
        centred = TokenLogits(units - centre, teacher.prototypes)
        if moves and self.token_centre is None:
            self.token_centre = mean.clone()
        elif moves:
            centre.lerp_(mean, 1.0 - self.token_centre_momentum)
        return centred
