# SPDX-License-Identifier: Apache-2.0
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.transforms import Compose, RandGaussianNoised
from toy_anatomies import toy_folder

from volta_components.data.checks import check_volumes
from volta_components.errors import InputError
from volta_components.training.endless import EndlessHeads, anatomies_datalist
from volta_components.training.sampling import KeyedDataLoader, ResumableSampler

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("anatomies"), 3)


@pytest.fixture(scope="module")
def items(folder):
    return anatomies_datalist(folder, (40, 44, 40), 3.0).items


def heads(items, **changes):
    settings = {"length": 6, "shape": (40, 44, 40), "spacing": 3.0, "seed": 5, **changes}
    return EndlessHeads(items, **settings)


def same(a, b):
    return torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


def test_an_item_follows_from_seed_epoch_and_index_alone(items):
    first, again = heads(items), heads(items)
    again[(3, 5)]  # what was rendered before changes nothing
    assert same(first[(2, 1)], again[(2, 1)])
    others = [first[(2, 2)], first[(3, 1)], first[(2, 1, 1)], heads(items, seed=6)[(2, 1)]]
    assert not any(same(first[(2, 1)], other) for other in others)


def test_items_are_as_prepared_volumes(items):
    for index in range(4):
        item = heads(items)[(1, index)]
        image, label = item["image"], item["label"]
        assert image.shape == label.shape == (1, 40, 44, 40)
        assert image.dtype == torch.float32
        assert label.dtype == torch.uint8
        assert 0 <= image.min() < 0.05
        assert image.max() == 1
        assert set(label.unique().tolist()) == {0, 1, 2}
        sides = [(label[0] == side).nonzero()[:, 0].float().mean() for side in (1, 2)]
        assert sides[0] < sides[1]
        top = (image[0] > 0.15).any(dim=0).any(dim=0).nonzero().max()
        assert top >= 40 - 6  # the head's top is at the window's
        assert item["key"].tolist() == [1, index]


def test_a_brain_lies_where_it_would_lie_with_its_head(items):
    """Its top 14 mm below the window's and its middle 10 mm behind it, as far as a window of its own size lets it."""
    roomy = heads(items, shape=(60, 70, 60), skull_share=0.0)[(1, 0)]["image"][0] > 0.15
    places = roomy.nonzero()
    assert (59 - places[:, 2].max()) * 3 == pytest.approx(14, abs=4.5)
    middle = float(places[:, 1].min() + places[:, 1].max()) / 2
    assert (34.5 - middle) * 3 == pytest.approx(10, abs=4.5)
    sides = (places.max(dim=0).values - places.min(dim=0).values + 3).tolist()
    tight = heads(items, shape=tuple(sides), skull_share=0.0)[(1, 0)]["image"][0] > 0.15
    assert tight.sum() > 0.99 * roomy.sum()


def test_crops_lie_around_the_hippocampi_as_often_as_they_should(items):
    crops = heads(items, length=30, shape=(24, 24, 16), window=(40, 44, 40), hippocampus_share=1.0, jitter=3.0)
    assert all((crops[(1, index)]["label"] > 0).any() for index in range(8))
    anywhere = heads(items, length=30, shape=(12, 12, 12), window=(60, 64, 60), hippocampus_share=0.0)
    assert any(not (anywhere[(1, index)]["label"] > 0).any() for index in range(8))


def test_two_scanners_see_one_head(items):
    item = heads(items, scanners=2, shares=True, skull_share=1.0)[(1, 0)]
    assert not torch.allclose(item["image"], item["image_2"], atol=0.05)
    assert torch.equal(item["shares"][0] > 0.5, item["label"][0] == 1)
    # What is head in one is head in the other.
    a, b = ((item[name][0] > 0.1).float() for name in ("image", "image_2"))
    assert (a * b).sum() / torch.maximum(a, b).sum() > 0.5


def test_a_standard_picture_shows_the_brain_and_no_scanner(items):
    """Whichever scanners see a head, its standard picture is the same; what lies outside the brain is 0 there."""
    one, two = (heads(items, scanners=count, standard=True)[(1, 0)] for count in (1, 2))
    assert torch.equal(one["standard"], two["standard"])
    assert "standard" not in heads(items)[(1, 0)]
    standard = one["standard"]
    assert standard.shape == (1, 40, 44, 40)
    assert 0 <= standard.min() < 0.01 < 0.7 < standard.max() <= 1
    with_skull = heads(items, skull_share=1.0, standard=True)[(1, 0)]
    outside = (with_skull["standard"] == 0) & (with_skull["image"] > 0.1)
    assert outside.float().mean() > 0.03
    assert np.corrcoef(standard.flatten(), with_skull["image"].flatten())[0, 1] > 0.3


def test_workers_and_resumed_epochs_give_the_same_heads(items):
    def batches(workers, iteration):
        sampler = ResumableSampler(6, seed=1, batch_size=2)
        sampler.set_position(2, iteration)
        transform = Compose([RandGaussianNoised("image", prob=1.0, std=0.1)])
        dataset = heads(items, transform=transform)
        return list(DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers))

    whole, part = batches(0, 0), batches(2, 1)
    assert len(whole) == 3
    assert len(part) == 2
    for a, b in zip(whole[1:], part, strict=True):
        assert torch.equal(a["key"], b["key"])
        assert torch.equal(torch.as_tensor(a["image"]), torch.as_tensor(b["image"]))
    assert all(not torch.equal(a["image"], b["image"]) for a, b in pairwise(whole))


def test_heads_are_kept_for_later_epochs(items, monkeypatch):
    """Of six heads an epoch, two are new in each: the others move up, and are rendered once."""
    dataset = heads(items, fresh=2)
    rendered = []
    render = dataset._render
    monkeypatch.setattr(dataset, "_render", lambda epoch, index: rendered.append(index) or render(epoch, index))
    first, second = ([dataset[(epoch, index)] for index in range(6)] for epoch in (1, 2))
    assert rendered == [*range(6), 6, 7]
    for index in range(4):
        assert same(first[index + 2], second[index])
        assert second[index]["key"].tolist() == [2, index]
    # Another process, or one that resumes, has the same heads.
    assert same(heads(items, fresh=2)[(2, 5)], second[5])
    assert not any(same(second[5], head) for head in first)
    assert same(dataset[3], first[3])  # without an epoch, as pictures ask
    dataset[(9, 0)]
    assert len(rendered) == 9
    with pytest.raises(InputError, match="fresh heads of an epoch: 7 is not between 1 and all of its 6"):
        heads(items, fresh=7)


def test_workers_share_the_heads_that_are_kept(items, monkeypatch):
    """What two workers rendered for the first epoch, this process has, and so has each of them for the second."""
    dataset = heads(items, fresh=2)
    loader = KeyedDataLoader(dataset, 2, shuffle=True, num_workers=2)
    sampler = loader.sampler
    sampler.set_position(1)
    assert sum(len(batch["key"]) for batch in loader) == 6
    expected = heads(items)
    monkeypatch.setattr(dataset, "_render", None)
    for index in range(6):
        assert same(dataset[(1, index)], expected[(0, index)] | {"key": torch.tensor([1, index])})
    with pytest.raises(TypeError):
        dataset[(2, 5)]


def test_anatomies_are_loaded_before_workers_are_forked_off(items, monkeypatch):
    filled, expected = heads(items), heads(items)[(1, 1)]
    filled.fill()
    monkeypatch.setattr("volta_components.training.endless.load_head", None)
    assert same(filled[(1, 1)], expected)
    with pytest.raises(TypeError):
        heads(items)[(1, 1)]


def test_workers_are_refused_where_a_device_renders(items):
    rendered = heads(items, device="cuda:0")
    KeyedDataLoader(rendered, shuffle=True)
    with pytest.raises(InputError, match=r"items are made on cuda:0.*give --num_workers 0"):
        KeyedDataLoader(rendered, shuffle=True, num_workers=2)


def test_anatomies_as_a_datalist(folder, items):
    datalist = anatomies_datalist(folder, (40, 44, 40), 3.0, leave_out=["head-2"])
    assert [item["subject_id"] for item in datalist.items] == ["head-1", "head-3"]
    assert datalist.hash != anatomies_datalist(folder, (40, 44, 40), 3.0).hash
    assert "phantom" in datalist.name
    check_volumes(datalist)  # there is nothing on disk to check
    with pytest.raises(InputError, match=r"(?s)trained on and scored.*head-3.*Leave them out"):
        anatomies_datalist(folder, (40, 44, 40), 3.0, scored=[items[2]])
    with pytest.raises(InputError, match="no anatomies to render"):
        heads([])


@pytest.mark.parametrize(
    ("bundle", "further"),
    [("pretrain", []), ("pretrain", ["two_scanners"]), ("harp_hippocampus", [])]
    + [("pretrain", ["two_scanners", f"{what}_picture"]) for what in ("other", "standard")]
    + [("pretrain", ["two_scanners", "recommended"])],
)
def test_the_overlay_of_a_bundle_renders_its_batches(bundle, further, folder, tmp_path):
    configs = ROOT / "bundles" / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / f"{name}.json") for name in ("train", "synthetic", *further)])
    overlay = json.loads((configs / "synthetic.json").read_text())
    window = (40, 44, 40)
    changes = {
        "anatomies": str(folder), "heads_per_epoch": 4, "spacing": 3.0, "volume_size": list(window), "num_workers": 0,
        "batch_size": 2, "output_dir": str(tmp_path), "device": "$torch.device('cpu')",
    }  # fmt: skip
    if bundle == "harp_hippocampus":
        changes |= {
            "image_size": [24, 24, 16],
            "parts": "$volta.score_only([{'patient_id': 'nobody', 'fold': 0}], None)",
        }
        window = (24, 24, 16)
    for name, value in changes.items():
        parser[name] = value
    parser.parse()
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    assert batch["image"].shape == (2, 1 + len(further), *window)
    assert np.isfinite(batch["image"].numpy()).all()
    if further:
        first, second, *target = batch["image"].numpy().swapaxes(0, 1)
        assert np.abs(first - second).mean() > 0.01  # other scanners
        for picture in target:
            assert np.array_equal(picture, first) == ("other_picture" in further)
    assert overlay["leave_out"] == []
