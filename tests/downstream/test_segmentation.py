# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from labelled_scans import SIDE, centred_affine, head, make_labelled, write_scan
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR, UNet
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage

from volta_components.data.datalist import load_datalist, make_content
from volta_components.data.load import LoadScand
from volta_components.data.nifti import write_label_map
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.volumes import read_volume
from volta_components.downstream.label_maps import check_label_maps, find_datalist, labelled_parts, training_items
from volta_components.downstream.networks import VoltaUNETR, describe_network
from volta_components.downstream.segmentation import FloatWindowInferer, shown_scans
from volta_components.downstream.start import start_from
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.inference.masks import RestoreMaskd, VolumeTable, restore_mask
from volta_components.method.networks import VoltaViT
from volta_components.method.positions import resample_position_embedding
from volta_components.method.weights import save_encoder
from volta_components.training.keep_best import KeepBest

SMALL: dict[str, Any] = {"img_size": (32, 32, 16), "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 4}
ORIENTATIONS = [
    "".join(code[i] for code, i in zip(axes, signs, strict=True))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]


def reoriented(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """The same voxels at the same places, stored in another order."""
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(codes))))


# --- network ---


def test_with_twelve_blocks_it_is_monais_unetr() -> None:
    stock = UNETR(in_channels=1, out_channels=3, proj_type="conv", norm_name="instance", **SMALL)
    ours = VoltaUNETR(num_layers=12, **SMALL)
    assert ours.skips == (3, 6, 9)
    ours.load_state_dict(stock.state_dict())
    image = torch.rand(2, 1, 32, 32, 16)
    with torch.no_grad():
        assert torch.equal(ours(image), stock(image))


def test_a_smaller_encoder_has_its_skips_at_the_quarters(tmp_path: Path) -> None:
    network = VoltaUNETR(num_layers=6, **SMALL)
    assert len(network.vit.blocks) == 6 and network.skips == (1, 3, 4)
    assert network(torch.rand(1, 1, 32, 32, 16)).shape == (1, 3, 32, 32, 16)
    assert describe_network(network)["num_layers"] == 6
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    network(torch.rand(1, 1, 32, 32, 16)).sum().backward()
    without = [name for name in trained if network.get_parameter(name).grad is None]
    assert without == []  # else distributed training would wait for them


def test_the_encoder_of_pretraining_goes_into_it(tmp_path: Path) -> None:
    encoder = VoltaViT(
        img_size=(48, 64, 64), hidden_size=24, mlp_dim=32, num_layers=6, num_heads=4, summary_heads=4, decoder=False
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    network = VoltaUNETR(num_layers=6, **SMALL)
    report = start_from(network, "volta", tmp_path / "encoder.safetensors", 2, "vit.", tmp_path / "report.txt")
    assert report is not None
    assert len(report.loaded) + len(report.resampled) == len(network.vit.state_dict())
    assert all(name.startswith("summariser.") for name in report.unused)
    position = encoder.patch_embedding.position_embeddings
    expected = resample_position_embedding(position, (3, 4, 4), (2, 2, 1))
    assert torch.equal(network.vit.patch_embedding.position_embeddings, expected)
    assert torch.equal(network.vit.blocks[5].mlp.linear1.weight, encoder.blocks[5].mlp.linear1.weight)
    moving = {name.split(".")[1] for name, p in network.vit.blocks.named_parameters(prefix="b") if p.requires_grad}
    assert moving == {"4", "5"}
    assert all(p.requires_grad for name, p in network.named_parameters() if not name.startswith("vit."))
    assert "4x4 -> 2x2x1" in (tmp_path / "report.txt").read_text()


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="multiples"):
        VoltaUNETR(**{**SMALL, "img_size": (40, 32, 32)})
    with pytest.raises(InputError, match="4 blocks"):
        VoltaUNETR(num_layers=3, **SMALL)


def test_unet_tells_its_sizes() -> None:
    network = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8), strides=(2,), num_res_units=2)
    assert describe_network(network) == {
        "in_channels": 1,
        "out_channels": 3,
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 2,
    }


# --- label maps before training ---


@pytest.fixture
def scan(tmp_path: Path) -> dict[str, str]:
    affine = centred_affine((36, 40, 34))
    return write_scan(tmp_path / "raw", "sub-01", *head((36, 40, 34), affine), affine)


def rewrite(path: str, change: Any, affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), path)


def test_good_label_maps_pass_in_every_orientation(scan: dict[str, str], tmp_path: Path) -> None:
    items = []
    for codes in ORIENTATIONS[::5]:
        item = {key: str(tmp_path / f"{codes}_{key}.nii") for key in ("image", "label")}
        for key, path in item.items():
            nib.save(reoriented(nib.load(scan[key]), codes), path)
        items.append(item)
    check_label_maps(items)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda label: label[:-1], "scan of 36x40x34"),
        (lambda label: label * 2, "label values [0, 2, 4]"),
        (lambda label: label * 0, "empty label"),
        (lambda label: np.where(label == 2, 0, label), "no voxels of right (2)"),
        (lambda label: np.where(label == 1, 0, label), "no voxels of left (1)"),
        (lambda label: np.array([0, 2, 1], np.uint8)[label], "left and right are swapped"),
        (lambda label: (label * 0.4).astype(np.float32), "no integers"),
    ],
    ids=["shape", "values", "empty", "no right", "no left", "swapped", "fractions"],
)
def test_bad_label_maps_are_named(scan: dict[str, str], change: Any, words: str, tmp_path: Path) -> None:
    good = {key: shutil.copy(scan[key], tmp_path / f"good_{key}.nii.gz") for key in ("image", "label")}
    rewrite(scan["label"], change)
    with pytest.raises(InputError) as caught:
        check_label_maps([scan, {**good, "subject_id": "sub-02"}])
    message = str(caught.value)
    assert "1 of 2 label maps" in message and "sub-01" in message and "sub-02" not in message
    assert words in message and "Mend" in message


def test_a_label_map_that_is_shifted_or_missing_is_named(scan: dict[str, str]) -> None:
    shifted = nib.load(scan["label"]).affine.copy()
    shifted[0, 3] += 5
    rewrite(scan["label"], lambda label: label, shifted)
    others = [{"image": scan["image"], "subject_id": "sub-02"}]
    others.append({"image": scan["image"], "label": "/nowhere/label.nii.gz", "subject_id": "sub-03"})
    with pytest.raises(InputError) as caught:
        check_label_maps([scan, *others])
    message = str(caught.value)
    assert "do not share one grid" in message and "5.0 mm" in message
    assert "sub-02" in message and "has no label map" in message
    assert "sub-03" in message and "no such file" in message


def test_swapped_sides_are_found_in_a_flipped_file(scan: dict[str, str], tmp_path: Path) -> None:
    """Left is where world x is smaller, however the file is stored."""
    item = {key: str(tmp_path / f"lps_{key}.nii") for key in ("image", "label")}
    for key, path in item.items():
        nib.save(reoriented(nib.load(scan[key]), "LPS"), path)
    check_label_maps([item])
    rewrite(item["label"], lambda label: np.array([0, 2, 1], np.uint8)[label])
    with pytest.raises(InputError, match="swapped"):
        check_label_maps([item])


def test_parts_want_a_label_map_for_everybody(tmp_path: Path) -> None:
    datalist = load_datalist(make_labelled(tmp_path / "data"))
    parts = labelled_parts(datalist, fold=0)
    assert [item["subject_id"] for item in parts.scored] == ["sub-0000", "sub-0005"]
    assert len(parts.training) == 6 and len(parts.validation) == 2
    assert training_items(parts, datalist.path) is parts.training

    content = read_json(datalist.path)
    for item in content["training"][3:5]:
        del item["label"]
    changed = make_content("fake", [1.0] * 3, [SIDE] * 3, 0, 5, content["training"], [])
    write_json(datalist.path, changed)
    with pytest.raises(InputError, match="2 of 10 items have no label map") as caught:
        labelled_parts(load_datalist(datalist.path), fold=0)
    assert "sub-0003_ses-M000" in str(caught.value) and "--labels require" in str(caught.value)


def test_without_a_datalist_there_is_nobody_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "datalist.json"
    datalist = find_datalist(path, [32] * 3, [1.0] * 3)
    parts = labelled_parts(datalist, fold=0)
    assert (len(datalist), parts.training, parts.validation, parts.scored) == (0, [], [], [])
    with pytest.raises(InputError, match="volta3d prepare"):
        training_items(parts, path)


# --- a scan's own space ---


def test_a_prepared_volume_is_taken_as_it_is(tmp_path: Path) -> None:
    item = load_datalist(make_labelled(tmp_path / "data", count=2, folds=2)).items[1]
    loaded = LoadScand("image", 1.0, [SIDE] * 3, label_key="label")(item)
    for key in ("image", "label"):
        stored = nib.load(item[key])
        assert np.array_equal(loaded[key][0].numpy(), np.asarray(stored.dataobj))
        assert np.array_equal(loaded[key].affine.numpy(), stored.affine)
    assert loaded["label"].dtype == torch.uint8


def test_a_raw_scan_is_prepared_as_volta3d_prepare_does(scan: dict[str, str]) -> None:
    image, label = (nib.load(scan[key]) for key in ("image", "label"))
    settings = Settings((1.0,) * 3, (SIDE,) * 3)
    expected = prepare_volume(read_volume(scan["image"]), settings, np.asarray(label.dataobj), label.affine)
    loaded = LoadScand("image", 1.0, [SIDE] * 3, label_key="label")(scan)
    assert np.array_equal(loaded["image"][0].numpy(), expected.image)
    assert np.array_equal(loaded["label"][0].numpy(), expected.label)
    assert np.array_equal(loaded["image"].meta["original_affine"], image.affine)
    assert tuple(loaded["image"].meta["spatial_shape"]) == image.shape
    for nothing in ({}, {"label": None}):
        alone = LoadScand("image", 1.0, [SIDE] * 3, label_key="label")({"image": scan["image"], **nothing})
        assert set(alone) == {"image"}
    without = LoadScand("image", 1.0, [SIDE] * 3)({**scan, "label": 1, "session": None})
    assert (without["label"], without["session"]) == (1, "")  # a class is no label map; None cannot be collated


def test_a_broken_scan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flat.nii.gz"
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 7, np.int16), np.eye(4)), path)
    with pytest.raises(InputError, match=r"flat\.nii\.gz.*constant"):
        LoadScand("image", 1.0, [SIDE] * 3)({"image": str(path)})


def through(item: dict[str, str], spacing: float = 1.0) -> nib.Nifti1Image:
    """A label map prepared, taken as the network's certain answer, and brought back."""
    loaded = LoadScand("image", spacing, [SIDE] * 3, label_key="label")(item)
    logits = torch.stack([(loaded["label"][0] == value) * 40.0 for value in range(3)])
    restored = RestoreMaskd("pred")({**loaded, "pred": logits})["pred"]
    assert restored.dtype == torch.uint8 and restored.shape[0] == 1
    return nib.Nifti1Image(restored[0].numpy(), restored.affine.numpy())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_masks_come_back_in_all_48_orientations(codes: str, tmp_path: Path) -> None:
    affine = centred_affine((36, 40, 34))
    volume, label = head((36, 40, 34), affine)
    images = [reoriented(nib.Nifti1Image(array, affine), codes) for array in (volume, label)]
    item = write_scan(tmp_path, "sub-01", *(np.asarray(image.dataobj) for image in images), images[0].affine)
    restored = through(item)
    assert restored.shape == images[1].shape and np.allclose(restored.affine, images[1].affine)
    assert np.array_equal(np.asarray(restored.dataobj), np.asarray(images[1].dataobj))
    for value, sign in ((1, -1), (2, 1)):
        places = nib.affines.apply_affine(restored.affine, np.argwhere(np.asarray(restored.dataobj) == value))
        assert np.sign(places[:, 0].mean()) == sign


@pytest.mark.parametrize(
    ("shape", "spacing", "turn"),
    [((48, 40, 20), (0.8, 1.0, 1.8), 0.0), ((36, 40, 34), (1.0, 1.0, 1.0), 0.3), ((30, 28, 34), (1.3, 1.4, 1.0), -0.2)],
    ids=["anisotropic", "oblique", "oblique and anisotropic"],
)
def test_masks_come_back_to_any_grid(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], turn: float, tmp_path: Path
) -> None:
    rotation = np.eye(4)
    rotation[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    affine = rotation @ centred_affine(shape, spacing)
    volume, label = head(shape, affine)
    restored = through(write_scan(tmp_path, "sub-01", volume, label, affine))
    assert restored.shape == shape and np.allclose(restored.affine, affine, atol=1e-5)
    found = np.asarray(restored.dataobj)
    for value in (1, 2):
        a, b = found == value, label == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85
        centres = [nib.affines.apply_affine(affine, np.argwhere(mask)).mean(axis=0) for mask in (a, b)]
        assert np.abs(centres[0] - centres[1]).max() < 0.25


def test_only_what_may_be_foreground_is_resampled_and_nothing_is_lost(rng: np.random.Generator) -> None:
    """The same as resampling everything."""
    field = np.stack([ndimage.gaussian_filter(rng.normal(size=(14, 15, 16)), 1.5) for _ in range(3)])
    field[0] += 0.02
    probabilities = np.exp(8 * field) / np.exp(8 * field).sum(axis=0)
    affine = centred_affine((14, 15, 16), (2.0, 2.0, 2.0))
    target = centred_affine((40, 37, 29), (0.9, 0.8, 1.3))
    target[0, 3] += 3.3
    restored = restore_mask(probabilities, affine, target, (40, 37, 29))
    grid = np.linalg.inv(affine) @ target
    places = np.moveaxis(nib.affines.apply_affine(grid, np.moveaxis(np.indices((40, 37, 29)), 0, -1)), -1, 0)
    everything = np.stack(
        [
            ndimage.map_coordinates(channel, places, order=1, cval=float(i == 0))
            for i, channel in enumerate(probabilities)
        ]
    ).argmax(axis=0)
    assert {1, 2} <= set(np.unique(restored))
    assert (restored != everything).mean() < 1e-4  # ties and rounding
    nothing = np.stack([np.ones((4, 4, 4)), np.zeros((4, 4, 4)), np.zeros((4, 4, 4))])
    assert not restore_mask(nothing, np.eye(4), np.eye(4), (4, 4, 4)).any()


def test_volumes_are_in_cubic_millimetres_of_the_scan(tmp_path: Path) -> None:
    shape, spacing = (48, 40, 20), (0.8, 1.0, 1.8)
    affine = centred_affine(shape, spacing)
    volume, label = head(shape, affine)
    item: dict[str, Any] = write_scan(tmp_path, "sub-01", volume, label, affine)
    mask = RestoreMaskd("pred")(
        {**LoadScand("image", 1.0, [SIDE] * 3)({"image": item["image"]}), "pred": torch.zeros(3, SIDE, SIDE, SIDE)}
    )["pred"]
    mask[0] = torch.from_numpy(label)
    table = VolumeTable(tmp_path / "volumes.csv")
    table._iteration_completed(SimpleNamespace(state=SimpleNamespace(batch=[item], output=[{"pred": mask}])))
    table.write()
    with (tmp_path / "volumes.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    left, right = ((label == value).sum() * 0.8 * 1.0 * 1.8 for value in (1, 2))
    assert float(row["left_mm3"]) == pytest.approx(left, abs=0.05)
    assert float(row["right_mm3"]) == pytest.approx(right, abs=0.05)
    assert float(row["both_mm3"]) == pytest.approx(left + right, abs=0.1)
    assert row["subject_id"] == "sub-01" and row["file"] == item["image"]


def test_label_maps_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    mask = np.zeros((5, 6, 7), np.uint8)
    mask[1:3] = 2
    affine = inv_ornt_aff(axcodes2ornt(("L", "A", "S")), mask.shape) @ np.diag([0.7, 1, 2, 1])
    for name in ("a", "b"):
        write_label_map(tmp_path / f"{name}.nii.gz", mask, affine)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), mask) and image.get_data_dtype() == np.uint8
    assert np.allclose(image.affine, affine, atol=1e-6)


def test_all_of_a_few_scans_are_shown_and_of_many_the_worst_median_and_best() -> None:
    assert shown_scans([0.3, 0.1, 0.2], 4) == {0, 1, 2}
    dices = [0.5 + 0.01 * ((8 * place) % 21) for place in range(21)]
    worst, median, best = (dices.index(value) for value in (min(dices), sorted(dices)[10], max(dices)))
    assert shown_scans(dices, 21) == {worst, median, best}


# --- windows ---


def test_windows_are_added_up_in_float32_in_mixed_precision() -> None:
    """Windows that agree on every voxel: their weighted mean is what each of them says."""

    def network(image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, 2 * image - 1.003], dim=1).bfloat16()

    image = torch.rand(1, 1, 20, 24, 16, generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = {"roi_size": (16, 16, 16), "sw_batch_size": 3, "overlap": 0.5, "mode": "gaussian"}
    logits = FloatWindowInferer(**sizes)(image, network)
    assert isinstance(logits, torch.Tensor) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, network(image).float(), atol=1e-6, rtol=1e-6)
    rounded = SlidingWindowInferer(**sizes)(image, network)
    assert (rounded - network(image).float()).abs().max() > 1e-3  # type: ignore[operator]


# --- the best epoch ---


def run_epochs(keep: KeepBest, network: torch.nn.Linear, evaluator: Engine, values: list[float | None]) -> list[Any]:
    """Epochs whose weights are the epoch's number and whose metric is given; None is not evaluated.

    Returns what ``keep`` reports at each epoch's end, and whose weights are there.
    """
    engine = Engine(lambda *_: None)
    seen: list[Any] = []

    def evaluate(trainer: Engine) -> None:
        torch.nn.init.constant_(network.weight, trainer.state.epoch)
        value = values[trainer.state.epoch - 1]
        if value is not None:
            evaluator.state.epoch, evaluator.state.metrics = trainer.state.epoch, {"dice": value}

    engine.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    keep.attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append((e.state.metrics.get("d"), kept(keep))))
    engine.add_event_handler(Events.STARTED, lambda e: engine.load_state_dict({"iteration": keep.epoch, **LENGTHS}))
    engine.run([0], max_epochs=len(values), epoch_length=1)
    return seen


LENGTHS = {"epoch_length": 1, "max_epochs": 4}


def kept(keep: KeepBest) -> list[str]:
    return sorted(path.stem for path in keep.path.parent.glob("best*"))


def test_the_first_of_the_best_epochs_is_kept(tmp_path: Path) -> None:
    network, evaluator = torch.nn.Linear(1, 1, bias=False), Engine(lambda *_: None)
    keep = KeepBest(network, evaluator, "dice", tmp_path / "best.pt", report_as="d")
    assert not keep.restore()
    seen = run_epochs(keep, network, evaluator, [0.2, 0.7, None, 0.7])
    # Without checkpoints, the weights of the epoch before are removed when the next one starts.
    assert seen == [(0.2, ["best-1"]), (0.7, ["best-1", "best-2"]), (None, ["best-2"]), (0.7, ["best-2"])]
    assert keep.state_dict() == {"epoch": 2, "value": 0.7}
    assert not kept(keep)  # the run is finished


def test_a_kill_before_the_checkpoint_leaves_the_weights_that_the_checkpoint_before_names(tmp_path: Path) -> None:
    network, evaluator = torch.nn.Linear(1, 1, bias=False), Engine(lambda *_: None)
    keep = KeepBest(network, evaluator, "dice", tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(keep, network, evaluator, [0.1, 0.3, None, None])
    checkpoint = keep.state_dict()
    # The weights of a better fifth epoch are written; then the process dies before it has a checkpoint.
    keep._epoch_started(Engine(lambda *_: None))
    evaluator.state.epoch, evaluator.state.metrics = 5, {"dice": 0.9}
    torch.nn.init.constant_(network.weight, 5)
    keep._epoch_completed(SimpleNamespace(state=SimpleNamespace(epoch=5)))  # type: ignore[arg-type]
    assert kept(keep) == ["best-2", "best-5"]

    again = KeepBest(network, evaluator, "dice", tmp_path / "best.pt")
    again.load_state_dict(checkpoint)
    again._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(again, network, evaluator, [0.1, 0.3, 0.2, 0.1])  # this time, none is better
    assert again.epoch == 2 and again.restore() and network.weight.item() == 2
    assert kept(again) == ["best-2"]


def test_between_checkpoints_only_what_can_still_be_needed_is_kept(tmp_path: Path) -> None:
    network, evaluator = torch.nn.Linear(1, 1, bias=False), Engine(lambda *_: None)
    keep = KeepBest(network, evaluator, "dice", tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    inner = keep._epoch_completed

    def with_a_checkpoint_of_the_first_epoch(engine: Engine) -> None:
        inner(engine)
        if engine.state.epoch == 1:
            keep.state_dict()

    keep._epoch_completed = with_a_checkpoint_of_the_first_epoch  # type: ignore[method-assign]
    seen = run_epochs(keep, network, evaluator, [0.1, 0.2, 0.3, None])
    files = [names for _, names in seen]
    assert files == [["best-1"], ["best-1", "best-2"], ["best-1", "best-2", "best-3"], ["best-1", "best-3"]]


def test_its_weights_come_back_and_it_goes_on(tmp_path: Path) -> None:
    network, evaluator = torch.nn.Linear(1, 1, bias=False), Engine(lambda *_: None)
    keep = KeepBest(network, evaluator, "dice", tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(keep, network, evaluator, [0.1, 0.6, 0.3, 0.2])
    assert network.weight.item() == 4
    assert keep.restore() and network.weight.item() == 2

    later = KeepBest(network, evaluator, "dice", tmp_path / "best.pt")
    later.load_state_dict(keep.state_dict())
    later._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(later, network, evaluator, [0.9, 0.9, 0.5, 0.4])  # goes on at the third epoch
    assert later.epoch == 2 and later.restore() and network.weight.item() == 2
