# SPDX-License-Identifier: Apache-2.0
"""Tiny builders for the tests of the method; a module (not fixtures) because spawned processes need them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch import nn
from torch.utils.data import DataLoader, default_collate

from volta_components.method.ema import TeacherEMAHandler
from volta_components.method.losses import (
    CentredTargets,
    DiCoMLoss,
    GlobalAlignmentLoss,
    PatchAlignmentLoss,
    ReconstructionLoss,
)
from volta_components.method.masking import GroupMask
from volta_components.method.networks import VoltaStudent, VoltaViT, make_teacher, parameter_groups
from volta_components.method.projection import ProjectionHead, TokenLogits
from volta_components.method.trainer import VoltaTrainer
from volta_components.method.views import CropGeometry, DrawViewsd, IntensityAugment, ViewGenerator, Views
from volta_components.training.sampling import KeyedDataset, ResumableSampler
from volta_components.training.schedules import CosineSchedule, LinearSchedule

IMAGE = (8, 12, 12)
PATCH = (4, 4, 4)
HIDDEN = 32
PROTOTYPES = 16
# Tokens of a global crop of IMAGE size: a grid of 2 x 3 x 3.
TOKENS = 18


def tiny_network(seed: int = 0, **changes: Any) -> VoltaViT:
    """Two blocks of 32 on 18 tokens."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "img_size": IMAGE,
        "patch_size": PATCH,
        "hidden_size": HIDDEN,
        "mlp_dim": 48,
        "num_layers": 2,
        "num_heads": 4,
        "summary_heads": 2,
    }
    return VoltaViT(**{**settings, **changes})


def tiny_head(seed: int = 1) -> ProjectionHead:
    torch.manual_seed(seed)
    return ProjectionHead(HIDDEN, hidden_dim=24, bottleneck_dim=8, out_dim=PROTOTYPES)


def tiny_student(seed: int = 0) -> VoltaStudent:
    return VoltaStudent(tiny_network(seed), tiny_head(seed + 1))


def tiny_views(num_local: int = 2, seed: int = 0, plain: bool = False, **changes: Any) -> ViewGenerator:
    """Views of volumes of about 10 x 14 x 14 voxels; ``plain`` without intensity changes."""
    strong = IntensityAugment() if plain else IntensityAugment(0.1, 0.2, 1.3, 0.1, 0.05, 0.8, 0.5)
    mild = IntensityAugment() if plain else IntensityAugment(0.02, 0.1, 1.1, 0.05, 0.01, 0.5, 0.1)
    settings: dict[str, Any] = {
        "global_geometry": CropGeometry(IMAGE, zoom=(0.9, 1.1), rotation=10, translation=1),
        "local_geometry": CropGeometry((8, 8, 8), cube_side=(5, 12), rotation=10, anywhere=True),
        "num_local": num_local,
        "teacher_intensity": mild,
        "student_intensity": strong,
        "mask": GroupMask(cell=1),
        "seed": seed,
    }
    return ViewGenerator(**{**settings, **changes})


def make_views(views: ViewGenerator, volumes: torch.Tensor, keys: Sequence[Sequence[int]]) -> Views:
    """Views of volumes ``[B, 1, D, H, W]`` with their keys."""
    return views(volumes, default_collate([views.draw(volumes.shape[2:], key) for key in keys]))


def token_logits(logits: torch.Tensor) -> TokenLogits:
    """Logits ``[B, N, K]`` as if each prototype were an axis of its own."""
    return TokenLogits(logits, torch.eye(logits.shape[-1]))


def tiny_volumes(count: int, shape: tuple[int, ...] = (10, 14, 14), seed: int = 5) -> list[dict[str, torch.Tensor]]:
    """Items with smooth random volumes ``[1, D, H, W]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, 4, generator=generator)
    volumes = nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    return [{"image": volume} for volume in volumes]


def tiny_run(
    count: int = 5,
    epochs: int = 2,
    batch_size: int = 1,
    num_replicas: int = 1,
    rank: int = 0,
    accumulation_steps: int = 2,
    seed: int = 0,
    shuffle: bool = True,
    transform: Compose | None = None,
    num_workers: int = 0,
    teacher_momentum: Callable[[int], float] | None = None,
    handlers: Sequence[Any] = (),
    run_on: str = "cpu",
    **changes: Any,
) -> SimpleNamespace:
    """Everything of a tiny pretraining, fresh and reproducible; ``changes`` go to the trainer and its loss.

    ``handlers`` are attached before the EMA handler.
    """
    device = torch.device(run_on)
    student = tiny_student(seed).to(device)
    sampler = ResumableSampler(count, seed, batch_size, num_replicas, rank, shuffle=shuffle)
    parts = SimpleNamespace(
        plain_student=student,
        student=student,
        teacher=make_teacher(student),
        sampler=sampler,
        views=tiny_views(seed=seed),
        optimizer=torch.optim.AdamW(parameter_groups(student, 0.04), lr=0.0, fused=run_on != "meta"),
    )
    steps = epochs * -(-sampler.iterations // max(1, accumulation_steps))
    settings: dict[str, Any] = {
        "learning_rate": CosineSchedule(1e-3, 1e-5, steps, 1),
        "teacher_temperature": LinearSchedule(0.04, 0.07, sampler.iterations),
        "accumulation_steps": accumulation_steps,
    }
    terms: dict[str, Any] = {
        "global_loss": GlobalAlignmentLoss(CentredTargets(PROTOTYPES)),
        "patch_loss": PatchAlignmentLoss(CentredTargets(PROTOTYPES)),
        "reconstruction_loss": ReconstructionLoss(),
        "reconstruction_weight": 100.0,
        "koleo_loss": None,
        "koleo_weight": 0.1,
    }
    for name, value in changes.items():
        if hasattr(parts, name):
            setattr(parts, name, value)
        else:
            (terms if name in terms else settings)[name] = value
    parts.loss = DiCoMLoss(**terms)
    draw = DrawViewsd(parts.views)
    dataset = KeyedDataset(tiny_volumes(count), Compose([transform, draw]) if transform else draw, seed)
    parts.loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=run_on == "cuda",
    )
    momentum = teacher_momentum or CosineSchedule(0.9, 1.0, epochs * sampler.iterations)
    parts.ema = TeacherEMAHandler(parts.teacher, parts.student, momentum)
    parts.trainer = VoltaTrainer(
        device=device,
        max_epochs=epochs,
        train_data_loader=parts.loader,
        student=parts.student,
        teacher=parts.teacher,
        optimizer=parts.optimizer,
        views=parts.views,
        loss=parts.loss,
        **{"train_handlers": [*handlers, parts.ema], **settings},
    )
    return parts


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding: where large terms cancel, float32 rounds by their size, in each version's own order."""
    assert set(found) == set(expected)
    for name, value in found.items():
        size = 2e-6 * float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], atol=max(1e-5, size), rtol=1e-4, msg=name)


def flat(module: nn.Module) -> dict[str, np.ndarray]:
    """A copy of a module's state as arrays."""
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()}


def record_gradients(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[dict[str, torch.Tensor]]:
    """A list that grows, at every optimiser step, by the gradients that the step is about to use."""
    steps: list[dict[str, torch.Tensor]] = []

    def remember(*_: Any) -> None:
        steps.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(remember)
    return steps


def assert_equal_states(mine: Any, theirs: Any, name: str = "") -> None:
    """Two state dicts are equal to the bit."""
    assert type(mine) is type(theirs), name
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), name
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            if f"{name}/{key}" != "/cost":  # hours and memory are of each run
                assert_equal_states(mine[key], theirs[key], f"{name}/{key}")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs), name
        for i, (a, b) in enumerate(zip(mine, theirs)):
            assert_equal_states(a, b, f"{name}/{i}")
    else:
        assert mine == theirs, name
