# SPDX-License-Identifier: Apache-2.0
"""What ``step.py`` times: this project's step, the stock form of it, their views, and the rate of a matrix product."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai import transforms as t
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import ViTAutoEnc
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from volta_components.distributed import process_count
from volta_components.method.air import AirTokens
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
from volta_components.method.projection import ProjectionHead
from volta_components.method.trainer import VoltaTrainer
from volta_components.method.views import CropGeometry, DrawViewsd, IntensityAugment, ViewGenerator, Views
from volta_components.training.sampling import KeyedDataLoader, KeyedDataset


class Size(NamedTuple):
    """Sizes of crops and networks."""

    image: tuple[int, int, int]
    local: int
    num_local: int
    hidden: int
    layers: int
    heads: int
    head: int
    prototypes: int


SIZES = {
    "tiny": Size((32, 48, 48), 32, 2, 64, 2, 4, 64, 128),
    "small": Size((80, 96, 96), 48, 8, 384, 6, 6, 1024, 4096),
    "paper": Size((144, 192, 192), 96, 8, 768, 12, 12, 2048, 8192),
}
PATCH = (16, 16, 16)


def halved(size: Size) -> Size:
    """What ``crops_96.json`` makes of the paper's size: global cubes of half a side, and local ones of half a side."""
    side, local = (-(-whole // 32) * 16 for whole in (size.image[1], size.local))
    return size._replace(image=(side,) * 3, local=local)


def volume_of(size: Size) -> Tensor:
    """A smooth random volume ``[1, 1, D, H, W]`` in [0, 1]."""
    coarse = torch.rand(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(coarse, size=size.image, mode="trilinear")


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of this process's computing on a CPU; on a GPU, seconds by the wall once it has finished."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def gemm_rate(dtype: torch.dtype, device: torch.device, volumes: int = 1) -> float:
    """FLOPs a second of this machine's matrix product at a size of the network's own MLP, the best of ten."""
    rows = 2592 * volumes
    a, b = torch.rand(rows, 768, device=device).to(dtype), torch.rand(768, 3072, device=device).to(dtype)
    count = 5 if device.type == "cpu" else 200  # so that waiting for a GPU does not count

    def products() -> None:
        for _ in range(count):
            a @ b

    run = products
    if device.type == "cuda":
        # Recorded: a GPU computes a product faster than Python starts the next one.
        products()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread pins memory meanwhile
            products()
        run = graph.replay
    best, clock = math.inf, clock_of(device)
    for _ in range(10):
        started = clock()
        run()
        best = min(best, (clock() - started) / count)
    return 2 * rows * 768 * 3072 / best


def generator_of(size: Size) -> ViewGenerator:
    """The views of ``train.json``."""
    return ViewGenerator(
        CropGeometry(size.image, zoom=(0.95, 1.05), rotation=5, translation=4),
        CropGeometry((size.local,) * 3, cube_side=(size.image[1] / 3, size.image[1]), rotation=5, anywhere=True),
        size.num_local,
        IntensityAugment(0.01, 0.05, 1.05, 0.02, 0.01, 0.5, 0.1),
        IntensityAugment(0.05, 0.1, 1.15, 0.1, 0.03, 1.0, 0.3),
        GroupMask(),
    )


def our_views(size: Size, device: torch.device) -> Callable[[], Views]:
    """This project's views of one volume, the drawing included, which training leaves to the loader's workers."""
    views, volume, count = generator_of(size), volume_of(size).to(device), iter(range(10**6))

    def step() -> Views:
        return views(volume, default_collate([views.draw(size.image, (1, next(count)))]))

    return step


def monai_chain(size: Size, local: bool) -> t.Compose:
    """A dictionary transform that makes one global or local crop; of a local one it computes no more than that crop."""
    turned = {"rotate_range": [math.radians(5)] * 3, "padding_mode": "zeros", "mode": "bilinear", "prob": 1.0}
    if not local:
        return t.Compose([t.RandAffined(["image"], translate_range=[4] * 3, scale_range=[0.05] * 3, **turned)])
    anywhere = [(side - size.local) / 2 for side in size.image]
    zoom = [(-0.4, 0.4)] * 3
    crop = t.RandAffined(
        ["image"], spatial_size=(size.local,) * 3, translate_range=anywhere, scale_range=zoom, **turned
    )
    return t.Compose([crop])


def monai_intensity(strong: bool) -> t.Compose:
    """Dictionary transforms that change a crop as a teacher's or a student's view."""
    keys, factor = ["image"], 5.0 if strong else 1.0
    chain = [
        t.RandGaussianSmoothd(keys, *[(0.2, 1.0 if strong else 0.5)] * 3, prob=0.3 if strong else 0.1),
        t.RandAdjustContrastd(keys, prob=1.0, gamma=(1 / (1 + 0.03 * factor), 1 + 0.03 * factor)),
        t.RandBiasFieldd(keys, prob=1.0, coeff_range=(0.0, 0.02 * factor)),
        t.RandScaleIntensityd(keys, 0.02 * factor, prob=1.0),
        t.RandShiftIntensityd(keys, 0.01 * factor, prob=1.0),
        t.RandGaussianNoised(keys, prob=1.0, std=0.006 * factor),
    ]
    return t.Compose(chain)


class MonaiViews:
    """The views of one volume by dictionary transforms."""

    def __init__(self, size: Size, device: torch.device) -> None:
        # On a GPU MONAI's transforms compute there, as in its tutorial on fast training.
        self.size, self.device, self.volume = size, device, volume_of(size)[0].to(device)
        self.crop, self.local = monai_chain(size, False), monai_chain(size, True)
        self.mild, self.strong = monai_intensity(False), monai_intensity(True)
        boxes = [max(4, int(0.3 * side)) for side in size.image]
        self.holes = t.RandCoarseDropoutd(["image"], 60, [4] * 3, fill_value=0.0, max_spatial_size=boxes, prob=1.0)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Original, teacher's and student's crops ``[2, 1, D, H, W]``, and local crops ``[L, 1, d, h, w]``."""
        original, teacher, student = [], [], []
        for _ in range(2):
            crop = self.crop({"image": self.volume})["image"]
            original.append(crop)
            teacher.append(self.mild({"image": crop})["image"])
            student.append(self.holes(self.strong({"image": crop}))["image"])
        local = [self.local({"image": self.volume})["image"] for _ in range(self.size.num_local)]
        parts = (original, teacher, student, local)
        a, b, c, d = (torch.stack([crop.as_tensor() for crop in part]).to(self.device) for part in parts)
        return a, b, c, d


def monai_views(size: Size, device: torch.device) -> Callable[[], None]:
    """Dictionary transforms' views of one volume."""
    views = MonaiViews(size, device)

    def step() -> None:
        views()

    return step


class StockNetwork(nn.Module):
    """``ViTAutoEnc`` with a summary by a whole transformer block and a projection head, one view a pass."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        sizes = {"hidden_size": size.hidden, "mlp_dim": 4 * size.hidden}
        self.vit = ViTAutoEnc(1, size.image, PATCH, num_layers=size.layers, num_heads=size.heads, **sizes)
        self.token = nn.Parameter(torch.zeros(1, 1, size.hidden))
        self.block = TransformerBlock(size.hidden, 4 * size.hidden, 8)
        self.head = ProjectionHead(size.hidden, size.head, 256, size.prototypes)
        self.grid = [side // patch for side, patch in zip(size.image, PATCH, strict=True)]

    def forward(self, crop: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of summary and tokens of one view ``[1, 1, D, H, W]``, and what it restores if it is a global one."""
        if list(crop.shape[2:]) == list(self.vit.img_size):
            image, hidden = self.vit(crop)
            tokens = self.vit.norm(hidden[-1])
        else:
            image, embedding = None, self.vit.patch_embedding
            tokens = embedding.patch_embeddings(crop).flatten(2).transpose(1, 2)
            places = embedding.position_embeddings.transpose(1, 2).unflatten(2, self.grid)
            new = [side // patch for side, patch in zip(crop.shape[2:], PATCH, strict=True)]
            tokens = tokens + functional.interpolate(places, size=new, mode="trilinear").flatten(2).transpose(1, 2)
            for block in self.vit.blocks:
                tokens = block(tokens)
            tokens = self.vit.norm(tokens)
        summary = self.block(torch.cat([self.token, tokens], dim=1))[:, 0]
        return self.head(summary), self.head.patches(tokens).rows(), image


def stock(size: Size, device: torch.device) -> Callable[[], None]:
    """The stock form of a step."""
    student = StockNetwork(size).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    views, centres = MonaiViews(size, device), [torch.zeros(size.prototypes, device=device) for _ in range(2)]

    def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()

    def step() -> None:
        original, mild, strong, local = views()
        masked = strong == 0
        optimizer.zero_grad()
        with torch.no_grad():
            taught = [teacher(crop) for crop in mild.split(1)]
        learnt = [student(crop) for crop in [*strong.split(1), *local.split(1)]]
        targets = [((out[0] - centres[0]) / 0.04).softmax(dim=-1) for out in taught]
        pairs = [
            cross_entropy(target, out[0]) for i, target in enumerate(targets) for j, out in enumerate(learnt) if i != j
        ]
        loss = torch.stack(pairs).mean()
        for own, other in zip(taught, learnt[:2], strict=True):
            loss = loss + cross_entropy(((own[1] - centres[1]) / 0.04).softmax(dim=-1), other[1]) / 2
        for i in range(2):
            loss = loss + 50 * (learnt[i][2][0] - original[i])[masked[i]].square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            for centre, place in zip(centres, (0, 1), strict=True):
                centre.lerp_(torch.cat([out[place] for out in taught]).mean(dim=0), 0.1)
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.mul_(0.996).add_(theirs, alpha=0.004)
        loss.item()

    return step


class Ours(NamedTuple):
    """This project's step, by its own trainer.

    Attributes:
        step: does a mini-batch; the last one of an accumulation window steps the optimiser.
        trainer: whose step it is.
    """

    step: Callable[[], None]
    trainer: VoltaTrainer


def ours(
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    window: int = 1,
    folder: Path | None = None,
    volume: Tensor | None = None,
    air: AirTokens | None = None,
    together: bool | None = None,
    graph: bool = True,
    batch: int = 1,
) -> Ours:
    """This project's step; with a folder, volumes are read from files there, as ``train.json`` reads them."""
    network = VoltaViT(1, size.image, PATCH, size.hidden, 4 * size.hidden, size.layers, size.heads)
    plain = VoltaStudent(network, ProjectionHead(size.hidden, size.head, 256, size.prototypes)).to(device)
    teacher = make_teacher(plain)
    student = DistributedDataParallel(plain) if process_count() > 1 else plain
    views = dataclasses.replace(generator_of(size), air=air)
    volume = volume_of(size) if volume is None else volume
    items: list[dict[str, Any]] = [{"image": volume[0]}] * 1024 * process_count()
    transform: Any = DrawViewsd(views)
    if folder is not None:
        paths = [folder / f"{i}.nii" for i in range(4)]
        for path in paths:
            nib.Nifti1Image(volume[0, 0].numpy(), np.eye(4)).to_filename(path)
        items = [{"image": str(path)} for path in paths] * 256
        load = t.LoadImaged("image", reader="volta_components.data.load.ShardReader", ensure_channel_first=True)
        transform = t.Compose([load, transform])
    data = KeyedDataset(items, transform)
    trainer = VoltaTrainer(
        device,
        1,
        # Beside a GPU, workers load and draw, as in a training; on a CPU their work would be counted to none.
        KeyedDataLoader(data, batch, shuffle=True, num_workers=0 if device.type == "cpu" else 6),
        student,
        teacher,
        torch.optim.AdamW(parameter_groups(plain, 0.04), lr=1e-4, fused=True),
        views,
        DiCoMLoss(
            GlobalAlignmentLoss(CentredTargets(size.prototypes, 0.7, 0.7)),
            PatchAlignmentLoss(CentredTargets(size.prototypes, 0.9, 0.6)),
            ReconstructionLoss(),
        ),
        learning_rate=lambda _: 1e-4,
        teacher_temperature=lambda _: 0.04,
        accumulation_steps=window,
        frozen_last_layer_epochs=0,
        amp=dtype != torch.float32,
        log_interval=8,
        compile_blocks=compiled,
        views_together=device.type == "cuda" if together is None else together,
        cuda_graph=graph and device.type == "cuda" and air is None,
        train_handlers=[TeacherEMAHandler(teacher, plain, lambda _: 0.996)],
    )
    trainer.state.epoch, trainer.state.iteration = 1, 0
    batches = iter(trainer.data_loader)

    def step() -> None:
        trainer.state.iteration += 1
        trainer._iteration(trainer, next(batches))

    return Ours(step, trainer)


def flops_of(step: Callable[[], None]) -> float:
    """The FLOPs that PyTorch counts in a step."""
    aten = torch.ops.aten
    counts: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        step()
    return float(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
