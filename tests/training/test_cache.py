# SPDX-License-Identifier: Apache-2.0
"""Cached samples equal fresh ones."""

from __future__ import annotations

import torch
from monai.transforms import Compose, Lambdad, RandGaussianNoised

from volta_components.training.cache import KeyedCacheDataset


def test_cached_samples_equal_fresh_ones_and_depend_on_epoch_and_index_alone() -> None:
    calls: list[int] = []

    def count(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return value.clone()

    transform = Compose([Lambdad("image", count), RandGaussianNoised("image", prob=1.0, std=1.0)])
    items = [{"image": torch.full((1, 2, 2), float(index)), "label": index} for index in range(4)]
    cached = KeyedCacheDataset(items, transform, seed=3)
    fresh = KeyedCacheDataset(items, transform, seed=3, cache=False)
    keys = [(1, 2), (2, 2), (1, 0), (1, 2)]
    samples = [cached[key]["image"] for key in keys]
    assert len(calls) == 2
    for key, sample in zip(keys, samples):
        torch.testing.assert_close(fresh[key]["image"], sample, rtol=0, atol=0)
    torch.testing.assert_close(samples[0], samples[3], rtol=0, atol=0)
    assert not torch.equal(samples[0], samples[1])
    assert cached[(2, 1)]["key"].tolist() == [2, 1]
    cached.fill()
    before = len(calls)
    assert [int(cached[index]["label"]) for index in range(4)] == [0, 1, 2, 3]
    assert len(calls) == before
    assert torch.equal(items[2]["image"], torch.full((1, 2, 2), 2.0))
