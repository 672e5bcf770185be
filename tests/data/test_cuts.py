# SPDX-License-Identifier: Apache-2.0
"""Where a head is cut; most of it is tested with whole scans, in test_survey.py."""

import numpy as np
import pytest

from volta_components.data.cuts import FACES, find_cuts


def test_a_foreground_of_a_few_voxels_is_no_head(rng):
    """It may vanish on the coarser grid on which planes are looked for."""
    foreground = np.zeros((12, 12, 12), bool)
    foreground[5, 6, 7] = True
    assert find_cuts(foreground, rng.random(foreground.shape), np.ones(3)) == []


@pytest.mark.parametrize("side", ["left", "right", "back", "top"])
def test_a_slab_of_eight_millimetres_that_is_cut_off_is_marked_and_a_whole_head_is_not(rng, side):
    mm = np.full(3, 2.0)
    places = np.moveaxis(np.indices((72, 90, 82)), 0, -1) * 2.0 - [71, 89, 81]
    head = ((places / [70, 88, 80]) ** 2).sum(-1) < 1
    coarse = 300 * head + rng.rayleigh(5, head.shape)
    # The field of view ends where the head does.
    box = tuple(slice(int(index.min()), int(index.max()) + 1) for index in np.nonzero(head))
    assert find_cuts(head[box], coarse[box], mm) == []
    axis, place = FACES[side]
    part = (slice(None),) * axis + (slice(None, -4) if place else slice(4, None),)
    (mark,) = find_cuts(head[box][part], coarse[box][part], mm)
    assert mark.startswith(f"the field of view ends within the head at the {side}")
