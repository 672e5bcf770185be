# SPDX-License-Identifier: Apache-2.0
"""A small hash of what a prepared volume shows: scans that were resampled or rescaled keep nearly the same one.

Exact hashes miss a scan that somebody has resampled, rescaled or saved with 8 bits, and filed under another id. Image
hashing libraries are for flat pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from volta_components.data.identity import loose_person

BITS = 512
# Fingerprints that differ in no more bits are of one scan, most likely. Chosen on heads of ten people and phantoms of
# the template; docs/data/README.md has what ten others gave.
NEAR = 60
_COARSE_MM = 4.0
_SMOOTH_MM = (5.0, 10.0)
_STEP_MM = (12.8, 15.2, 12.8)
_SIDE = 8
_BACKGROUND = 0.06
# Beyond so many pairs, neighbours in several sorted orders are compared instead of all.
_ALL_PAIRS, _ORDERS, _NEIGHBOURS = 20_000_000, 48, 16


def fingerprint(image: np.ndarray, spacing: Sequence[float]) -> str:
    """Hash a prepared volume: whether each of 8 x 8 x 8 places is brighter than what surrounds it.

    Intensities are replaced by their ranks, so that no rising change of contrast matters. Places lie about the window's
    middle and below its top, where ``volta3d prepare`` puts the head, in mm, so that grids can differ.

    Args:
        image: ``[X, Y, Z]`` in [0, 1], RAS.
        spacing: mm of each axis.

    Returns:
        128 hexadecimal digits.
    """
    mm = np.asarray(spacing, float)
    shape = np.array(image.shape)
    factors = np.clip(np.rint(_COARSE_MM / mm).astype(int), 1, shape)
    blocks = image[tuple(slice(n // f * f) for n, f in zip(shape, factors, strict=True))]
    for axis, factor in enumerate(factors):  # one axis after the other: less to add up each time
        split = (*blocks.shape[:axis], -1, factor, *blocks.shape[axis + 1 :])
        blocks = blocks.reshape(split).mean(axis=axis + 1, dtype=np.float32)
    head = blocks > _BACKGROUND
    values = blocks[head]
    ranks = np.zeros(blocks.shape, np.float32)
    ranks[head] = (np.searchsorted(np.sort(values), values, side="right")) / max(1, values.size)
    fine, wide = (ndimage.gaussian_filter(ranks, deviation / (mm * factors)) for deviation in _SMOOTH_MM)
    steps = np.arange(_SIDE) + 0.5
    extent = shape * mm
    along = [extent[axis] / 2 + (steps - _SIDE / 2) * _STEP_MM[axis] for axis in (0, 1)]
    along.append(extent[2] - steps * _STEP_MM[2])
    # From mm above the window's corner to coarse voxels.
    places = [axis / (side * factor) - 0.5 for axis, side, factor in zip(along, mm, factors, strict=True)]
    seen = ndimage.map_coordinates(fine - wide, np.meshgrid(*places, indexing="ij"), order=1, mode="constant")
    return np.packbits(seen.ravel() > 0).tobytes().hex()


def near_copies(first: Sequence[str], second: Sequence[str] | None = None) -> list[tuple[int, int]]:
    """Pairs of fingerprints that are of one scan, most likely.

    Args:
        first: fingerprints.
        second: those to compare them with; by default ``first`` is compared with itself.

    Returns:
        Indices into both. Among more than some thousands, a few pairs near the limit may be missed; the time grows with
        their number, not with its square.
    """
    codes = _words([*first, *(second or ())])
    n = len(first)
    found: set[tuple[int, int]] = set()
    for i, j in _near_pairs(codes, n, second is None):
        low, high = min(i, j), max(i, j)
        if second is None or low < n <= high:
            found.add((low, high if second is None else high - n))
    return sorted(found)


def _words(fingerprints: Sequence[str]) -> np.ndarray:
    """``[8, n]`` uint64."""
    data = bytes.fromhex("".join(fingerprints))
    return np.ascontiguousarray(np.frombuffer(data, np.uint64).reshape(len(fingerprints), BITS // 64).T)


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

    def person(item: Mapping[str, Any]) -> str:
        return loose_person(str(item["patient_id"]), str(item.get("cohort") or ""))

    pairs = [(kept[0][i], kept[-1][j]) for i, j in near_copies(*prints)]
    return [(i, j) for i, j in pairs if person(lists[0][i]) != person(lists[-1][j])]
