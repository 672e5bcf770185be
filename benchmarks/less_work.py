# SPDX-License-Identifier: Apache-2.0
"""What saves work without changing the gradient, for ``step.py`` to time: each with and without."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial

import torch
from step_forms import PATCH, Size, ours, volume_of
from torch import Tensor
from torch.nn import functional

from volta_components.method.air import AirTokens, packed_block
from volta_components.method.losses import CentredTargets, PatchAlignmentLoss
from volta_components.method.networks import VoltaViT
from volta_components.method.projection import ProjectionHead, TokenLogits

Form = Callable[[Size, torch.device], Callable[[], None]]


def network_of(size: Size, device: torch.device) -> VoltaViT:
    """The encoder."""
    return VoltaViT(1, size.image, PATCH, size.hidden, 4 * size.hidden, size.layers, size.heads).to(device)


def crops_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two global crops and the local ones."""
    local = functional.interpolate(volume_of(size), size=(size.local,) * 3)
    return volume_of(size).expand(2, -1, -1, -1, -1).to(device), local.expand(size.num_local, -1, -1, -1, -1).to(device)


def two_passes(size: Size, device: torch.device) -> Callable[[], None]:
    """Local crops forth and back, then the global crops, as the trainer does."""
    network, crops = network_of(size, device), crops_of(size, device)

    def step() -> None:
        for part in reversed(crops):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                tokens = network.encode(part)
            tokens.float().square().mean().backward()

    return step


def one_pass(size: Size, device: torch.device) -> Callable[[], None]:
    """All crops in one row of tokens, each attending to itself."""
    network, crops = network_of(size, device), crops_of(size, device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            parts = [network._embed(part) for part in crops]
            lengths = [part.shape[1] for part in parts for _ in range(len(part))]
            tokens = torch.cat([part.flatten(0, 1) for part in parts])
            for block in network.blocks:
                tokens = packed_block(block, tokens, lengths)
            tokens = network.norm(tokens)
        tokens.float().square().mean().backward()

    return step


def teacher(size: Size, device: torch.device, plain: bool) -> Callable[[], None]:
    """The teacher's pass over the global crops: plain in float32 with a graph, or in bfloat16 without one."""
    network, crops = network_of(size, device), crops_of(size, device)[0]

    def step() -> None:
        graph = contextlib.nullcontext() if plain else torch.no_grad()
        with graph, torch.autocast(device.type, dtype=torch.bfloat16, enabled=not plain):
            network.encode(crops)

    return step


def local_logits(size: Size, device: torch.device, plain: bool) -> Callable[[], None]:
    """The head on local crops, forth and back: plain on all tokens, or on the summaries, which the loss takes."""
    head = ProjectionHead(size.hidden, size.head, 256, size.prototypes).to(device)
    tokens = torch.rand(size.num_local, (size.local // 16) ** 3, size.hidden, device=device, requires_grad=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = [head(tokens[:, 0])]
            if plain:
                logits.append(head.patches(tokens).rows())
        torch.stack([part.float().square().mean() for part in logits]).sum().backward()

    return step


def token_losses(size: Size, device: torch.device, plain: bool) -> Callable[[], None]:
    """The patch loss with its gradient: plain on whole arrays, or a few tokens at a time."""
    tokens = math.prod(side // patch for side, patch in zip(size.image, PATCH, strict=True))
    unit, taught = (functional.normalize(torch.randn(2, tokens, 256, device=device), dim=-1) for _ in range(2))
    weight, fixed = (functional.normalize(torch.randn(size.prototypes, 256, device=device), dim=-1) for _ in range(2))
    unit.requires_grad_()
    weight.requires_grad_()
    loss = PatchAlignmentLoss(CentredTargets(size.prototypes)).to(device)

    def step() -> None:
        unit.grad = weight.grad = None
        if plain:
            target = loss.targets(taught @ fixed.T, 0.04)
            (-(target * (unit @ weight.T / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()).backward()
        else:
            loss(TokenLogits(unit, weight), TokenLogits(taught, fixed), 0.04).backward()

    return step


def head_in_air(size: Size) -> Tensor:
    """A volume ``[1, 1, D, H, W]`` of which an ellipsoid is head, and the rest air: 63 % of it."""
    axes = [torch.linspace(-1, 1, side) / radius for side, radius in zip(size.image, (0.84, 0.92, 0.92), strict=True)]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(dim=0)
    return (volume_of(size) * 0.5 + 0.5) * (radius < 1)


def air(size: Size, device: torch.device, plain: bool) -> Callable[[], None]:
    """A whole step on a head in air: plain with all tokens, or without those of air."""
    tokens = None if plain else AirTokens(PATCH)
    return ours(size, device, torch.bfloat16, volume=head_in_air(size), air=tokens).step


def views(size: Size, device: torch.device, plain: bool) -> Callable[[], None]:
    """A whole step: plain with the student's global views together, or one after the other."""
    return ours(size, device, torch.bfloat16, together=plain).step


def kept_share(size: Size) -> tuple[float, float]:
    """Shares of the tokens of global and of local crops that remain without those of air."""
    made = ours(size, torch.device("cpu"), torch.bfloat16, volume=head_in_air(size), air=AirTokens(PATCH))
    kept = next(iter(made.trainer.data_loader))["kept"]
    return float(kept["globals"].any(dim=1).float().mean()), float(kept["locals"].float().mean())


def both(form: Callable[..., Callable[[], None]]) -> tuple[Form, Form]:
    """The plain form of a saving, and the one that does less."""
    return partial(form, plain=True), partial(form, plain=False)


# By name: the plain form, and the one that does less.
PAIRS: dict[str, tuple[Form, Form]] = {
    "local and global crops in one pass, each attending to itself": (two_passes, one_pass),
    "teacher in bfloat16 without a graph": both(teacher),
    "of local crops, logits of the summaries only": both(local_logits),
    "cross-entropy of patch tokens a few at a time": both(token_losses),
    "a whole step, one global view after the other (less memory)": both(views),
    "a whole step without tokens of air (`drop_air.json`)": both(air),
}
