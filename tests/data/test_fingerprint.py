# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of volumes: copies of a scan are near each other, other heads are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from volta_components.data import fingerprint as module
from volta_components.data.fingerprint import BITS, NEAR, PIECES, SURE, fingerprint, near_copies, near_copies_of
from volta_components.data.phantom.anatomy import load_template
from volta_components.data.phantom.render import render
from volta_components.data.phantom.subjects import Settings as Phantoms
from volta_components.data.phantom.subjects import draw_subject, scanner_of
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.volumes import Volume

SPACING = 3


def prepared(voxels: np.ndarray, spacing: float = SPACING) -> str:
    """The fingerprint of a scan as volta3d prepare would store it."""
    shape = tuple(round(side / spacing) for side in (144, 192, 192))
    affine = np.diag([spacing] * 3 + [1.0])
    volume = Volume(voxels, affine, 1.0, 0.0, 1)
    settings = Settings(spacing=(spacing,) * 3, shape=shape)
    return fingerprint(prepare_volume(volume, settings).image, settings.spacing)


def with_skull(brain: np.ndarray) -> np.ndarray:
    """A brain with dark bone, bright scalp and a face about it."""
    inside = ndimage.binary_closing(np.pad(brain > 0, 12), iterations=4)
    depth = ndimage.distance_transform_edt(~inside, sampling=SPACING)
    head = np.pad(brain, 12).astype(np.float32)
    bright = np.percentile(brain[brain > 0], 95)
    head[(depth > 2) & (depth <= 8)] = 0.05 * bright
    head[(depth > 8) & (depth <= 14)] = 1.2 * bright
    middle = [side // 2 for side in head.shape]
    front = int(np.argwhere(inside)[:, 1].max()) + 4
    face = (slice(middle[0] - 8, middle[0] + 8), slice(front, front + 7), slice(middle[2] - 15, middle[2]))
    head[face] = np.where(depth[face] > 8, 0.7 * bright, head[face])
    return head


@pytest.fixture(scope="module")
def scans() -> list[np.ndarray]:
    settings = Phantoms(seed=3, spacing=SPACING)
    template = load_template(SPACING)
    people = [draw_subject(settings, number) for number in (1, 2, 3, 4)]
    return [render(who, template, SPACING, scanner_of(settings, who)).image for who in people]


def test_copies_of_a_scan_are_near_and_other_heads_are_not(scans):
    prints = [prepared(scan) for scan in scans]
    assert all(len(each) == PIECES * BITS // 4 for each in prints)
    assert near_copies(prints) == []  # even though all of them grew from one template
    same = [(i, i) for i in range(len(scans))]
    rescaled = [(255 * (scan / scan.max()) ** 0.8).astype(np.uint8) for scan in scans]
    resampled = [ndimage.zoom(scan.astype(np.float32), SPACING / 2, order=1) for scan in scans]
    assert near_copies(prints, [prepared(scan) for scan in rescaled]) == same
    assert near_copies(prints, [prepared(scan, 2) for scan in resampled]) == same
    assert near_copies(prints, [prepared(scan * 2 + 5 * (scan > 0)) for scan in scans]) == same


def test_a_scan_is_found_again_after_its_skull_was_taken_off(scans):
    heads = [prepared(with_skull(scan)) for scan in scans]
    brains = [prepared(scan) for scan in scans]
    assert near_copies(heads, brains) == [(i, i) for i in range(len(scans))]


def test_a_volume_without_contrast_has_no_pieces():
    assert fingerprint(np.zeros((8, 9, 10), np.float32), (1, 1, 1)) == ""
    assert near_copies(["", ""]) == near_copies([""], ["0" * 128]) == []


def random_prints(count: int, seed: int) -> list[str]:
    return [each.tobytes().hex() for each in np.random.default_rng(seed).integers(0, 256, (count, 64), np.uint8)]


def changed(print_: str, bits: int) -> str:
    return f"{int(print_, 16) ^ (2**bits - 1):0128x}"


def test_near_ones_are_found_among_few_and_among_many(monkeypatch):
    prints = random_prints(300, 0)
    others = random_prints(200, 1)
    others[7], others[9] = changed(prints[5], SURE), changed(prints[6], SURE + 1)
    others[100] = prints[299]
    assert near_copies(prints, others) == [(5, 7), (299, 100)]
    assert near_copies([*prints, *others]) == [(5, 307), (299, 400)]
    monkeypatch.setattr(module, "_ALL_PAIRS", 0)
    assert near_copies(prints, others) == [(5, 7), (299, 100)]
    assert near_copies([*prints, *others]) == [(5, 307), (299, 400)]
    assert near_copies([]) == near_copies(prints, []) == []


def test_one_piece_that_is_nearly_equal_or_two_that_are_near_are_enough(monkeypatch):
    parts = random_prints(9, 2)
    first = ["".join(parts[:3]), parts[3]]
    near = [changed(parts[1], NEAR), changed(parts[2], NEAR)]
    for limit in (100_000_000, 0):
        monkeypatch.setattr(module, "_ALL_PAIRS", limit)
        for copies, found in (
            ([changed(parts[1], SURE)], [(0, 0)]),
            ([near[0]], []),
            (near, [(0, 0)]),
            ([near[0], near[0]], []),  # one and the same
            ([near[0], changed(parts[2], NEAR + 1)], []),
        ):
            second = ["".join([*parts[4:7], *copies]), parts[8]]
            assert near_copies(first, second) == found
            assert near_copies([*first, *second]) == [(i, j + 2) for i, j in found]
        assert near_copies(["".join([parts[0], changed(parts[0], 2)])]) == []


def test_a_persons_own_scans_and_items_without_fingerprint_are_no_pairs():
    one, two = random_prints(2, 0)
    items = [
        {"patient_id": "sub-1", "cohort": "a", "fingerprint": one},
        {"patient_id": "sub-01", "cohort": "a", "fingerprint": changed(one, 3)},
        {"patient_id": "sub-2", "cohort": "a"},
        {"patient_id": "sub-3", "cohort": "a", "fingerprint": changed(one, 5)},
        {"patient_id": "sub-4", "cohort": "a", "fingerprint": two},
    ]
    assert near_copies_of(items) == [(0, 3), (1, 3)]
    assert near_copies_of(items[:2], items[2:]) == [(0, 1), (1, 1)]
