# SPDX-License-Identifier: Apache-2.0
"""The group mask: coverage, box sides, fills."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from volta_components.errors import InputError
from volta_components.method.masking import NOISE, VISIBLE, ZEROS, GroupMask

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "cell", "draws"),
    [
        ((144, 192, 192), 4, 20),  # the paper's globals
        ((96, 96, 96), 4, 20),
        ((48, 64, 64), 2, 20),  # the quick start's
        ((144, 192, 192), (16, 16, 16), 40),  # aligned to patches
        ((30, 41, 37), 4, 40),  # sides that the cells do not divide
        ((29, 31, 23), (5, 3, 4), 40),
        ((24, 32, 32), 1, 10),
    ],
)
def test_between_50_and_60_percent_are_covered(
    rng: np.random.Generator, shape: tuple[int, ...], cell: Any, draws: int
) -> None:
    mask = GroupMask(cell=cell)
    shares = [
        float((mask.enlarge(torch.from_numpy(mask.draw(shape, rng)), shape) != VISIBLE).float().mean())
        for _ in range(draws)
    ]
    assert min(shares) >= 0.5
    assert max(shares) <= 0.6


def test_other_coverages(rng: np.random.Generator) -> None:
    for coverage in (0.1, 0.75, 0.95):
        share = float((GroupMask(coverage, cell=2).draw((48, 64, 64), rng) != VISIBLE).mean())
        assert coverage <= share <= coverage + 0.1


@pytest.mark.parametrize(
    ("shape", "cell", "low", "high"),
    [
        ((40, 60, 80), 1, 0.05, 0.3),
        ((40, 60, 80), 1, 0.2, 0.5),
        ((40, 60, 80), 2, 0.1, 0.1),
        ((50, 61, 83), 4, 0.05, 0.3),
        ((144, 192, 192), 16, 0.05, 0.3),
    ],
)
def test_sides_of_boxes(rng: np.random.Generator, shape: tuple[int, ...], cell: int, low: float, high: float) -> None:
    """With next to no coverage wanted, a draw is a single box."""
    mask = GroupMask(1e-9, low, high, cell=cell)
    seen: list[set[int]] = [set(), set(), set()]
    for _ in range(300):
        labels = mask.draw(shape, rng)
        places = np.argwhere(labels)
        sides = places.max(axis=0) - places.min(axis=0) + 1
        assert np.prod(sides) == len(places)  # a box indeed
        for axis in range(3):
            seen[axis].add(int(sides[axis]))
    for axis, side in enumerate(shape):
        largest = max(seen[axis]) * cell
        assert largest <= high * side + 1e-9  # at most 30 % of the side, whatever the cell
        assert largest > high * side - cell - 1  # and the bound is reached
        assert abs(min(seen[axis]) * cell - low * side) <= max(cell, 1)


def test_boxes_go_everywhere(rng: np.random.Generator) -> None:
    mask = GroupMask(cell=2)
    shape = (20, 24, 24)
    share = np.mean([mask.draw(shape, rng) != VISIBLE for _ in range(300)], axis=0)
    assert share.min() > 0.02  # a corner is met least, but it is met
    assert share.max() < 0.95


def test_both_fills_occur(rng: np.random.Generator) -> None:
    shape = (48, 64, 64)
    labels = np.stack([GroupMask(cell=4).draw(shape, rng) for _ in range(40)])
    assert set(np.unique(labels)) == {VISIBLE, ZEROS, NOISE}
    noise = (labels == NOISE).sum() / (labels != VISIBLE).sum()
    assert noise == pytest.approx(0.5, abs=0.08)
    assert not (GroupMask(cell=4, noise_share=0.0).draw(shape, rng) == NOISE).any()
    assert not (GroupMask(cell=4, noise_share=1.0).draw(shape, rng) == ZEROS).any()


def test_enlarging_follows_the_cells(rng: np.random.Generator) -> None:
    mask = GroupMask(max_side=0.5, cell=(2, 3, 4))
    shape = (7, 8, 9)
    labels = mask.draw(shape, rng)
    assert labels.shape == (4, 3, 3)
    voxels = mask.enlarge(torch.from_numpy(labels), shape).numpy()
    assert voxels.shape == shape
    for index in np.ndindex(*shape):
        assert voxels[index] == labels[index[0] // 2, index[1] // 3, index[2] // 4]


def test_fill_values(rng: np.random.Generator) -> None:
    image = torch.tensor(rng.uniform(0.2, 0.8, (1, 1, 9, 10, 11)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(0, 3, image.shape), dtype=torch.uint8)
    normal = torch.tensor(rng.normal(scale=2.0, size=image.shape), dtype=torch.float32)
    before = image.clone()
    filled = GroupMask.fill(image, labels, normal)
    assert torch.equal(image, before)
    assert torch.equal(filled[labels == VISIBLE], image[labels == VISIBLE])
    assert (filled[labels == ZEROS] == 0).all()
    # N(0, 1) mapped so that three deviations reach the ends of the intensity range.
    expected = np.clip(normal.numpy() / 6 + 0.5, 0, 1)[(labels == NOISE).numpy()]
    np.testing.assert_allclose(filled[labels == NOISE].numpy(), expected, atol=1e-6)


def test_same_seed_same_mask() -> None:
    mask = GroupMask()
    first, again, other = (mask.draw((48, 64, 64), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "settings", [{"coverage": 0}, {"coverage": 1}, {"min_side": 0.4}, {"max_side": 1.1}, {"noise_share": -0.1}]
)
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(
        InputError, match=next(iter(settings)).split("_")[0] if "side" not in str(settings) else "sides"
    ):
        GroupMask(**settings)


def test_a_cell_larger_than_the_largest_box_is_refused(rng: np.random.Generator) -> None:
    """Otherwise the smallest box would break the bound that the paper sets on its side."""
    with pytest.raises(InputError, match=r"larger than the largest box, 0\.3 of a crop of 48x64x64"):
        GroupMask(cell=16).draw((48, 64, 64), rng)
    GroupMask(cell=14).draw((48, 64, 64), rng)
