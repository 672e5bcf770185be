# SPDX-License-Identifier: Apache-2.0
"""Cost of one pretraining step at the paper's size: this code in fp32 and bf16, and the stock network, side by side.

The variants take turns, each turn in a process of its own, so that all meet the same machine and a peak of memory is a
variant's own. What is printed are the fastest turns, their ratios, and the peaks of resident memory. Run with
``--small`` for a network that takes seconds rather than minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from monai.networks.nets import ViTAutoEnc
from torch import Tensor, nn

from volta_components.method.ema import TeacherEMAHandler
from volta_components.method.losses import (
    CentredTargets,
    DiCoMLoss,
    GlobalAlignmentLoss,
    PatchAlignmentLoss,
    ReconstructionLoss,
)
from volta_components.method.networks import VoltaStudent, VoltaViT, make_teacher, parameter_groups
from volta_components.method.projection import ProjectionHead


def volta_step(
    global_size: tuple[int, int, int],
    local_size: int,
    num_local: int,
    network: VoltaViT,
    out_dim: int,
    dtype: torch.dtype | None,
) -> Callable[[], None]:
    """One whole step of this project: teacher, student, three losses, backward, optimiser, teacher update."""
    student = VoltaStudent(network, ProjectionHead(in_dim=network.config["hidden_size"], out_dim=out_dim))
    teacher = make_teacher(student)
    ema = TeacherEMAHandler(teacher, student, lambda _: 0.996)
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.04), lr=1e-4)
    losses = DiCoMLoss(
        GlobalAlignmentLoss(CentredTargets(out_dim)), PatchAlignmentLoss(CentredTargets(out_dim)), ReconstructionLoss()
    )
    images = torch.rand(2, 1, *global_size)
    local = torch.rand(num_local, 1, *[local_size] * 3)
    masked = torch.rand(2, 1, *global_size) < 0.5

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            taught = teacher(images)
            learnt = student(images.masked_fill(masked, 0.0), local)
        losses(learnt, taught, images[:, None], masked[:, None], 0.04, 0.04)["loss"].backward()
        optimizer.step()
        ema.update(0.996)

    return step


def stock_step(global_size: tuple[int, int, int], local_size: int, num_local: int, config: dict) -> Callable[[], None]:
    """The encoder passes of the same step with the stock network: one pass a view, full attention maps, no losses."""

    def build(size: tuple[int, int, int]) -> nn.Module:
        names = ("in_channels", "patch_size", "hidden_size", "mlp_dim", "num_layers", "num_heads")
        options = {name: config[name] for name in names}
        return ViTAutoEnc(img_size=size, **options)

    network, local_network, teacher = build(global_size), build((local_size,) * 3), build(global_size)
    optimizer = torch.optim.AdamW([*network.parameters(), *local_network.parameters()], lr=1e-4)
    images = torch.rand(2, 1, *global_size)
    local = torch.rand(num_local, 1, *[local_size] * 3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for image in images.split(1):
                teacher(image)
        outputs: list[Tensor] = [network(image)[0].square().mean() for image in images.split(1)]
        outputs += [local_network(crop)[0].square().mean() for crop in local.split(1)]
        torch.stack(outputs).sum().backward()
        optimizer.step()

    return step


VARIANTS = ("this project, fp32", "this project, bf16 autocast", "stock ViTAutoEnc, fp32, a pass a view, no losses")


def sizes(small: bool) -> tuple[tuple[int, int, int], int, int, int, dict]:
    """Global size, local size, local crops, prototypes, and the network's configuration."""
    size, local, count, out_dim = (144, 192, 192), 96, 8, 8192
    config = {
        "in_channels": 1,
        "img_size": size,
        "patch_size": (16, 16, 16),
        "hidden_size": 768,
        "mlp_dim": 3072,
        "num_layers": 12,
        "num_heads": 12,
    }
    if small:
        size, local, count, out_dim = (64, 64, 64), 32, 4, 512
        config |= {"img_size": size, "hidden_size": 192, "mlp_dim": 768, "num_layers": 4, "num_heads": 4}
    return size, local, count, out_dim, config


def turn(variant: int, small: bool) -> None:
    """One warm-up step and a timed one; prints seconds and the peak of resident memory as JSON."""
    size, local, count, out_dim, config = sizes(small)
    if variant == 2:
        step = stock_step(size, local, count, config)
    else:
        step = volta_step(size, local, count, VoltaViT(**config), out_dim, (None, torch.bfloat16)[variant])
    step()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small network, for a quick look")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--variant", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        turn(options.variant, options.small)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.turns):
        for number, name in enumerate(VARIANTS):
            command = [sys.executable, __file__, "--variant", str(number), *(["--small"] if options.small else [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    size, local, count, _, _ = sizes(options.small)
    seconds = {name: min(item["seconds"] for item in turns) for name, turns in found.items()}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    crops = f"globals 2 x {'x'.join(map(str, size))}, locals {count} x {local}^3"
    print(f"| one step, {crops} | s | times fp32's speed | GiB |")
    print("|---|---|---|---|")
    for name, value in seconds.items():
        peak = max(item["gib"] for item in found[name])
        print(f"| {name} | {value:.2f} | {seconds[VARIANTS[0]] / value:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
