# SPDX-License-Identifier: Apache-2.0
"""A small hash of what a prepared volume shows: a scan that was changed keeps a part of it.

Exact hashes miss a scan that somebody has resampled, rescaled or stripped of its skull, and filed under another id.
Where a head lies in its prepared volume follows its outline, which stripping changes. So a fingerprint has several
pieces, each about a place that the image itself determines, deep in the brain, as in Chauvin et al., "Neuroimage
signature from salient keypoints is highly specific to individuals and shared by close relatives" (NeuroImage 2020).
Two volumes that have pieces in common are of one scan, most likely. Image hashing libraries are for flat pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from volta_components.data.identity import loose_person, who

BITS = 512
_DIGITS = BITS // 4
# Volumes are of one scan, most likely, if two of their pieces differ in no more than NEAR bits, or one in no more than
# SURE. Chosen on 20 heads of ten people and 30 phantoms; docs/data/README.md has what 20 heads of ten others gave.
NEAR, SURE = 52, 36
PIECES = 12
_COARSE_MM = 4.0
_SMOOTH_MM = (4.0, 8.0)
# The deep brain: within so many mm of the place that lies so far below the window's top, and behind its middle.
_RADIUS_MM, _BELOW_TOP_MM, _BEHIND_MM = 40.0, 89.0, 10.0
_SIDE, _STEP_MM = 8, 7.0
# Beyond so many pairs, neighbours in several sorted orders are compared instead of all.
_ALL_PAIRS, _ORDERS, _NEIGHBOURS = 100_000_000, 48, 16


def fingerprint(image: np.ndarray, spacing: Sequence[float]) -> str:
    """Hash a prepared volume: what lies about its 12 brightest and darkest blobs deep in the brain.

    A piece is whether each of 8 x 8 x 8 places about a blob is brighter than what surrounds it. Neither depends on the
    volume's grid, or on a linear change of its intensities.

    Args:
        image: ``[X, Y, Z]`` in [0, 1], RAS.
        spacing: mm of each axis.

    Returns:
        128 hexadecimal digits for each blob; nothing where there are none, as in an empty volume.
    """
    blocks, side = _coarse(image, np.asarray(spacing, float))
    fine, wide = (ndimage.gaussian_filter(blocks, deviation / side) for deviation in _SMOOTH_MM)
    contrast = fine - wide
    offsets = (np.arange(_SIDE) - (_SIDE - 1) / 2) * _STEP_MM
    pieces = []
    for place in _blobs(np.abs(contrast), side):
        places = [centre + offsets / mm for centre, mm in zip(place, side, strict=True)]
        seen = ndimage.map_coordinates(contrast, np.meshgrid(*places, indexing="ij"), order=1, mode="nearest")
        pieces.append(np.packbits(seen.ravel() > 0).tobytes().hex())
    return "".join(pieces)


def _coarse(image: np.ndarray, mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of blocks of about 4 mm, and their sides in mm."""
    shape = np.array(image.shape)
    factors = np.clip(np.rint(_COARSE_MM / mm).astype(int), 1, shape)
    blocks = image[tuple(slice(n // f * f) for n, f in zip(shape, factors, strict=True))]
    for axis, factor in enumerate(factors):  # one axis after the other: less to add up each time
        split = (*blocks.shape[:axis], -1, factor, *blocks.shape[axis + 1 :])
        blocks = blocks.reshape(split).mean(axis=axis + 1, dtype=np.float32)
    return blocks, mm * factors


def _blobs(strength: np.ndarray, side: np.ndarray) -> np.ndarray:
    """``[n, 3]`` fractional voxels of the strongest maxima in the deep brain."""
    shape = np.array(strength.shape)
    middle = [shape[0] / 2, shape[1] / 2 - _BEHIND_MM / side[1], shape[2] - _BELOW_TOP_MM / side[2]]
    offsets = np.meshgrid(
        *[(np.arange(n) + 0.5 - at) * mm for n, at, mm in zip(shape, middle, side, strict=True)],
        indexing="ij",
        sparse=True,
    )
    is_deep = sum(offset**2 for offset in offsets) < _RADIUS_MM**2
    inner = np.zeros(strength.shape, bool)
    inner[1:-1, 1:-1, 1:-1] = True
    found = np.argwhere(is_deep & inner & (strength > 0) & (ndimage.maximum_filter(strength, 3) == strength))
    found = found[np.argsort(-strength[tuple(found.T)], kind="stable")[:PIECES]]
    places = found.astype(float)
    for axis, step in enumerate(np.eye(3, dtype=int)):
        # The maximum of the parabola through three neighbours.
        low, here, high = (strength[tuple((found + shift).T)] for shift in (-step, 0 * step, step))
        bend = low - 2 * here + high
        places[:, axis] += np.where(bend < 0, (low - high) / 2 / np.where(bend < 0, bend, 1), 0)
    return places


def near_copies(first: Sequence[str], second: Sequence[str] | None = None) -> list[tuple[int, int]]:
    """Pairs of fingerprints that are of one scan, most likely.

    Args:
        first: fingerprints.
        second: those to compare them with; by default ``first`` is compared with itself.

    Returns:
        Indices into both. Among more than some thousands, a few pairs near the limit may be missed; the time grows with
        their number, not with its square.
    """
    prints = [*first, *(second or ())]
    counts = [len(print_) // _DIGITS for print_ in prints]
    owners = np.repeat(np.arange(len(prints)), counts)
    digits = "".join(print_[: count * _DIGITS] for print_, count in zip(prints, counts, strict=True))
    # [8, n] of n pieces
    codes = np.ascontiguousarray(np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, BITS // 64).T)
    n = len(first)
    common: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for pair in _near_pairs(codes, sum(counts[:n]), second is None):
        a, b = sorted(pair)
        low, high = int(owners[a]), int(owners[b])
        if low < high and (second is None or low < n <= high):
            common[low, high if second is None else high - n].append((a, b))
    return sorted(who for who, pieces in common.items() if _is_enough(codes, pieces))


def _is_enough(codes: np.ndarray, pieces: Sequence[tuple[int, int]]) -> bool:
    """Whether pairs of near pieces make two volumes copies."""
    if len({a for a, _ in pieces}) > 1 and len({b for _, b in pieces}) > 1:
        return True
    return any(int(np.bitwise_count(codes[:, a] ^ codes[:, b]).sum()) <= SURE for a, b in pieces)


def _near_pairs(codes: np.ndarray, n: int, within: bool) -> Iterator[tuple[int, int]]:
    """Indices of columns that are near each other: all pairs of them, or neighbours in sorted orders."""
    total = codes.shape[1]
    if n * (total if within else total - n) <= _ALL_PAIRS:
        for i in range(n):
            first = i + 1 if within else n
            yield from ((i, first + int(j)) for j in np.flatnonzero(_is_near(codes[:, i : i + 1], codes[:, first:])))
        return
    bits = np.unpackbits(np.ascontiguousarray(codes.T).view(np.uint8), axis=1)
    rng = np.random.default_rng(0)
    for _ in range(_ORDERS):
        # 64 random bits decide the order: whoever is nearly the same stands near.
        chosen = np.ascontiguousarray(bits[:, rng.permutation(BITS)[:64]])
        order = np.argsort(np.packbits(chosen, axis=1).view(">u8")[:, 0], kind="stable")
        ordered = codes[:, order]
        for step in range(1, _NEIGHBOURS + 1):
            for k in np.flatnonzero(_is_near(ordered[:, :-step], ordered[:, step:])):
                yield int(order[k]), int(order[k + step])


def _is_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    different = np.zeros(b.shape[1], np.uint16)
    for x, y in zip(a, b, strict=True):
        different += np.bitwise_count(x ^ y)
    return different <= NEAR


def near_copies_of(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]] | None = None
) -> list[tuple[int, int]]:
    """Pairs of items of different people whose volumes are nearly the same; items without fingerprint are skipped.

    Args:
        first: items of a datalist.
        second: items to compare them with; by default ``first`` is compared with itself.

    Returns:
        Indices into both.
    """
    lists = [first] if second is None else [first, second]
    kept = [[i for i, item in enumerate(items) if item.get("fingerprint")] for items in lists]
    prints = [[str(items[i]["fingerprint"]) for i in chosen] for items, chosen in zip(lists, kept, strict=True)]

    pairs = [(kept[0][i], kept[-1][j]) for i, j in near_copies(*prints)]
    return [(i, j) for i, j in pairs if loose_person(*who(lists[0][i])) != loose_person(*who(lists[-1][j]))]
