# SPDX-License-Identifier: Apache-2.0
"""A step in the style of DINOv2 on volumes, written from the papers' descriptions, for ``step.py`` to time.

After DINOv2 (Oquab et al., 2023) and 3DINO (Xu et al., 2025): dictionary transforms make two global and some local
crops; student and teacher are ViTs with a class token, LayerScale and biases; global and local crops pass together,
each attending to itself; half of the global crops have 10 to 50 % of their patches replaced by a mask token; summaries
are aligned over views (DINO), masked patches with the teacher's (iBOT), both with Sinkhorn-Knopp targets; KoLeo spreads
the summaries; an exponential moving average moves the teacher. Sizes, number of crops, prototypes and precision are
those of this project's step. Stochastic depth is left out: both compute every block.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
from monai.transforms import Compose
from step_forms import PATCH, Size, monai_chain, monai_intensity, our_views, volume_of
from torch import Tensor, nn
from torch.nn import functional

from volta_components.method.networks import resample_position_embedding


class Block(nn.Module):
    """A transformer block with LayerScale, on the tokens of several crops in one row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 1e-5)) for _ in range(2))

    def forward(self, tokens: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Tokens ``[T, D]``, of crops ``(how many, tokens of each)``, one after the other."""
        qkv = self.qkv(self.norm1(tokens)).split([count * length for count, length in shapes])
        attended = []
        for part, (count, length) in zip(qkv, shapes, strict=True):
            query, key, value = part.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            found = functional.scaled_dot_product_attention(query, key, value)
            attended.append(found.transpose(1, 2).reshape(count * length, -1))
        tokens = tokens + self.scale1 * self.out(torch.cat(attended))
        return tokens + self.scale2 * self.mlp(self.norm2(tokens))


class PeerNetwork(nn.Module):
    """ViT with a class token and a mask token, and one head for summaries and patches."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.grid = [side // patch for side, patch in zip(size.image, PATCH, strict=True)]
        self.embed = nn.Linear(math.prod(PATCH), size.hidden)
        self.token, self.masked = (nn.Parameter(torch.zeros(size.hidden)) for _ in range(2))
        self.place = nn.Parameter(0.02 * torch.randn(1, math.prod(self.grid), size.hidden))
        self.blocks = nn.ModuleList(Block(size.hidden, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden)
        widths = [size.hidden, size.head, size.head, 256]
        pairs = itertools.pairwise(widths)
        self.mlp = nn.Sequential(*[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.GELU())][:-1])
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(256, size.prototypes, bias=False))

    def tokens(self, crops: Tensor, masks: Tensor | None) -> Tensor:
        """Class token and patch tokens ``[V, 1 + N, D]`` of crops, those of masked patches replaced."""
        grid = [side // patch for side, patch in zip(crops.shape[2:], PATCH, strict=True)]
        patches = crops.unflatten(4, (grid[2], -1)).unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
        found = self.embed(patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))
        if masks is not None:
            found = torch.where(masks[..., None], self.masked.to(found.dtype), found)
        found = found + resample_position_embedding(self.place, self.grid, grid)
        return torch.cat([self.token.to(found.dtype).expand(len(crops), 1, -1), found], dim=1)

    def forward(self, crops: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
        """Final tokens ``[V, 1 + N, D]`` of each list of crops, all in one pass."""
        parts = [self.tokens(part, mask) for part, mask in zip(crops, masks, strict=True)]
        shapes = [(len(part), part.shape[1]) for part in parts]
        tokens = torch.cat([part.flatten(0, 1) for part in parts])
        for block in self.blocks:
            tokens = block(tokens, shapes)
        found = self.norm(tokens).split([count * length for count, length in shapes])
        return [part.view(*shape, -1) for part, shape in zip(found, shapes, strict=True)]

    def head(self, tokens: Tensor) -> Tensor:
        """Logits ``[rows, K]``."""
        return self.last(functional.normalize(self.mlp(tokens), dim=-1, eps=1e-6))


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """Targets ``[rows, K]`` by three normalisations of columns and rows."""
    q = (logits.float() / temperature).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * len(q)
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows."""
    return -(target * (logits.float() / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()


def koleo(summaries: Tensor) -> Tensor:
    """``-mean(ln(distance to the nearest other summary))``."""
    unit = functional.normalize(summaries.float(), dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-1.0).argmax(dim=1)
    return -((unit - unit[nearest]).norm(dim=-1) + 1e-8).log().mean()


def peer(size: Size, device: torch.device, dtype: torch.dtype, with_our_views: bool = False) -> Callable[[], None]:
    """The peer's step; ``with_our_views``, its crops are this project's, so that networks and losses are compared."""
    student = PeerNetwork(size).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    volume, count = volume_of(size)[0].to(device), math.prod(side // 16 for side in size.image)
    chains = [Compose([monai_chain(size, local), monai_intensity(True)]) for local in (False, True)]

    views = our_views(size, device)

    def by_chain(chain: Compose, number: int) -> Tensor:
        made = [chain({"image": volume})["image"].as_tensor() for _ in range(number)]
        return torch.stack(made).to(device)

    def crops() -> tuple[Tensor, Tensor]:
        if not with_our_views:
            return by_chain(chains[0], 2), by_chain(chains[1], size.num_local)
        made = views()
        return made.student[:, 0], made.local[:, 0]

    def step() -> None:
        large, small = crops()
        masks = torch.rand(2, count) < 0.1 + 0.4 * torch.rand(1)
        masks[1] = False  # half of the crops are masked
        masks = masks.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                taught = teacher([large], [None])[0]
                targets = sinkhorn(teacher.head(taught[:, 0]), 0.07)
                patch_targets = sinkhorn(teacher.head(taught[:, 1:][masks]), 0.07)
            found = student([large, small], [masks, None])
            logits = student.head(torch.cat([part[:, 0] for part in found]))
            patch_logits = student.head(found[0][:, 1:][masks])
        pairs = [cross_entropy(targets[i], logits[j]) for i in range(2) for j in range(len(logits)) if i != j]
        loss = torch.stack(pairs).mean() + cross_entropy(patch_targets, patch_logits) + 0.1 * koleo(found[0][:, 0])
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.006)
        loss.item()

    return step
