# SPDX-License-Identifier: Apache-2.0
"""The head is found whatever lies around it; what cannot be told apart is noted."""

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
from scipy import ndimage

from volta_components.data.preprocess import BRAIN_IN_HEAD, Settings, prepare_volume
from volta_components.data.survey import find_foreground, otsu_threshold, survey
from volta_components.data.unusable import UnusableVoxels
from volta_components.data.volumes import Volume

SETTINGS = Settings(spacing=(3.0, 3.0, 3.0), shape=(56, 64, 60))


def scan(codes="RAS", spacing=(1.0, 1.0, 1.0), shape=tiny.SHAPE, turn=None, dtype=np.int16, **options):
    shape, affine = tiny.grid(codes, spacing, shape, turn)
    return Volume(np.asfortranarray(tiny.head(shape, affine, **options).astype(dtype)), affine, 1.0, 0.0, 1)


@pytest.fixture(scope="module")
def big():
    """A head of true size at 3 mm, its bright spot, air with noise, and 40 mm of air above it; voxels and affine."""
    affine = nib.affines.from_matvec(np.diag([3.0, 3.0, 3.0]), [-100, -110, -115])
    xyz = tiny.world((68, 74, 80), affine)
    radius = np.sqrt(((xyz / [70, 88, 80]) ** 2).sum(-1))
    tissue = 500 + 150 * (radius < 0.85) + 300 * np.exp(-(((xyz - [-30, 20, 40]) / 9) ** 2).sum(-1))
    air = np.random.default_rng(0).rayleigh(6, radius.shape)
    return np.where(radius < 1, tissue, air), affine


@pytest.fixture(scope="module")
def plain(big):
    """The big head as it is prepared without anything added."""
    done = prepare(*big)
    assert done.warnings == []
    return done


def prepare(voxels, affine, dtype=np.int16):
    stored = np.round(voxels).astype(dtype) if np.dtype(dtype).kind in "iu" else voxels.astype(dtype)
    return prepare_volume(Volume(np.asfortranarray(stored), affine, 1.0, 0.0, 1), SETTINGS)


def assert_same_window(done, plain):
    """Within one voxel; a head of tissue alone in air of one value counts as a brain, which has a place of its own."""
    stripped = float(done.quality["stripped"]) - float(plain.quality["stripped"])
    assert np.abs(done.affine[:3, 3] - plain.affine[:3, 3] - stripped * BRAIN_IN_HEAD).max() <= 3.0


def assert_same(done, plain):
    """The window, and the tissue's values, of a scan without what was added."""
    assert_same_window(done, plain)
    if np.array_equal(done.affine, plain.affine):
        assert np.abs(done.image - plain.image).mean() < 0.03


# --- voxels ----------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_voxels_not_of_their_storage():
    image = nib.Nifti1Image(scan("RAS").voxels, scan("RAS").affine)
    digests = set()
    for codes in ("RAS", "LPS", "PIR", "ASL"):
        move = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(codes))
        )
        turned = image.as_reoriented(move)
        for order in "CF":
            digests.add(survey(Volume(np.array(turned.dataobj, order=order), turned.affine, 1.0, 0.0, 1)).digest)
    assert len(digests) == 1
    changed = np.array(image.dataobj)
    changed[5, 6, 7] += 1
    assert survey(Volume(changed, image.affine, 1.0, 0.0, 1)).digest not in digests


def test_coarse_means_are_block_means(rng):
    voxels = rng.integers(0, 1000, (50, 62, 41)).astype(np.int16)
    seen = survey(Volume(voxels, np.diag([1.0, 1.0, 0.7, 1.0]), 1.0, 0.0, 1))
    assert seen.factors == (2, 2, 3)
    block = voxels[4:6, 10:12, 9:12].mean()
    assert seen.coarse[2, 5, 3] == pytest.approx(block) and seen.coarse.shape == (25, 31, 13)
    assert (seen.minimum, seen.maximum) == (voxels.min(), voxels.max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_voxel_in_the_last_plane_is_seen(bad):
    volume = scan(dtype=np.float32)
    volume.voxels[-1, -1, -1] = bad
    if np.isnan(bad):
        assert survey(volume).warnings[-1].startswith("1 voxels are NaN")
    else:
        with pytest.raises(UnusableVoxels, match=r"Inf \(1 voxels\)"):
            survey(volume)


NAN_OUTSIDE = {
    "around the head": lambda xyz: np.linalg.norm(xyz / [70, 88, 80], axis=-1) > 1.05,
    "in the outermost slices": lambda xyz: xyz[..., 2] < -100,
    "in a corner": lambda xyz: (xyz > 85).all(axis=-1),
}


@pytest.mark.parametrize("place", NAN_OUTSIDE)
def test_nan_outside_of_the_head_is_air(big, plain, place):
    voxels, affine = big
    nan = NAN_OUTSIDE[place](tiny.world(voxels.shape, affine))
    done = prepare(np.where(nan, np.nan, voxels), affine, np.float32)
    assert_same(done, plain)
    assert [f"{nan.sum():,} voxels are NaN" in note for note in done.warnings] == [True]
    assert done.image.min() == 0 and np.isfinite(done.image).all()


def test_nan_is_never_brighter_than_tissue(big, plain):
    """Where brain is below zero, as in z-scores, a 0 outside of it would be bright."""
    voxels, affine = big
    nan = NAN_OUTSIDE["in the outermost slices"](tiny.world(voxels.shape, affine))
    done = prepare(np.where(nan, np.nan, voxels - 1500), affine, np.float32)
    assert_same_window(done, plain)
    assert "voxels are NaN" in done.warnings[-1]


@pytest.mark.parametrize("further", [0, 1, 2, 5])
def test_nan_close_around_a_standardised_head_does_not_move_the_window(big, plain, further):
    """With or without some air left, and standardised by the head or by its brain."""
    voxels, affine = big
    radius = np.linalg.norm(tiny.world(voxels.shape, affine) / [70, 88, 80], axis=-1)
    kept = ndimage.binary_dilation(radius < 1, iterations=further) if further else radius < 1
    noise = np.random.default_rng(1).normal(0, 15, voxels.shape)
    for part, noisy in ((radius < 1, voxels), (radius < 0.8, voxels + noise)):
        scores = (noisy - noisy[part].mean()) / noisy[part].std()
        done = prepare(np.where(kept, scores, np.nan), affine, np.float32)
        assert_same_window(done, plain)
        assert ["voxels are NaN" in note for note in done.warnings] == [True]
        assert done.quality["minimum"] == pytest.approx(scores[kept].min(), abs=1e-4)


@pytest.mark.parametrize("half", [1, 4])
def test_nan_within_the_head_is_refused(big, half):
    voxels, affine = big
    xyz = tiny.world(voxels.shape, affine)
    nan = (np.abs(xyz - [10, 0, 20]) < 3 * half).all(axis=-1)
    with pytest.raises(UnusableVoxels, match=rf"NaN \({nan.sum():,} voxels within the head"):
        prepare(np.where(nan, np.nan, voxels), affine, np.float32)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
def test_sums_of_eight_bytes_do_not_overflow(dtype):
    voxels = np.full((16, 16, 16), 2**61, dtype)
    voxels[4:12, 4:12, 4:12] += dtype(2**61)
    seen = survey(Volume(voxels, np.eye(4), 1.0, 0.0, 1))
    assert seen.coarse.min() == np.float32(2**61) and seen.coarse.max() == np.float32(2**62)


def test_values_beyond_any_intensity_are_refused():
    volume = scan(dtype=np.float64)
    volume.voxels[3, 4, 5] = 1e200
    with pytest.raises(UnusableVoxels, match="no intensities"):
        survey(volume)


def test_a_mask_given_as_a_scan_is_noted():
    volume = scan()
    mask = Volume((volume.voxels > 150).astype(np.uint8), volume.affine, 1.0, 0.0, 1)
    assert "only 2 different values" in survey(mask).warnings[0]
    assert survey(volume).warnings == ()


# --- the head --------------------------------------------------------------------------------------------------------


def test_otsu_maximises_the_variance_between_two_classes(rng):
    values = np.concatenate([rng.normal(10, 3, 5000), rng.normal(80, 12, 3000)])
    clipped = np.minimum(values, np.percentile(values, 99.8))
    between = {
        cut: (clipped <= cut).mean()
        * (clipped > cut).mean()
        * np.ptp([clipped[clipped <= cut].mean(), clipped[clipped > cut].mean()]) ** 2
        for cut in np.linspace(5, 100, 2000)
    }
    assert between[min(between, key=lambda cut: abs(cut - otsu_threshold(values)))] > 0.9999 * max(between.values())
    bright = np.concatenate([values, np.full(5, 5000.0)])  # a few hot voxels must not move it
    assert otsu_threshold(bright) == pytest.approx(otsu_threshold(values), abs=3)


def test_the_foreground_does_not_depend_on_the_unit(big):
    voxels = big[0].astype(np.float32)
    expected = find_foreground(voxels)
    for unit in (1e-12, 1e20):
        assert np.array_equal(find_foreground(voxels * np.float32(unit)), expected)


def test_foreground_is_the_head_with_its_ventricles_and_without_specks():
    shape, affine = tiny.grid("RAS")
    voxels = tiny.head(shape, affine, neck=False)
    xyz = tiny.world(shape, affine)
    voxels[(xyz**2).sum(-1) < 9] = 2  # a ventricle
    voxels[1, 1, 1] = 900  # a speck of noise
    mask = find_foreground(voxels)
    inside = np.sqrt(((xyz / [9, 10.5, 10]) ** 2).sum(-1)) < 0.9
    assert mask[inside].all() and not mask[1, 1, 1]
    assert mask.sum() < 1.1 * 4 / 3 * np.pi * 9 * 10.5 * 10


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 2, 7])
def test_blank_slices_within_the_head_change_nothing_and_are_noted(big, plain, axis, slices):
    voxels, affine = big
    index = [slice(None)] * 3
    index[axis] = slice(33, 33 + slices)
    blank = voxels.copy()
    blank[tuple(index)] = 0
    done = prepare(blank, affine)
    assert_same_window(done, plain)
    pieces, count = done.warnings
    assert pieces.startswith("the head is in pieces")
    assert count.startswith(f"{slices} blank slice")


@pytest.mark.parametrize("value", [-2000, 3000, 30000])
@pytest.mark.parametrize("at", [0, 2, 30, 66])
@pytest.mark.parametrize("axis", [0, 2])
def test_slices_of_a_value_that_no_tissue_has_change_nothing(big, plain, axis, at, value):
    voxels, affine = (array.copy() for array in big)
    np.moveaxis(voxels, axis, 0)[at] = value
    done = prepare(voxels, affine)
    assert_same_window(done, plain)
    assert f"slices of {value:.4g}, far from all else" in done.warnings[0]
    assert len(done.warnings) == (3 if at == 30 else 1)


def test_a_dark_band_through_the_head_changes_nothing_and_is_noted(big, plain):
    voxels, affine = big
    dark = voxels.copy()
    dark[36:40] *= 0.03
    done = prepare(dark, affine)
    assert_same_window(done, plain)
    assert done.warnings[-1].startswith("the head is in pieces, and")


def test_a_scan_without_a_head_has_no_share_of_a_brightness():
    voxels = np.full((40, 40, 40), 100, np.int16)
    voxels[12:28, 12:28, 12:28] = 0
    notes = survey(Volume(voxels, np.diag([4.0, 4, 4, 1]), 1.0, 0.0, 1)).warnings
    assert notes and all(len(text) < 200 for text in notes)


# --- padding and spikes ----------------------------------------------------------------------------------------------


def corners(shape, kind):
    """Voxels outside of a cylinder along z, of a ball, or of a box that is turned by 12 degrees."""
    x, y, z = (np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2).astype(float)
    if kind == "cylinder":
        return x**2 + y**2 > 38**2
    if kind == "ball":
        return x**2 + y**2 + z**2 > 44**2
    c, s = np.cos(0.2), np.sin(0.2)
    return (np.abs(c * x - s * y) > 31) | (np.abs(s * x + c * y) > 35)


@pytest.mark.parametrize("kind", ["cylinder", "ball", "box"])
@pytest.mark.parametrize("value", [-1, -200, -500, -2000, -32768])
def test_padding_below_the_air_changes_nothing(big, plain, kind, value):
    voxels, affine = big
    done = prepare(np.where(corners(voxels.shape, kind), value, voxels), affine)
    assert_same(done, plain)
    assert done.warnings == []


@pytest.mark.parametrize("kind", ["cylinder", "ball", "box"])
@pytest.mark.parametrize(("value", "dtype"), [(65535, np.uint16), (32767, np.int16), (1e9, np.float32)])
def test_padding_above_the_head_is_taken_as_air_and_noted(big, plain, kind, value, dtype):
    voxels, affine = big
    done = prepare(np.where(corners(voxels.shape, kind), value, voxels), affine, dtype)
    assert_same(done, plain)
    assert "brighter than the head, was taken as air" in done.warnings[0] and len(done.warnings) == 1


@pytest.mark.parametrize("value", [-2000, 30000])
def test_padding_whose_edge_is_interpolated(big, value):
    voxels, affine = big

    def moved(array):
        return ndimage.shift(array.astype(float), (0.4, 0.3, 0), order=1, mode="nearest")

    padded = moved(np.where(corners(voxels.shape, "box"), value, voxels))
    assert_same(prepare(padded, affine), prepare(moved(voxels), affine))


@pytest.mark.parametrize("place", ["air", "head"])
def test_spikes_are_clipped_and_noted(big, plain, place):
    voxels, affine = big
    spiked = voxels.copy()
    rng = np.random.default_rng(1)
    where = np.flatnonzero((voxels < 60) if place == "air" else (voxels > 300))
    spiked.ravel()[rng.choice(where, 40, replace=False)] = np.repeat([1e6, -1e6], 20)
    done = prepare(spiked, affine, np.float32)
    assert_same(done, plain)
    (note,) = done.warnings
    assert note.startswith("40 voxels far outside of the range of the others")


def test_padding_and_spikes_at_once(big, plain):
    voxels, affine = big
    both = np.where(corners(voxels.shape, "cylinder"), -2000, voxels)
    both[30, 30, 76], both[34, 20, 76] = -1e7, 1e7
    assert_same(prepare(both, affine, np.float32), plain)


@pytest.mark.parametrize("offset", [0, 500, -2000])
def test_the_background_of_a_stripped_brain_is_no_padding(big, plain, offset):
    """It is not, or at least it is noted that it might be."""
    voxels, affine = big
    done = prepare(np.where(voxels > 200, voxels + max(offset, 0), min(offset, 0)), affine)
    assert_same(done, plain)
    assert [text for text in done.warnings if "padding, or a brain without skull" not in text] == []
    uniform = np.where(voxels > 200, 1000 + np.random.default_rng(2).normal(0, 10, voxels.shape), 0)
    done = prepare(uniform, affine)
    assert_same_window(done, plain)


def test_a_background_between_dark_and_bright_tissue(big, plain):
    """Brains whose voxels were standardised have 0, their mean, around them."""
    voxels, affine = big
    inside = voxels > 200
    standard = np.where(inside, (voxels - voxels[inside].mean()) / voxels[inside].std(), 0)
    done = prepare(standard, affine, np.float32)
    assert_same_window(done, plain)
    assert "as bright as tissue, was taken as air" in done.warnings[0]


# --- backgrounds that are not dark -----------------------------------------------------------------------------------

NOISE = {
    "uniform": lambda rng, shape: rng.uniform(0, 4095, shape),
    "salt and pepper": lambda rng, shape: rng.choice([0.0, 4095.0], shape),
    "normal": lambda rng, shape: np.clip(rng.normal(2048, 600, shape), 0, 4095),
    "darker": lambda rng, shape: rng.uniform(0, 2500, shape),
}


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("unit", [1.0, 1 / 4095])
def test_a_head_in_noise_is_found_and_noted(big, plain, kind, unit):
    voxels, affine = big
    noise = NOISE[kind](np.random.default_rng(3), voxels.shape)
    done = prepare(np.where(voxels > 200, 5 * voxels, noise) * unit - (unit < 1) / 2, affine, np.float32)
    assert np.abs(done.affine[:3, 3] - plain.affine[:3, 3]).max() <= 6
    assert "MP2RAGE" in done.warnings[0]


@pytest.mark.parametrize("kind", ["inverted", "weak noise", "no head"])
def test_what_no_head_can_be_told_from_is_noted(big, kind):
    voxels, affine = big
    rng = np.random.default_rng(4)
    made = {
        "inverted": 1500 - voxels,
        "weak noise": np.where(voxels > 200, voxels, rng.normal(500, 30, voxels.shape)),
        "no head": rng.normal(500, 100, voxels.shape),
    }
    warnings = prepare(made[kind], affine).warnings
    assert any("no background to separate the head from" in text or "MP2RAGE" in text for text in warnings)


def test_values_that_wrapped_around_are_noted(big):
    voxels, affine = big
    wrapped = np.round(voxels * 45).astype(np.int64).astype(np.uint16).view(np.int16)
    assert any("ml inside the head are darker than air" in note for note in prepare(wrapped, affine).warnings)
    assert prepare(voxels * 45 / 60, affine).warnings == []


# --- the field of view -----------------------------------------------------------------------------------------------


def cut(voxels, affine, axis, first, last):
    index = [slice(None)] * 3
    index[axis] = slice(first, last)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, axis] * (first or 0)
    return voxels[tuple(index)], moved


CUTS = {
    "left": (0, 26, None),
    "right": (0, None, 42),
    "back": (1, 30, None),
    "front": (1, None, 50),
    "top": (2, None, 50),
    "bottom": (2, 35, None),
}


@pytest.mark.parametrize("side", CUTS)
def test_a_face_that_cuts_through_the_head_is_noted(big, plain, side):
    voxels, affine = big
    axis, first, last = CUTS[side]
    (note,) = prepare(*cut(voxels, affine, axis, first, last)).warnings
    assert f"the field of view ends within the head at the {side}" in note


def test_slices_that_were_filled_with_zeros_are_noted_too(big):
    voxels, affine = big
    blank = voxels.copy()
    blank[:26] = 0
    (note,) = prepare(blank, affine).warnings
    assert "ends within the head at the left" in note


PLANES = {"right and top": [1, 0, 1], "back and top": [0, -1, 1], "left and back": [-1, -1, 0], "front": [0, 2, 1]}


@pytest.mark.parametrize("side", PLANES)
def test_a_plane_of_zeros_through_the_head_is_noted(big, side):
    voxels, affine = big
    normal = np.array(PLANES[side]) / np.linalg.norm(PLANES[side])
    (note,) = prepare(np.where(tiny.world(voxels.shape, affine) @ normal > 20, 0, voxels), affine).warnings
    assert f"ends on a plane at the {side}" in note


BITES = {
    "a circular field of view": lambda xyz: np.hypot(xyz[..., 0], xyz[..., 2]) > 70,
    "a ball": lambda xyz: np.linalg.norm(xyz - [0, 0, 80], axis=-1) < 40,
}


@pytest.mark.parametrize("bite", BITES)
def test_blank_voxels_that_cut_into_the_head_are_noted(big, bite):
    voxels, affine = big
    (note,) = prepare(np.where(BITES[bite](tiny.world(voxels.shape, affine)), 0, voxels), affine).warnings
    assert "surface border on blank voxels" in note


@pytest.mark.parametrize("where", ["corners", "face"])
def test_blank_voxels_beside_the_head_and_in_the_face_are_as_they_should_be(big, where):
    """Fields of view are circular, and faces are removed."""
    voxels, affine = big
    xyz = tiny.world(voxels.shape, affine)
    blank = np.hypot(xyz[..., 0], xyz[..., 1]) > 105 if where == "corners" else xyz @ [0, 0.6, -0.8] > 55
    assert prepare(np.where(blank, 0, voxels), affine).warnings == []


def test_a_slab_ends_at_both_sides(big):
    voxels, affine = big
    notes = prepare(*cut(voxels, affine, 2, 30, 50)).warnings
    assert ["bottom" in notes[0], "top" in notes[1]] == [True, True]


def test_a_neck_that_leaves_at_the_bottom_is_as_it_should_be(big):
    voxels, affine = big
    xyz = tiny.world(voxels.shape, affine)
    neck = (np.hypot(xyz[..., 0], xyz[..., 1] + 10) < 55) & (xyz[..., 2] < -30)
    assert prepare(np.where(neck, np.maximum(voxels, 450), voxels), affine).warnings == []


@pytest.mark.parametrize("value", [500, 900])
@pytest.mark.parametrize("side", [1, -1])
def test_a_box_of_padding_against_the_head_is_marked(big, value, side):
    voxels, affine = big
    xyz = tiny.world(voxels.shape, affine)
    box = (side * xyz[..., 0] > 66) & (np.abs(xyz[..., 1:]) < 30).all(axis=-1)
    done = prepare(np.where(box, value, voxels), affine)
    where = "right" if side > 0 else "left"
    assert done.warnings == [f"a block of one value lies against the head at the {where}: padding?"]
