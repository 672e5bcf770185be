# SPDX-License-Identifier: Apache-2.0
"""Order and randomness of samples: the same after a restart, with more workers, and in more processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Lambdad, LoadImaged, RandGaussianNoised, RandScaleIntensityd
from prepared import make_prepared
from torch.utils.data import DataLoader

from volta_components.data.datalist import load_datalist
from volta_components.errors import InputError, describe
from volta_components.training import sampling
from volta_components.training.cache import KeyedCacheDataset
from volta_components.training.sampling import KeyedDataLoader, KeyedDataset, ResumableSampler, derived_seed


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    sampler = ResumableSampler(11, seed=3)
    orders = []
    for epoch in (1, 2, 3):
        sampler.set_position(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        orders.append([index for _, index in pairs])
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] != orders[1] != orders[2]
    assert list(ResumableSampler(11, seed=4)) != list(ResumableSampler(11, seed=3))
    assert [i for _, i in ResumableSampler(5, shuffle=False)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_resuming_in_the_middle_of_an_epoch(batch: int) -> None:
    whole = ResumableSampler(11, seed=3, batch_size=batch)
    whole.set_position(4)
    expected = list(DataLoader(KeyedDataset([{}] * 11), batch_size=batch, sampler=whole, collate_fn=list))
    assert len(expected) == whole.iterations
    rest = ResumableSampler(11, seed=3, batch_size=batch)
    rest.set_position(4, 2)
    actual = list(DataLoader(KeyedDataset([{}] * 11), batch_size=batch, sampler=rest, collate_fn=list))
    assert [[item["key"].tolist() for item in b] for b in actual] == [
        [item["key"].tolist() for item in b] for b in expected[2:]
    ]


@pytest.mark.parametrize("count", [8, 7])
def test_two_processes_with_batch_one_see_what_one_with_batch_two_sees(count: int) -> None:
    one = list(ResumableSampler(count, seed=1, batch_size=2))
    ranks = [list(ResumableSampler(count, seed=1, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 4  # else one would wait for the other for ever
    together = [pair for step in zip(*ranks) for pair in step]
    assert together[:count] == one
    if count == 7:
        assert together[7] == one[0]  # filled up with the first of the order


def test_replicas_share_out_every_sample() -> None:
    seen = []
    for rank in range(3):
        sampler = ResumableSampler(20, batch_size=2, num_replicas=3, rank=rank)
        assert sampler.iterations == 4
        own = [index for _, index in sampler]
        assert len(own) == len(sampler) == 8
        seen += own
    assert set(seen) == set(range(20))
    assert len(seen) == 24


def test_weights_are_chances() -> None:
    sampler = ResumableSampler(4, weights=[1, 0, 3, 4])
    drawn = []
    for epoch in range(1, 1501):
        sampler.set_position(epoch)
        drawn += [index for _, index, _ in sampler]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [1 / 8, 0, 3 / 8, 4 / 8], atol=0.025)


def test_a_sample_that_is_drawn_twice_in_an_epoch_has_two_keys() -> None:
    sampler = ResumableSampler(6, weights=[1, 1, 1, 1, 1, 20])
    keys = list(sampler)
    assert len({*keys}) == len(keys) == 6
    assert max(index for _, index, _ in keys) == 5
    repeats = [repeat for _, index, repeat in keys if index == 5]
    assert repeats == list(range(len(repeats)))
    assert len(repeats) > 1
    rest = ResumableSampler(6, weights=[1, 1, 1, 1, 1, 20])
    rest.set_position(1, 4)
    assert list(rest) == keys[4:]  # counted from the epoch's begin, wherever one starts
    dataset = KeyedDataset([{"image": torch.zeros(1, 4, 4, 4)}] * 6, RandGaussianNoised("image", prob=1.0), seed=0)
    first, second = (dataset[(1, 5, repeat)] for repeat in (0, 1))
    assert first["key"].tolist() == [1, 5, 0]
    assert not torch.equal(first["image"], second["image"])


def test_lengths() -> None:
    sampler = ResumableSampler(7, batch_size=2)
    assert (sampler.iterations, len(sampler)) == (4, 7)
    assert len(DataLoader(KeyedDataset([{}] * 7), batch_size=2, sampler=sampler)) == 4


def test_derived_seeds_are_stable_and_differ() -> None:
    seeds = {derived_seed(0, "views", epoch, index) for epoch in range(20) for index in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "views", 1, 2) != derived_seed(0, "order", 1, 2)
    # Pinned: a change would make every run irreproducible. SHA-256 of "7/order/1": 8 bytes, little-endian, halved.
    expected = int.from_bytes(hashlib.sha256(b"7/order/1").digest()[:8], "little") // 2
    assert derived_seed(7, "order", 1) == expected


def random_transform() -> Compose:
    return Compose(
        [RandGaussianNoised("image", prob=1.0, std=1.0), Compose([RandScaleIntensityd("image", 0.5, prob=1.0)])]
    )


def everything(workers: int, batch: int = 2, transform: object = None) -> dict[tuple[int, int], np.ndarray]:
    data = [{"image": torch.full((1, 3, 3, 3), float(i))} for i in range(6)]
    dataset = KeyedDataset(data, transform or random_transform(), seed=5)  # type: ignore[arg-type]
    sampler = ResumableSampler(6, seed=5, batch_size=batch)
    found = {}
    for epoch in (1, 2):
        sampler.set_position(epoch)
        for item in DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=workers):
            for key, image in zip(item["key"], item["image"]):
                found[int(key[0]), int(key[1])] = image.numpy()
    assert torch.equal(data[1]["image"], torch.ones(1, 3, 3, 3))  # the data set's own volume is left alone
    return found


def test_randomness_does_not_depend_on_workers_or_batches() -> None:
    expected = everything(workers=0)
    assert len(expected) == 12
    torch.manual_seed(123)
    for other in (everything(workers=2), everything(workers=0, batch=3)):
        for key, image in expected.items():
            np.testing.assert_array_equal(other[key], image)
    noise = {key: image - key[1] for key, image in expected.items()}
    assert not np.allclose(noise[1, 0], noise[2, 0])  # another epoch, other noise
    assert not np.allclose(noise[1, 0], noise[1, 1])


def test_a_single_random_transform_is_keyed_too() -> None:
    first = everything(0, transform=RandGaussianNoised("image", prob=1.0))
    again = everything(0, transform=RandGaussianNoised("image", prob=1.0))
    for key, image in first.items():
        np.testing.assert_array_equal(again[key], image)


def test_an_item_can_be_had_by_its_index() -> None:
    item = KeyedDataset([{"image": 1, "subject_id": "a"}])[0]
    assert item["subject_id"] == "a"
    assert item["key"].tolist() == [0, 0]


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="1 volumes cannot be shared by 2 processes"):
        ResumableSampler(1, num_replicas=2)
    for weights in ([1, 2], [1, -1, 2], [0, 0, 0]):
        with pytest.raises(InputError, match="sampling weights must be 3"):
            ResumableSampler(3, weights=weights)


def test_a_loader_fills_a_cache_when_its_first_epoch_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the share of this process only where it goes through one, and before workers are forked off."""
    loaded: list[int] = []
    transform = Compose([Lambdad("label", lambda label: loaded.append(label) or label)])
    items = [{"label": index} for index in range(4)]
    monkeypatch.setattr(sampling, "process_count", lambda: 2)
    monkeypatch.setattr(sampling, "process_rank", lambda: 1)
    share = KeyedDataLoader(KeyedCacheDataset(items, transform), batch_size=2)
    assert loaded == []
    assert [batch["label"].tolist() for batch in share] == [[1, 3]]
    assert sorted(loaded) == [1, 3]
    loaded.clear()
    training = KeyedDataLoader(KeyedCacheDataset(items, transform, seed=5), batch_size=1, shuffle=True, num_workers=1)
    order = ResumableSampler(4, 5, num_replicas=2, rank=1)
    for sampler in (training.sampler, order):
        sampler.set_position(3)
    assert [tuple(batch["key"][0].tolist()) for batch in training] == list(order)
    assert sorted(loaded) == [0, 1, 2, 3]


def test_a_data_set_may_be_empty_until_it_is_trained_on() -> None:
    """A config is read without its data."""
    assert ResumableSampler(0).iterations == 0 and list(KeyedDataLoader(KeyedDataset([]), shuffle=True)) == []


def test_workers_do_not_delay_the_end_of_a_run() -> None:
    """At exit, after everything that was registered before; what is left then would be waited for."""
    code = (
        "import atexit, multiprocessing\n"
        "atexit.register(lambda: print(multiprocessing.active_children()))\n"
        "from volta_components.training.sampling import KeyedDataLoader, KeyedDataset\n"
        "loader = KeyedDataLoader(KeyedDataset([{'a': 1}]), shuffle=True, num_workers=1)\n"
        "print([batch['a'].tolist() for batch in loader])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-2:] == ["[[1]]", "[]"]


def test_how_often_a_sample_was_drawn_before() -> None:
    rng = np.random.default_rng(0)
    for order in (rng.integers(0, 5, 40), np.array([3]), np.empty(0, int)):
        seen: list[int] = []
        expected = []
        for index in order.tolist():
            expected.append(seen.count(index))
            seen.append(index)
        assert sampling._repeats(order).tolist() == expected


@pytest.fixture
def prepared_items(tmp_path: Path) -> list[dict[str, Any]]:
    return list(load_datalist(make_prepared(tmp_path / "data", 6, 2, (8, 8, 8))).items)


@pytest.mark.parametrize("cached", [False, True])
def test_each_image_is_compared_with_its_hash_once(
    prepared_items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(sampling, "check_contents", lambda item: checked.append(item["subject_id"]))
    transform = Compose([Lambdad("image", lambda path: len(path))])
    kind = KeyedCacheDataset if cached else KeyedDataset
    data = kind([*prepared_items, {"image": "raw.nii", "subject_id": "no hash"}], transform)
    for epoch in (1, 2):
        assert len([data[epoch, index] for index in range(7)]) == 7
    assert checked == [item["subject_id"] for item in prepared_items]


def test_a_changed_image_ends_a_run_with_one_error_also_from_a_worker(prepared_items: list[dict[str, Any]]) -> None:
    """Every worker knows what another has checked: what is changed after that is not read again in this run."""
    transform = Compose([LoadImaged("image", ensure_channel_first=True)])
    loader = KeyedDataLoader(KeyedDataset(prepared_items, transform), shuffle=True, num_workers=2)
    loader.sampler.set_position(1)
    assert sum(1 for _ in loader) == 6
    path = Path(prepared_items[2]["image"])
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    loader.sampler.set_position(2)
    assert sum(1 for _ in loader) == 6
    again = KeyedDataLoader(KeyedDataset(prepared_items, transform), shuffle=True, num_workers=2)
    again.sampler.set_position(1)
    with pytest.raises(InputError) as caught:
        list(again)
    for each in (loader, again):
        sampling._end_workers(weakref.ref(each))
    message, known = describe(caught.value)
    assert known and message.startswith(f"sub-0002: {path}: its content is not what was prepared (another hash);")
    assert message.endswith("a training from its last checkpoint")
