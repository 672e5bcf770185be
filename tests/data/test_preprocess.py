# SPDX-License-Identifier: Apache-2.0
import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
import torch
from memory import in_fresh_process, peak_of_a_big_scan
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing
from scipy import ndimage

from volta_components.data.preprocess import (
    Settings,
    place_window,
    prepare_volume,
    snr_like,
)
from volta_components.data.resample import resample, resample_label
from volta_components.data.survey import survey
from volta_components.data.unusable import UnusableVoxels
from volta_components.data.volumes import Volume

SMALL = Settings(shape=(28, 30, 32))


def scan(codes="RAS", spacing=(1.0, 1.0, 1.0), shape=tiny.SHAPE, turn=None, dtype=np.int16, **options):
    shape, affine = tiny.grid(codes, spacing, shape, turn)
    return Volume(np.asfortranarray(tiny.head(shape, affine, **options).astype(dtype)), affine, 1.0, 0.0, 1)


def smooth_noise(shape, seed=0, sigma=2.0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma).astype(np.float32)


# --- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [None, tiny.rotation(10, -20, 15)])
def test_resample_equals_scipys_interpolation_at_mapped_points(turn):
    shape, affine = tiny.grid("RAS", (1.1, 0.9, 1.2), turn=turn)
    voxels = smooth_noise(shape)
    target_shape, target = tiny.grid("RAS", (1.0, 1.0, 1.0), (14, 15, 16), centre=(1.0, -0.4, 0.3))
    points = nib.affines.apply_affine(np.linalg.inv(affine) @ target, np.moveaxis(np.indices(target_shape), 0, -1))
    expected = ndimage.map_coordinates(voxels, np.moveaxis(points, -1, 0), order=1)
    assert np.allclose(resample(voxels, affine, target, target_shape), expected, atol=1e-5)


def test_resample_equals_monais_orientation_and_spacing():
    shape, affine = tiny.grid("PIR", (1.2, 0.94, 0.94), (26, 30, 32))
    voxels = smooth_noise(shape)
    stock = Compose([Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))), Spacing((1.0, 1.0, 1.0))])
    theirs = stock(MetaTensor(torch.tensor(voxels)[None], affine=torch.tensor(affine)))
    mine = resample(voxels, affine, theirs.affine.numpy(), tuple(theirs.shape[1:]))
    inner = (slice(2, -2),) * 3
    assert np.allclose(mine[inner], theirs[0].numpy()[inner], atol=2e-4)


def test_a_shift_by_whole_voxels_copies_the_values():
    voxels = np.random.default_rng(0).integers(-500, 500, (9, 10, 11)).astype(np.int16)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    target = affine.copy()
    target[:3, 3] = (-2, 3, 1)
    result = resample(voxels, affine, target, (12, 6, 10), fill=-7)
    expected = np.full((12, 6, 10), -7.0)
    expected[2:11, :, :10] = voxels[:, 3:9, 1:11]
    assert np.array_equal(result, expected)


def test_fine_stripes_do_not_alias_when_downsampling():
    """Stripes every 3 voxels, sampled every 4, would show as stripes every 12; their mean is 0.5."""
    stripes = np.zeros((48, 12, 12), np.float32)
    stripes[::3] = 1.5
    target = np.diag([4.0, 4.0, 4.0, 1.0])
    target[:3, 3] = 1.5
    result = resample(stripes, np.eye(4), target, (10, 2, 2))
    naive = ndimage.affine_transform(stripes, [4.0] * 3, 1.5, (10, 2, 2), order=1)
    assert naive[1:-1].std() > 0.3 and result[1:-1].std() < 0.03
    assert result[1:-1].mean() == pytest.approx(0.5, abs=0.02)


def test_downsampling_keeps_the_mean_of_a_plane():
    x = np.indices((32, 32, 32))[0].astype(np.float32)
    target = np.diag([3.0, 2.0, 2.0, 1.0])
    target[:3, 3] = (4, 3, 3)
    result = resample(x, np.eye(4), target, (8, 10, 10))
    assert np.allclose(result, (4 + 3 * np.arange(8))[:, None, None], atol=1e-4)


@pytest.mark.parametrize("spacing", [(0.94, 0.94, 1.2), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.3, 0.8, 1.1)])
@pytest.mark.parametrize("turn", [None, tiny.rotation(7, 12, -9)])
def test_labels_keep_their_volume_within_two_percent(spacing, turn):
    fine = tuple(int(26 / s) for s in spacing)
    shape, affine = tiny.grid("RAS", spacing, fine, turn)
    x = tiny.world(shape, affine)
    label = sum(
        value * ((((x - [side * 4.2, -1, -1]) / [2.2, 6.5, 2.1]) ** 2).sum(-1) < 1) for value, side in ((1, -1), (2, 1))
    )
    target_shape, target = tiny.grid("RAS", (1.0, 1.0, 1.0), (30, 30, 30))
    result, ratios = resample_label(label, affine, target, target_shape)
    for value in (1, 2):
        before = (label == value).sum() * np.prod(spacing)
        assert (result == value).sum() == pytest.approx(before, rel=0.02)
        assert ratios[value] == pytest.approx((result == value).sum() / before)
        centre = tiny.world(target_shape, target)[result == value].mean(0)
        assert np.linalg.norm(centre - x[label == value].mean(0)) < 0.25


# --- window ----------------------------------------------------------------------------------------------------------


def long_neck():
    """A head with a neck and shoulders of three times its height below it, shoulders to one side."""
    shape, affine = tiny.grid("RAS", (1.0, 1.0, 1.0), (40, 34, 90), centre=(4.0, 0.0, -30.0))
    voxels = tiny.head(shape, affine, neck=False)
    xyz = tiny.world(shape, affine)
    column = (np.hypot(xyz[..., 0], xyz[..., 1]) < 5) & (xyz[..., 2] < -5)
    shoulders = (xyz[..., 2] < -45) & (xyz[..., 0] > -8) & (np.abs(xyz[..., 1]) < 12)
    return Volume(np.where(column | shoulders, 320, voxels).astype(np.int16), affine, 1.0, 0.0, 1)


def test_the_window_is_anchored_at_the_top_of_the_head_and_ignores_the_neck():
    volume = long_neck()
    seen = survey(volume)
    window, cut = place_window(seen, SMALL)
    top = window[2, 3] + 31.5
    vertex = 10.0  # the head's upper end, mm
    assert vertex <= top <= vertex + 3
    centre = nib.affines.apply_affine(window, (np.array(SMALL.shape) - 1) / 2)
    assert np.abs(centre[:2]).max() < 1.1  # shoulders, which lie to one side, do not pull it over
    assert cut["top"] == cut["left"] == cut["front"] == cut["back"] == 0 and cut["bottom"] > 0.3
    prepared = prepare_volume(volume, SMALL)
    assert prepared.quality["cut_bottom"] == pytest.approx(cut["bottom"], abs=1e-4)
    # By contrast, a box around all of the foreground, centred, would lose the vertex.
    points = nib.affines.apply_affine(volume.affine, np.argwhere(np.asarray(volume.voxels) > 150))
    assert points[:, 2].mean() + 16 < vertex


def brain():
    """A brain of true size without skull, at 4 mm."""
    affine = nib.affines.from_matvec(4 * np.eye(3), [-100, -120, -120])
    xyz = tiny.world((50, 60, 60), affine)
    radius = np.linalg.norm(xyz / [65, 85, 65], axis=-1)
    voxels = np.where(radius < 1, 500 + 200 * (radius < 0.8), 0)
    return Volume(np.asfortranarray(voxels.astype(np.int16)), affine, 1.0, 0.0, 1)


def test_a_brain_lies_where_it_would_lie_with_its_head():
    """Its top 14 mm below the window's, its middle 10 mm behind, within the half voxel of the scan's own grid."""
    settings = Settings(spacing=(4, 4, 4), shape=(36, 48, 48))
    prepared = prepare_volume(brain(), settings)
    assert prepared.quality["stripped"]
    top = prepared.affine[2, 3] + 4 * 47.5
    middle = nib.affines.apply_affine(prepared.affine, (np.array(settings.shape) - 1) / 2)
    assert 65 + 14 <= top <= 65 + 14 + 4 + 6  # mm: the brain's top, the skull, a voxel, rounding of both grids
    assert np.abs(middle[:2] - [0, 10]).max() <= 4


def test_a_brain_that_fills_the_window_is_not_pushed_out_of_it():
    """130 x 170 x 130 mm in a window of 136 x 172 x 136, one of whose 4 mm lies above the brain's top."""
    prepared = prepare_volume(brain(), Settings(spacing=(4, 4, 4), shape=(34, 43, 34)))
    assert prepared.quality["stripped"] and prepared.quality["cut"] < 0.005


def test_what_is_cut_is_measured():
    seen = survey(scan(neck=False))
    _, cut = place_window(seen, Settings(shape=(12, 30, 32)))
    points = nib.affines.apply_affine(seen.affine, 2 * np.argwhere(seen.foreground) + 0.5)
    middle = (points[:, 0].min() + points[:, 0].max()) / 2
    outside = np.mean(np.abs(points[:, 0] - middle) > 6)
    assert cut["left"] + cut["right"] == pytest.approx(outside, abs=1e-9) and outside > 0.05


def test_a_window_on_the_scans_own_grid_interpolates_nothing():
    volume = scan("LPS", (1.0, 1.0, 1.0), dtype=np.float32)
    seen = survey(volume)
    window, _ = place_window(seen, SMALL)
    offset = (np.linalg.inv(seen.affine) @ window)[:3, 3]
    assert np.allclose(offset, np.round(offset), atol=1e-6)
    image = prepare_volume(volume, SMALL).image
    values = image[(image > 0) & (image < 1)]
    source = np.sort(np.unique(volume.voxels))
    assert len(np.unique(values)) <= len(source)
    low = prepare_volume(volume, SMALL).quality["low"]
    high = prepare_volume(volume, SMALL).quality["high"]
    back = np.unique(values) * (high - low) + low
    nearest = source[np.clip(np.searchsorted(source, back), 1, len(source) - 1)]
    below = source[np.clip(np.searchsorted(source, back), 1, len(source) - 1) - 1]
    assert np.minimum(np.abs(nearest - back), np.abs(below - back)).max() < 1e-2


def test_labels_move_the_window_as_far_as_it_takes():
    volume = scan()
    seen = survey(volume)
    inside = np.array([[0.0, 0, 0]])
    plain, _ = place_window(seen, Settings(shape=(12, 12, 12)))
    low = np.array([[-6.0, -2, -9.0], [-3, 1, -6]])
    moved, _ = place_window(seen, Settings(shape=(12, 12, 12)), low)
    index = nib.affines.apply_affine(np.linalg.inv(moved), low)
    assert (index > 0).all() and (index < 11).all()
    same, _ = place_window(seen, Settings(shape=(28, 30, 32)), inside)
    assert np.array_equal(same, place_window(seen, Settings(shape=(28, 30, 32)))[0])
    assert not np.array_equal(plain, moved)
    with pytest.raises(UnusableVoxels, match="labels span 22x4x4 voxels, more than the window's 12x12x12"):
        place_window(seen, Settings(shape=(12, 12, 12)), np.array([[-10.0, 0, 0], [10, 2, 2]]))


def test_oblique_axes_stay_and_shear_is_taken_out():
    turn = tiny.rotation(10, -6, 14)
    seen = survey(scan(turn=turn))
    window, _ = place_window(seen, SMALL)
    assert np.allclose(window[:3, :3], turn)
    shape, affine = tiny.grid("RAS")
    affine[0, 1] = 0.2
    sheared = survey(Volume(tiny.head(shape, affine), affine, 1.0, 0.0, 1))
    window, _ = place_window(sheared, SMALL)
    assert np.allclose(window[:3, :3] @ window[:3, :3].T, np.eye(3))


# --- intensities -----------------------------------------------------------------------------------------------------


def test_percentiles_of_the_foreground_become_zero_and_one(rng):
    shape, affine = tiny.grid("RAS", (2.0, 2.0, 2.0), (36, 36, 36))
    inside = (tiny.world(shape, affine) ** 2).sum(-1) < 25**2
    voxels = np.where(inside, rng.normal(500, 100, shape), 0).astype(np.float32)
    seen = survey(Volume(voxels, affine, 1.0, 0.0, 1))
    assert seen.factors == (1, 1, 1) and np.mean(seen.foreground == inside) > 0.99
    prepared = prepare_volume(Volume(voxels, affine, 1.0, 0.0, 1), Settings((2.0, 2.0, 2.0), (36, 36, 36)))
    low, high = np.percentile(voxels[seen.foreground], (0.5, 99.5))
    assert prepared.quality["low"] == pytest.approx(low) and prepared.quality["high"] == pytest.approx(high)
    assert prepared.image.min() == 0 and prepared.image.max() == 1
    at = nib.affines.apply_affine(np.linalg.inv(prepared.affine) @ affine, [18, 17, 16])
    value = (voxels[18, 17, 16] - low) / (high - low)
    assert prepared.image[tuple(np.round(at).astype(int))] == pytest.approx(np.clip(value, 0, 1), abs=1e-5)


def test_scale_factors_of_the_header_do_not_change_the_result():
    plain = scan()
    scaled = Volume(plain.voxels, plain.affine, 0.25, -100.0, 1)
    one, two = prepare_volume(plain, SMALL), prepare_volume(scaled, SMALL)
    assert np.array_equal(one.image, two.image)
    assert two.quality["high"] == pytest.approx(one.quality["high"] * 0.25 - 100)


def test_snr_of_known_noise(rng):
    image = 0.6 + rng.normal(0, 0.03, (40, 40, 40))
    assert snr_like(image) == pytest.approx(20, rel=0.05)
    assert snr_like(np.zeros((8, 8, 8))) is None


def test_a_big_scan_is_never_copied_whole():
    assert in_fresh_process(peak_of_a_big_scan) < 0.5
