# SPDX-License-Identifier: Apache-2.0
"""Where a head is cut; most of it is tested with whole scans, in test_survey.py."""

import numpy as np

from volta_components.data.cuts import find_cuts


def test_a_foreground_of_a_few_voxels_is_no_head(rng):
    """It may vanish on the coarser grid on which planes are looked for."""
    foreground = np.zeros((12, 12, 12), bool)
    foreground[5, 6, 7] = True
    assert find_cuts(foreground, rng.random(foreground.shape), np.ones(3)) == []
