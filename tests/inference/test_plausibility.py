# SPDX-License-Identifier: Apache-2.0
"""Masks that no hippocampus has are marked."""

import numpy as np
import pytest

from volta_components.inference.plausibility import odd_about_masks

SHAPE = (80, 96, 96)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
CENTRE = np.array([80.0, 96.0, 100.0])  # of the head, mm


def ball(middle, radii):
    points = np.moveaxis(np.indices(SHAPE), 0, -1) * 2.0
    return (((points - middle) / radii) ** 2).sum(-1) < 1


@pytest.fixture(scope="module")
def image():
    """A head 150 mm wide and 190 mm long; its top 90 mm above its centre."""
    return ball(CENTRE, [75, 95, 90]).astype(np.float32) * 0.7


def sides(left=(-26, -14, -12), right=(26, -14, -12), left_radius=1.0, right_radius=1.0):
    mask = np.zeros(SHAPE, np.uint8)
    mask[ball(CENTRE + left, np.array([7, 18, 7]) * left_radius)] = 1
    mask[ball(CENTRE + right, np.array([7, 18, 7]) * right_radius)] = 2
    return mask


def marks(mask, image):
    return odd_about_masks(mask, AFFINE, image, AFFINE)


def test_true_hippocampi_are_not_marked(image):
    mask = sides()
    assert (mask == 1).sum() * 8 / 1000 == pytest.approx(4 / 3 * np.pi * 7 * 18 * 7 / 1000, rel=0.05)  # 3.7 ml
    assert marks(mask, image) == []


@pytest.mark.parametrize("grid", [1.0, 3.0])
def test_the_masks_own_grid_does_not_matter(image, grid):
    fine = np.kron(sides(), np.ones((2, 2, 2), np.uint8)) if grid == 1 else sides()
    affine = np.diag([1.0, 1.0, 1.0, 1.0]) if grid == 1 else np.diag([-2.0, 2.0, 2.0, 1.0])
    if grid == 1:
        affine[:3, 3] = -0.5
    else:
        fine, affine[0, 3] = fine[::-1], 2.0 * (SHAPE[0] - 1)
    assert odd_about_masks(fine, affine, image, AFFINE) == []


def test_volumes_and_their_difference(image):
    assert marks(sides(left_radius=0.5), image) == [
        "left hippocampus of 0.46 ml (1 to 6.5 is usual)",
        "the sides differ by more than a third (0.46 ml left, 3.6 ml right)",
    ]
    assert "right hippocampus of 1" in marks(sides(right_radius=1.5), image)[0]
    assert marks(sides(left_radius=0.8), image)[0].startswith("the sides differ by more than a third")
    assert marks(sides(left_radius=0.9), image) == []
    assert "no right hippocampus was found" in marks(np.where(sides() == 2, 0, sides()).astype(np.uint8), image)
    assert marks(np.zeros(SHAPE, np.uint8), image) == [f"no {side} hippocampus was found" for side in ("left", "right")]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((-70, -14, -12), "from the midline"),
        ((26, -14, -12), "from the midline"),
        ((-26, 70, -12), "from front to back"),
        ((-26, -14, 70), "below the top"),
    ],
)
def test_places_where_no_hippocampus_is(image, place, words):
    (mark,) = marks(sides(left=place, right=(26, -14, -12) if place[0] < 0 else (27, 14, -12)), image)[-1:]
    assert "outside the middle of the head" in mark and words in mark


def test_many_pieces(image):
    mask = sides()
    mask[:, 40:43] = 0
    found = marks(mask, image)
    assert found[0].startswith("left hippocampus in 2 pieces") and found[1].startswith("right hippocampus in 2 pieces")
