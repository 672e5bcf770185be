# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of volumes: copies of a scan are near each other, other heads are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from volta_components.data import fingerprint as module
from volta_components.data.fingerprint import BITS, NEAR, fingerprint, near_copies, near_copies_of
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


def distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


@pytest.fixture(scope="module")
def scans() -> list[np.ndarray]:
    settings = Phantoms(seed=3, spacing=SPACING)
    template = load_template(SPACING)
    people = [draw_subject(settings, number) for number in (1, 2, 3, 4)]
    return [render(who, template, SPACING, scanner_of(settings, who)).image for who in people]


def test_copies_of_a_scan_are_near_and_other_heads_are_not(scans):
    prints = [prepared(scan) for scan in scans]
    assert all(len(each) == BITS // 4 for each in prints)
    for scan, own in zip(scans, prints, strict=True):
        rescaled = (255 * (scan / scan.max()) ** 0.8).astype(np.uint8)
        resampled = ndimage.zoom(scan.astype(np.float32), SPACING / 2, order=1)
        for copy in (prepared(rescaled), prepared(resampled, 2), prepared(scan * 2 + 5 * (scan > 0))):
            assert distance(own, copy) <= NEAR
        # Even though all of them grew from one template.
        assert min(distance(own, other) for other in prints if other != own) > NEAR
    assert near_copies([*prints, prepared(scans[2] * 3)]) == [(2, 4)]


def test_it_follows_ranks_alone_and_needs_no_head():
    image = np.random.default_rng(0).uniform(0.1, 1, (40, 40, 40)).astype(np.float32)
    assert distance(fingerprint(image, (1, 1, 1)), fingerprint(image**1.01, (1, 1, 1))) < 10
    assert fingerprint(np.zeros((8, 9, 10), np.float32), (1, 1, 1)) == "0" * 128


def random_prints(count: int, seed: int) -> list[str]:
    return [each.tobytes().hex() for each in np.random.default_rng(seed).integers(0, 256, (count, 64), np.uint8)]


def changed(print_: str, bits: int) -> str:
    return f"{int(print_, 16) ^ (2**bits - 1):0128x}"


def test_near_ones_are_found_among_few_and_among_many(monkeypatch):
    prints = random_prints(300, 0)
    others = random_prints(200, 1)
    others[7], others[9] = changed(prints[5], NEAR), changed(prints[6], NEAR + 1)
    others[100] = prints[299]
    assert near_copies(prints, others) == [(5, 7), (299, 100)]
    assert near_copies([*prints, *others]) == [(5, 307), (299, 400)]
    monkeypatch.setattr(module, "_ALL_PAIRS", 0)
    assert near_copies(prints, others) == [(5, 7), (299, 100)]
    assert near_copies([*prints, *others]) == [(5, 307), (299, 400)]
    assert near_copies([]) == near_copies(prints, []) == []


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
