# SPDX-License-Identifier: Apache-2.0
"""Tokens of air that take no part: which they are, and that what remains is what a mask in the attention gives."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import (
    IMAGE,
    PATCH,
    assert_same_gradients,
    make_views,
    record_gradients,
    tiny_network,
    tiny_run,
    tiny_views,
)
from monai.data import list_data_collate
from monai.transforms import Compose
from torch import nn

from volta_components.errors import InputError
from volta_components.method.air import AirTokens, kept_of, packed_block
from volta_components.method.losses import CentredTargets, PatchAlignmentLoss
from volta_components.method.projection import TokenLogits
from volta_components.method.views import CropGeometry, DrawViewsd, plan_crops, sample_crops

AIR = AirTokens(PATCH, 0.05)


class HalfAir:
    """A head in the first part of the volume, air in the rest."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        image = item["image"] * 0.5 + 0.5
        image[:, :, 4:] = 0.0
        return {**item, "image": image}


class NoAir:
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "image": item["image"] * 0.5 + 0.5}


def test_tokens_of_an_upright_crop_by_brute_force(rng: np.random.Generator) -> None:
    """The crop is the volume: a token is kept if a cell within one and a half voxels of its patch is tissue."""
    volume = torch.zeros(1, 24, 28, 20)
    volume[0, 9, 13, 2] = 1.0
    volume[0, 20:, 24:, 16:] = 0.5
    volume[0, 0, 0, 10] = 3.0  # 0.047 of its cell: noise
    kept = AIR.kept(volume, *plan_crops(np.eye(4)[None], volume.shape[1:]), volume.shape[1:])
    cells = volume[0].reshape(6, 4, 7, 4, 5, 4).mean(dim=(1, 3, 5)) > 0.05
    for token, place in zip(kept[0].tolist(), itertools.product(range(6), range(7), range(5)), strict=True):
        near = [
            slice(max(0, (4 * i - 1) // 4), min(n, (4 * i + 4) // 4 + 1)) for i, n in zip(place, (6, 7, 5), strict=True)
        ]
        assert token == bool(cells[tuple(near)].any()), place
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("anywhere", [False, True])
def test_no_token_that_shows_tissue_is_left_out(rng: np.random.Generator, anywhere: bool) -> None:
    """Turned, shifted, coarse and fine crops: what they read of the tissue lies in kept tokens only."""
    tissue = torch.zeros(1, 1, 10, 11, 12)
    tissue[0, 0, 3:6, 4:8, 2:6] = 1.0
    tissue[0, 0, 8, 1, 10] = 1.0
    volume = tissue.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    shape, size = volume.shape[2:], (24, 32, 24)
    geometry = CropGeometry(size, cube_side=(12, 130), rotation=20, translation=5, anywhere=anywhere)
    plan = plan_crops([geometry.draw(shape, rng) for _ in range(30)], shape)
    assert len(set(plan.levels.tolist())) > 2
    kept = AIR.kept(volume[0], *plan, size)
    patches = sample_crops(volume, plan, size).reshape(30, 6, 4, 8, 4, 6, 4).amax(dim=(2, 4, 6)).flatten(1)
    assert not ((patches > 1e-6) & ~kept).any()
    assert (patches > 1e-6).sum() > 0.3 * kept.sum()


def test_what_a_mini_batch_keeps() -> None:
    nothing, everything = torch.zeros(2, 1, 4, dtype=torch.bool), torch.ones(2, 1, 4, dtype=torch.bool)
    some = torch.tensor([[[1, 0, 0, 0]], [[0, 0, 1, 0]]], dtype=torch.bool)
    cpu = torch.device("cpu")
    kept = kept_of({"globals": some, "locals": torch.stack([some[0], nothing[0]])}, cpu)
    assert kept.places is not None
    assert kept.places.tolist() == [0, 2]  # what any crop keeps
    assert kept.in_locals is not None
    assert kept.in_locals.tolist() == [[True, False, False, False], [True] * 4]  # a crop of air keeps all
    for masks in (None, {"globals": everything, "locals": everything}, {"globals": nothing, "locals": nothing}):
        assert kept_of(masks, cpu) == (None, None)


def test_the_loader_hands_it_on() -> None:
    views = tiny_views(num_local=3, air=AIR)
    items = [{"image": torch.rand(1, 10, 14, 14), "key": torch.tensor([1, i])} for i in range(2)]
    batch = list_data_collate([DrawViewsd(views)(item) for item in items])
    assert {name: tuple(mask.shape) for name, mask in batch["kept"].items()} == {
        "globals": (2, 2, 18),
        "locals": (2, 3, 8),
    }


def test_packed_crops_equal_one_at_a_time(rng: np.random.Generator) -> None:
    block = tiny_network().blocks[0]
    lengths = [3, 7, 1, 5]
    tokens = torch.from_numpy(rng.normal(size=(16, 32))).float()
    alone = torch.cat([block(part[None])[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(packed_block(block, tokens, lengths), alone)


def masked_attention(network: Any, crops: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """All tokens of crops; nobody attends to those that are not kept, by the mask of MONAI's own attention."""
    tokens = network._embed(crops)
    for block in network.blocks:
        block.attn.use_flash_attention = False
        tokens = block(tokens, attn_mask=kept)
    return network.norm(tokens)


def summaries(network: Any, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.cat([network.summarise(own[seen][None]) for own, seen in zip(tokens, kept, strict=True)])


def settings(**changes: Any) -> dict[str, Any]:
    """One mini-batch whose gradient can be computed by hand."""
    return {
        "count": 1,
        "epochs": 1,
        "accumulation_steps": 1,
        "learning_rate": lambda step: 0.0,
        "teacher_temperature": lambda step: 0.05,
        "clip_norm": 0.0,
        "frozen_last_layer_epochs": 0,
        **changes,
    }


def test_the_gradient_is_that_of_masked_attention() -> None:
    parts = tiny_run(**settings(views=tiny_views(num_local=3, air=AIR), transform=Compose([HalfAir()])))
    student, teacher = copy.deepcopy(parts.plain_student), copy.deepcopy(parts.teacher)
    item = parts.loader.dataset[(1, 0)]
    in_globals, in_locals = item["kept"]["globals"].any(dim=0).expand(2, -1), item["kept"]["locals"]
    assert 0 < in_globals.sum() < in_globals.numel()
    assert 0 < in_locals.sum() < in_locals.numel()
    gradients = record_gradients(parts.optimizer, parts.plain_student)
    parts.trainer.run()

    views = make_views(parts.views, item["image"][None], [(1, 0)])
    with torch.no_grad():
        taught_tokens = masked_attention(teacher.network, views.teacher[:, 0], in_globals)
        taught = teacher.head(summaries(teacher.network, taught_tokens, in_globals))
        target = (teacher.head.patches(taught_tokens[in_globals]).rows() / 0.05).softmax(-1)
    tokens = masked_attention(student.network, views.student[:, 0], in_globals)
    local_tokens = masked_attention(student.network, views.local[:, 0], in_locals)
    found = torch.cat(
        [summaries(student.network, tokens, in_globals), summaries(student.network, local_tokens, in_locals)]
    )
    logits = student.head(found)
    pairs = [
        nn.functional.cross_entropy(logits[j] / 0.1, (taught[i] / 0.05).softmax(-1))
        for i in range(2)
        for j in range(len(logits))
        if i != j
    ]
    patch = nn.functional.cross_entropy(student.head.patches(tokens[in_globals]).rows() / 0.1, target)
    grid = tuple(side // length for side, length in zip(IMAGE, PATCH, strict=True))
    restored = student.network.decode(tokens, grid)
    in_voxels = np.kron(in_globals[0].view(grid).numpy(), np.ones(PATCH)) > 0
    errors = []
    for v in range(2):
        seen = views.masked[v, 0] & torch.from_numpy(in_voxels)
        errors.append((restored[v] - views.image[v, 0])[seen].square().mean())
    loss = torch.stack(pairs).mean() + patch + 100 * torch.stack(errors).mean()
    loss.backward()
    assert parts.trainer.state.output[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients[0], expected)


def test_without_air_nothing_changes() -> None:
    steps = []
    for air in (None, AIR):
        parts = tiny_run(**settings(views=tiny_views(air=air), transform=Compose([NoAir()]), count=3))
        steps.append(record_gradients(parts.optimizer, parts.plain_student))
        parts.trainer.run()
    assert len(steps[0]) == 3
    for plain, with_option in zip(*steps, strict=True):
        assert all(torch.equal(value, with_option[name]) for name, value in plain.items())


def test_what_is_compared_with_the_volume_before_stays_at_its_place(rng: np.random.Generator) -> None:
    loss = PatchAlignmentLoss(CentredTargets(6))
    seen = []
    for places in ([0, 2], [2, 3]):
        units = torch.from_numpy(rng.normal(size=(1, 2, 6))).float()
        logits = TokenLogits(units, torch.eye(6), torch.tensor(places), 5)
        loss(logits, logits, 0.05)
        seen.append(units[0])
    expected = torch.stack([seen[0][0], torch.zeros(6), seen[1][0], seen[1][1], torch.zeros(6)])
    assert loss.previous is not None
    torch.testing.assert_close(loss.previous, expected)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"air below 1\.5: give a mean intensity"):
        AirTokens(PATCH, 1.5)
    with pytest.raises(InputError, match=r"views#air: patch_size \(8, 8, 8\) is not the network's \(4, 4, 4\)"):
        tiny_run(views=tiny_views(air=AirTokens((8, 8, 8))))
    with pytest.raises(InputError, match="neither compile_blocks nor token_centre"):
        tiny_run(views=tiny_views(air=AIR), compile_blocks=True)
    with pytest.raises(InputError, match="neither compile_blocks nor token_centre"):
        loss = PatchAlignmentLoss(CentredTargets(16), token_centre_momentum=0.9)
        tiny_run(views=tiny_views(air=AIR), patch_loss=loss)
