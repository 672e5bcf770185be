# SPDX-License-Identifier: Apache-2.0
"""The pretraining engine: what happens in a mini-batch (paper, section II-B, implementation)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import EventEnum, Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from volta_components.distributed import gather_rows, process_count, process_rank, unwrapped
from volta_components.errors import InputError
from volta_components.method.air import Kept, kept_of
from volta_components.method.ema import TeacherEMAHandler
from volta_components.method.graphs import GraphedFunction
from volta_components.method.losses import DiCoMLoss
from volta_components.method.networks import StudentOutput, VoltaStudent, VoltaTeacher
from volta_components.method.one_view import both_views, share_of_first_view
from volta_components.method.views import ViewGenerator, Views
from volta_components.training.sampling import ResumableSampler, derived_seed


class ReadOut(EventEnum):
    """When the numbers of the last mini-batches have been read from the device."""

    NUMBERS_READ = "numbers_read"


class VoltaTrainer(Trainer):
    """Ignite engine for VolTA-3D's pretraining.

    MONAI's ``SupervisedTrainer`` has one network and one loss, hard-wires mixed precision to CUDA, and divides the last
    accumulation window of an epoch by the full window's length. Here an iteration is one mini-batch:

    1. views are made on the device, from what the loader's workers have drawn;
    2. the teacher sees the unmasked global crops;
    3. the student sees the local crops, whose share of eq. 2-3 is propagated back at once, so that they need not be
       remembered; then the masked global crops, together or one view after the other, for the rest of the sum of the
       DiCoM losses (eq. 6). All are scaled by the length of their accumulation window; centres move;
    4. at the end of a window: gradients are clipped, the last layers' are dropped while those are frozen, and the
       optimiser steps with the learning rate of that step;
    5. ``IterationEvents.MODEL_COMPLETED`` is fired: ``TeacherEMAHandler``, one of the ``train_handlers``, lets the
       teacher follow the student;
    6. every ``log_interval`` mini-batches the numbers are read from the device, all of them at once, and
       ``ReadOut.NUMBERS_READ`` is fired. Nothing else waits for the device.

    ``engine.state.output`` is a list of one dictionary: the mini-batch's numbers by name, floats once they have been
    read, until then partly tensors. When numbers are read, ``engine.state.numbers`` has the dictionaries of all
    mini-batches since the last time, and ``engine.state.summaries`` the teacher's summaries of each one's volumes,
    ``[processes * B, D]``.

    A step whose gradient is not finite is left out by optimisers that can do so on the device (``fused``); the run ends
    when its numbers are read, before a checkpoint is written.

    Args:
        device: where to compute.
        max_epochs: epochs of the run.
        train_data_loader: gives ``image`` ``[B, 1, D, H, W]`` in [0, 1], ``plan`` and, with the option ``views#air``,
            ``kept``, as ``DrawViewsd`` draws them. Its sampler, a ``ResumableSampler``, is set to the first mini-batch
            of each epoch here.
        student: the student, or its ``DistributedDataParallel`` wrapper.
        teacher: gives the targets; nothing here changes it.
        optimizer: over the student's parameters; its learning rate is set here.
        views: makes the views.
        loss: the sum of the DiCoM losses, eq. 6.
        learning_rate: of an optimiser step, counted from 0.
        teacher_temperature: tau_t of the global branch, of a mini-batch, counted from 0.
        patch_teacher_temperature: tau_t of the patch branch; the global branch's by default.
        weight_decay: of an optimiser step, counted from 0, for the parameters that are decayed; by default the
            optimiser's own.
        accumulation_steps: mini-batches in a window; 8 in the paper.
        clip_norm: largest norm of the gradient; 0 for no clipping.
        frozen_last_layer_epochs: epochs during which the head's last layers do not move.
        amp: mixed precision by autocast, on any device.
        amp_dtype: type of autocast.
        log_interval: mini-batches between two readings of their numbers.
        compile_blocks: whether the transformer blocks are compiled.
        cuda_graph: whether the kernels of steps 2 and 3 are started all at once, on a GPU (``GraphedFunction``); by
            default where it can be done: in a single process, and without ``views#air``.
        views_together: whether the student's two global views pass together. One after the other gives the same
            gradient with less memory; KoLeo and a patch loss of masked tokens need both.
        drop_path_rate: of the student, see ``VoltaViT.drop_paths``; not with ``views#air``, whose crops are packed in
            one row, nor in a recorded step.
        train_handlers: attached to the engine; a ``TeacherEMAHandler`` has to be among them.

    Raises:
        InputError: if a setting is out of range, or no handler moves the teacher.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader,
        student: nn.Module,
        teacher: VoltaTeacher,
        optimizer: torch.optim.Optimizer,
        views: ViewGenerator,
        loss: DiCoMLoss,
        learning_rate: Callable[[int], float],
        teacher_temperature: Callable[[int], float],
        patch_teacher_temperature: Callable[[int], float] | None = None,
        weight_decay: Callable[[int], float] | None = None,
        accumulation_steps: int = 8,
        clip_norm: float = 3.0,
        frozen_last_layer_epochs: int = 1,
        amp: bool = False,
        amp_dtype: torch.dtype = torch.bfloat16,
        log_interval: int = 1,
        compile_blocks: bool = False,
        cuda_graph: bool | None = None,
        views_together: bool = True,
        drop_path_rate: float = 0.0,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        device = torch.device(device)
        if accumulation_steps < 1:
            raise InputError(f"accumulation_steps {accumulation_steps} is not a positive number")
        if log_interval < 1:
            raise InputError(f"log_interval {log_interval} is not a positive number")
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"drop_path_rate {drop_path_rate} is not within [0, 1)")
        if not any(isinstance(handler, TeacherEMAHandler) for handler in train_handlers or ()):
            raise InputError(
                "no TeacherEMAHandler among the trainer's handlers: the teacher would never follow the student; add it "
                "to train#handlers"
            )
        if amp and amp_dtype is torch.float16:
            raise InputError(
                "amp_dtype float16: its gradients would need scaling, which pretraining does not have; use bfloat16 "
                "(--amp_dtype '$torch.bfloat16'), or --amp False on a GPU without it"
            )
        # TF32, where a GPU has it, for what is not in lower precision anyway; logits are exempt (``full_float32``).
        torch.set_float32_matmul_precision("high")
        sampler = train_data_loader.sampler
        assert isinstance(sampler, ResumableSampler)
        self.sampler = sampler
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        # Read now: optimiser groups from an older checkpoint may lack ``decayed``.
        self._is_decayed = [group.get("decayed", group["weight_decay"] > 0) for group in optimizer.param_groups]
        self.views = views
        self.loss = loss.to(device)
        self.learning_rate = learning_rate
        self.teacher_temperature = teacher_temperature
        self.patch_teacher_temperature = patch_teacher_temperature or teacher_temperature
        self.weight_decay = weight_decay
        self.accumulation_steps = accumulation_steps
        self.clip_norm = clip_norm
        self.frozen_last_layer_epochs = frozen_last_layer_epochs
        self.amp_dtype = amp_dtype
        self.log_interval = log_interval
        self.drop_path_rate = drop_path_rate
        if drop_path_rate:
            self.plain_student.network.drop_paths(drop_path_rate)
        # KoLeo compares the views, and masked tokens are weighed against those of both.
        self.views_together = views_together or loss.koleo_loss is not None or loss.patch_loss.masked_patch is not None
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=sampler.iterations,
            handlers=train_handlers,
            decollate=False,
            event_names=[ReadOut],
        )
        # Not ``self.amp``, which would make MONAI build a gradient scaler; bfloat16 needs none.
        self.mixed_precision = amp
        self._clock = time.perf_counter()
        self._unread: list[dict[str, Any]] = []
        self._unread_summaries: list[Tensor] = []
        self._check_sizes(compile_blocks)
        fits = self._can_be_graphed(device)
        if cuda_graph and not fits:
            raise InputError(
                "cuda_graph: it needs a single process with a GPU, no multi_gpu_train.json, no drop_path_rate, and "
                "no views#air, with which each head has other tokens; leave it out"
            )
        self._graphed = GraphedFunction(self._graphed_learn) if fits and cuda_graph is not False else None
        self._names: list[str] = []
        if compile_blocks:
            for network in (self.plain_student.network, teacher.network):
                network.compile_blocks()
        self.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)

    def _can_be_graphed(self, device: torch.device) -> bool:
        # torchrun's only process has the wrapper too, whose backward pass is more than kernels.
        alone = process_count() == 1 and not isinstance(self.student, DistributedDataParallel)
        return device.type == "cuda" and alone and self.views.air is None and not self.drop_path_rate

    def _check_sizes(self, compile_blocks: bool) -> None:
        """Crops can be cut into patches, and masked, before anything is recorded of the run."""
        network = self.plain_student.network
        for name, size in (
            ("global_size", self.views.global_geometry.size),
            ("local_size", self.views.local_geometry.size),
        ):
            try:
                network.token_grid(torch.empty(0, 1, *size))
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        self.views.mask.draw(self.views.global_geometry.size, np.random.default_rng(0))
        if self.views.air is None:
            return
        if tuple(self.views.air.patch_size) != tuple(network.patch_size):
            raise InputError(
                f"views#air: patch_size {self.views.air.patch_size} is not the network's {network.patch_size}"
            )
        if self.drop_path_rate:
            raise InputError("drop_path_rate does not go with views#air: its crops are packed in one row")
        everywhere = self.loss.reconstruction_loss.everywhere
        if compile_blocks or everywhere or self.loss.patch_loss.token_centre_momentum is not None:
            raise InputError(
                "views#air leaves out other tokens of each head: neither compile_blocks nor token_centre.json goes "
                "with it, nor a reconstruction everywhere"
            )

    @property
    def plain_student(self) -> VoltaStudent:
        """The student without its distributed wrapper."""
        student = unwrapped(self.student)
        assert isinstance(student, VoltaStudent)
        return student

    def _epoch_started(self) -> None:
        self._clock = time.perf_counter()
        state = self.state
        self.sampler.set_position(state.epoch, state.iteration - (state.epoch - 1) * state.epoch_length)

    def window(self, iteration: int) -> tuple[int, int, int]:
        """Place of a mini-batch (from 0) in its accumulation window, the window's length, and its optimiser step.

        The last window of an epoch may be shorter; gradients are averaged over the mini-batches it has.
        """
        length, steps = self.state.epoch_length, self.accumulation_steps
        epoch, place = divmod(iteration, length)
        first = place // steps * steps
        step = epoch * -(-length // steps) + place // steps
        return place - first, min(steps, length - first), step

    def _iteration(  # type: ignore[override]
        self, engine: Any, batchdata: dict[str, Any]
    ) -> list[dict[str, float]]:
        iteration = self.state.iteration - 1
        position, window, step = self.window(iteration)
        is_last = position == window - 1
        self.student.train()
        if self.drop_path_rate:
            torch.manual_seed(derived_seed(self.sampler.seed, "drop paths", process_rank(), iteration))
        if position == 0:
            # A graph adds to the gradients where they were when it was recorded.
            self.optimizer.zero_grad(set_to_none=self._graphed is None)
        # Without MONAI's record of transforms, which summaries would carry into the checkpoint.
        image = batchdata["image"].as_subclass(Tensor).to(self.state.device, non_blocking=True)
        views = self.views(image, batchdata["plan"])
        temperature = self.teacher_temperature(iteration)
        patch_temperature = self.patch_teacher_temperature(iteration)
        kept = kept_of(batchdata.get("kept"), views.image.device)
        numbers = temperature, patch_temperature, 1 / window
        if self._graphed is None:
            found, summary = self._learn(views, kept, *numbers, is_last)
        else:
            *scalars, summary = self._graphed(views, numbers)
            found = dict(zip(self._names, torch.stack(scalars).unbind(), strict=True))
            summary = summary.clone()  # the next call writes there
        self._unread_summaries.append(summary)
        output: dict[str, Any] = found
        if is_last:
            rate = self.learning_rate(step)
            for group, is_decayed in zip(self.optimizer.param_groups, self._is_decayed, strict=True):
                group["lr"] = rate
                if self.weight_decay is not None and is_decayed:
                    group["weight_decay"] = self.weight_decay(step)
            output["learning_rate"] = rate
            output["gradient_norm"] = self._step()
        output["teacher_temperature"] = temperature
        output["patch_teacher_temperature"] = patch_temperature
        output["volumes_per_second"] = len(image) * process_count()  # divided by the time when it is read
        self.state.output = [output]
        self._unread.append(output)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        if self.state.iteration % self.log_interval == 0 or self.state.iteration % self.state.epoch_length == 0:
            self.read_numbers()
        return self.state.output

    def read_numbers(self) -> None:
        """Read the numbers of the mini-batches since the last time, in one transfer from the device.

        Raises:
            InputError: if a gradient was not finite.
        """
        numbers, summaries = self._unread, self._unread_summaries
        if not numbers:
            return
        self._unread, self._unread_summaries = [], []
        scalars = [value.detach().float() for own in numbers for value in own.values() if isinstance(value, Tensor)]
        read = torch.cat([torch.stack(scalars), *(rows.flatten() for rows in summaries)]).cpu()
        values = iter(read[: len(scalars)].tolist())
        # The time since the last reading, so that waiting for data counts.
        now = time.perf_counter()
        seconds, self._clock = (now - self._clock) / len(numbers), now
        for own in numbers:
            own |= {name: next(values) for name, value in own.items() if isinstance(value, Tensor)}
            own["volumes_per_second"] /= seconds
        rows = read[len(scalars) :].view(-1, summaries[0].shape[1])
        self.state.numbers = numbers
        self.state.summaries = list(rows.split([len(part) for part in summaries]))
        first = self.state.iteration - len(numbers) + 1
        for place, own in enumerate(numbers):
            if not math.isfinite(own.get("gradient_norm", 0.0)):
                raise InputError(
                    f"the gradient is not finite at mini-batch {first + place}; lower the learning rate, or "
                    "turn mixed precision off; the last checkpoint was written before and is kept"
                )
        self.fire_event(ReadOut.NUMBERS_READ)

    def _graphed_learn(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """What ``_learn`` gives, of the tensors of ``Views`` and its three numbers, in one row."""
        views, (temperature, patch_temperature, share) = Views(*arguments[:-3]), arguments[-3:]
        kept = kept_of(None, views.image.device)
        output, summary = self._learn(views, kept, temperature, patch_temperature, share, is_last=True)
        self._names = list(output)
        return *output.values(), summary

    def _learn(
        self,
        views: Views,
        kept: Kept,
        temperature: float | Tensor,
        patch_temperature: float | Tensor,
        share: float | Tensor,
        is_last: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Both forward and backward passes; the losses and their statistics, and the teacher's summaries."""
        autocast = torch.autocast(self.state.device.type, dtype=self.amp_dtype, enabled=self.mixed_precision)
        with autocast:
            taught = self.teacher(views.teacher.flatten(0, 1), kept.places)
        local_logits = taught.logits[:0]
        if len(views.local):
            # Not through the distributed wrapper: gradients are exchanged in the second backward pass.
            with autocast:
                local_logits = self.plain_student.local_logits(views.local.flatten(0, 1), kept.in_locals)
            (self.loss.local_crops(local_logits, taught, temperature) * share).backward()
        crops, masked = views.student.flatten(0, 1), views.masked
        if kept.places is not None:
            # Nothing restores what was left out.
            masked = masked & self.plain_student.network.voxels_of(kept.places, masked.shape[3:])
        temperatures = temperature, patch_temperature
        first: StudentOutput | None = None
        if not self.views_together:
            one, crops = views.student
            with autocast:
                first = self.plain_student(one, kept.places)
            count = 2 + len(views.local)
            part = share_of_first_view(self.loss, first, taught, views.image, masked, *temperatures, count)
            (part * share).backward()
        quiet: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.student, DistributedDataParallel) and not is_last:
            quiet = self.student.no_sync()
        with quiet:
            with autocast:
                learnt = self.student(crops, kept.places)
            if first is not None:
                learnt = both_views(first, learnt)
            output = self.loss(learnt, local_logits.detach(), taught, views.image, masked, *temperatures)
            (output["loss"] * share).backward()
        # One view of each volume: two views of it would count twice.
        return output, gather_rows(taught.summary[: views.image.shape[1]].detach().float())

    def _step(self) -> Tensor:
        """Clip, freeze, step; the norm of the gradient before clipping."""
        student, frozen = self.plain_student, []
        if self.state.epoch <= self.frozen_last_layer_epochs:
            for layer in (student.head.last_layer, student.head.patch_last_layer):
                frozen += [(parameter, parameter.grad) for parameter in layer.parameters()]
        for parameter, _ in frozen:
            parameter.grad = None
        limit = self.clip_norm if self.clip_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in student.parameters() if p.grad is not None], limit)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # As torch.amp.GradScaler does: a fused optimiser leaves the step out where this is 1.
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        for parameter, gradient in frozen:
            parameter.grad = gradient  # of no use any more, but a graph's place for it
        return norm
