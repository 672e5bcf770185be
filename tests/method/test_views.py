# SPDX-License-Identifier: Apache-2.0
"""Views: geometry against SciPy, intensity against its formula, and what their randomness depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from method_helpers import IMAGE, make_views, tiny_views
from monai.data import MetaTensor
from monai.transforms.utils import create_rotate, create_scale, create_translate
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.utils.data import default_collate

from volta_components.errors import InputError
from volta_components.method.masking import GroupMask
from volta_components.method.views import (
    CropGeometry,
    DrawViewsd,
    IntensityAugment,
    Views,
    filtered,
    plan_crops,
    sample_crops,
)


def random_volume(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.random(shape)


def as_volume(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)[None, None]


def crops_of(volume: torch.Tensor, affines: Sequence[np.ndarray] | np.ndarray, size: tuple[int, ...]) -> torch.Tensor:
    return sample_crops(volume, plan_crops(affines, volume.shape[2:]), size)


def scipy_crop(volume: np.ndarray, affine: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    return ndimage.affine_transform(volume, affine, output_shape=size, order=1, mode="grid-constant")


def halved(volume: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 x 2 voxels of a volume with even sides."""
    d, h, w = (side // 2 for side in volume.shape)
    return volume.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))


def test_crops_equal_scipy(rng: np.random.Generator) -> None:
    """Turned, shifted, zoomed, mirrored, anisotropic crops, partly outside of the volume, all in one call."""
    volume, size = random_volume(rng, (17, 22, 19)), (9, 12, 14)
    affines = []
    for _ in range(6):
        steps = rng.uniform(0.5, 1.3, 3) * np.array([rng.choice([-1, 1]), 1, 1])
        affines.append(
            create_translate(3, (np.array([8, 10.5, 9]) + rng.uniform(-6, 6, 3)).tolist())
            @ create_rotate(3, rng.uniform(-0.6, 0.6, 3).tolist())
            @ create_scale(3, steps.tolist())
            @ create_translate(3, [-4.0, -5.5, -6.5])
        )
    crops = crops_of(as_volume(volume), affines, size)
    assert crops.shape == (6, 1, *size)
    for crop, affine in zip(crops, affines):
        np.testing.assert_allclose(crop[0].numpy(), scipy_crop(volume, affine, size), atol=1e-4)


def test_channels_are_kept_apart(rng: np.random.Generator) -> None:
    volume = torch.tensor(rng.random((1, 2, 6, 7, 8)), dtype=torch.float32)
    affine = create_translate(3, [0.5, 1.0, -0.25])
    crops = crops_of(volume, [affine, np.eye(4)], (5, 5, 5))
    for channel in range(2):
        expected = scipy_crop(volume[0, channel].numpy(), affine, (5, 5, 5))
        np.testing.assert_allclose(crops[0, channel].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 14, 14), (9, 11, 13)])
def test_identity_crop_is_the_volume(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    volume = random_volume(rng, shape)
    crop = crops_of(as_volume(volume), np.eye(4)[None], shape)
    np.testing.assert_allclose(crop[0, 0].numpy(), volume, atol=1e-5)
    placed = CropGeometry(shape).draw(shape, rng)
    np.testing.assert_allclose(placed, np.eye(4), atol=1e-12)


def test_whole_voxel_shift_and_zeros_outside(rng: np.random.Generator) -> None:
    volume = random_volume(rng, (8, 8, 8))
    crop = crops_of(as_volume(volume), create_translate(3, [3, -2, 0])[None], (8, 8, 8))[0, 0].numpy()
    np.testing.assert_allclose(crop[:5, 2:], volume[3:, :6], atol=1e-5)
    assert not crop[5:].any()
    assert not crop[:, :2].any()


@pytest.mark.parametrize(("step", "level"), [(1.0, 0), (1.45, 0), (1.55, 1), (2.0, 1), (2.9, 1), (3.1, 2), (4.0, 2)])
def test_coarse_crops_are_averaged_first(rng: np.random.Generator, step: float, level: int) -> None:
    volume, size = random_volume(rng, (40, 48, 44)), (8, 8, 8)
    affine = (
        create_translate(3, [19.5, 23.5, 21.5]) @ create_scale(3, [step] * 3) @ create_translate(3, [-3.5, -3.5, -3.5])
    )
    source, to_level = volume, np.eye(4)
    for _ in range(level):
        source = halved(source)
        # Voxel j of the halved volume is centred between voxels 2 j and 2 j + 1.
        to_level = np.diag([0.5, 0.5, 0.5, 1]) @ create_translate(3, [-0.5] * 3) @ to_level
    crop = crops_of(as_volume(volume), affine[None], size)[0, 0].numpy()
    np.testing.assert_allclose(crop, scipy_crop(source, to_level @ affine, size), atol=1e-4)


def test_fine_detail_does_not_alias() -> None:
    """A chequerboard of single voxels, seen at every second voxel, is grey, not white."""
    board = np.indices((24, 24, 24)).sum(axis=0) % 2.0
    affine = create_scale(3, [2.0] * 3) @ create_translate(3, [2.0] * 3)
    crop = crops_of(as_volume(board), affine[None], (8, 8, 8))
    np.testing.assert_allclose(crop.numpy(), 0.5, atol=1e-5)


def test_levels_may_differ_within_a_call(rng: np.random.Generator) -> None:
    volume = as_volume(random_volume(rng, (24, 24, 24)))
    affines = [create_scale(3, [step] * 3) for step in (1.0, 2.0, 0.7, 2.5)]
    together = crops_of(volume, affines, (6, 6, 6))
    for crop, affine in zip(together, affines):
        torch.testing.assert_close(crop, crops_of(volume, affine[None], (6, 6, 6))[0], atol=1e-5, rtol=0)


def test_geometry_of_crops_96(rng: np.random.Generator) -> None:
    """192 mm padded around a 144 x 192 x 192 volume, seen at 2 mm (here a quarter of it: 36 x 48 x 48 to 24^3)."""
    volume = random_volume(rng, (36, 48, 48))
    geometry = CropGeometry((24, 24, 24), extent=(48, 48, 48))
    crop = crops_of(as_volume(volume), geometry.draw(volume.shape, rng)[None], geometry.size)[0, 0].numpy()
    np.testing.assert_allclose(crop, halved(np.pad(volume, ((6, 6), (0, 0), (0, 0)))), atol=1e-5)


def test_zoom_rotation_and_translation_stay_within_their_ranges(rng: np.random.Generator) -> None:
    geometry = CropGeometry((12, 16, 16), zoom=(0.9, 1.1), rotation=10, translation=3)
    shape = (14, 18, 20)
    zooms, angles, shifts = [], [], []
    for _ in range(400):
        affine = geometry.draw(shape, rng)
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        assert np.ptp(steps) < 1e-9  # never stretched
        zooms.append(1 / steps[0])
        angles.append(Rotation.from_matrix(affine[:3, :3] / steps[0]).as_euler("XYZ", degrees=True))
        middle = affine @ [(12 - 1) / 2, (16 - 1) / 2, (16 - 1) / 2, 1]
        shifts.append(middle[:3] - (np.array(shape) - 1) / 2)
    assert 0.9 <= min(zooms) < 0.91
    assert 1.09 < max(zooms) <= 1.1
    # Drawn log-uniformly: as often above 1 as the logarithms say.
    expected = math.log(1.1) / math.log(1.1 / 0.9)
    assert np.mean(np.array(zooms) > 1) == pytest.approx(expected, abs=0.08)
    for values, limit in ((np.abs(angles), 10), (np.abs(shifts), 3)):
        assert (values <= limit + 1e-6).all()
        assert (values.max(axis=0) > 0.95 * limit).all()


def test_a_zoom_over_one_shows_less() -> None:
    affine = CropGeometry((10, 10, 10), zoom=(1.25, 1.25)).draw((20, 20, 20), np.random.default_rng(0))
    np.testing.assert_allclose(np.diag(affine)[:3], 0.8)
    # The crop is centred: voxel edges -0.5 and 9.5 fall 4 voxels either side of the middle, 9.5.
    np.testing.assert_allclose(affine @ [-0.5, -0.5, -0.5, 1], [5.5, 5.5, 5.5, 1])
    np.testing.assert_allclose(affine @ [9.5, 9.5, 9.5, 1], [13.5, 13.5, 13.5, 1])


def test_local_crops_stay_inside_where_they_fit(rng: np.random.Generator) -> None:
    shape = (24, 32, 40)
    geometry = CropGeometry((8, 8, 8), cube_side=(6, 36), anywhere=True)
    sides, positions = [], []
    for _ in range(500):
        affine = geometry.draw(shape, rng)
        low, high = (affine @ [edge, edge, edge, 1] for edge in (-0.5, 7.5))
        side = (high - low)[:3]
        np.testing.assert_allclose(side, side[0])
        sides.append(side[0])
        for axis in range(3):
            if side[0] <= shape[axis]:
                assert low[axis] >= -0.5 - 1e-9
                assert high[axis] <= shape[axis] - 0.5 + 1e-9
            else:  # does not fit: centred on that axis
                assert (low[axis] + high[axis]) / 2 == pytest.approx((shape[axis] - 1) / 2)
        if side[0] < 8:
            positions.append(low[:3] + 0.5)
    assert 6 <= min(sides) < 6.2
    assert 35 < max(sides) <= 36
    assert np.median(sides) == pytest.approx(math.sqrt(6 * 36), rel=0.1)  # log-uniform
    assert (np.max(positions, axis=0) > 0.85 * (np.array(shape) - 8)).all()
    assert (np.min(positions, axis=0) < 0.15 * np.array(shape)).all()


def test_crops_that_are_placed_anywhere_are_not_moved_further() -> None:
    """And the draws after this one stay the same."""
    draws = [np.random.default_rng(0) for _ in range(2)]
    still, moved = (CropGeometry((8, 8, 8), anywhere=True, translation=reach) for reach in (0, 5))
    for _ in range(20):
        affine = moved.draw((10, 10, 10), draws[1])
        assert np.array_equal(still.draw((10, 10, 10), draws[0]), affine)
        assert (affine[:3, 3] >= 0).all() and (affine[:3, 3] <= 2).all()


def test_flips_are_left_right_only_and_off_by_default(rng: np.random.Generator) -> None:
    shape = (6, 7, 8)
    volume = random_volume(rng, shape)
    flipped = CropGeometry(shape, flip=1.0).draw(shape, rng)
    crop = crops_of(as_volume(volume), flipped[None], shape)[0, 0].numpy()
    np.testing.assert_allclose(crop, volume[::-1], atol=1e-5)
    assert all(np.linalg.det(CropGeometry(shape, rotation=20).draw(shape, rng)) > 0 for _ in range(50))
    half = [np.linalg.det(CropGeometry(shape, flip=0.5).draw(shape, rng)) < 0 for _ in range(300)]
    assert np.mean(half) == pytest.approx(0.5, abs=0.1)


def augment(crop: torch.Tensor, seed: int, **settings: float) -> np.ndarray:
    change = IntensityAugment(**settings)
    noise = torch.randn(crop.shape, generator=torch.Generator().manual_seed(seed))
    return change(crop.clone(), change.draw(np.random.default_rng(seed)), noise).double().numpy()


def test_brightness_contrast_and_gamma(rng: np.random.Generator) -> None:
    crop = torch.tensor(rng.uniform(0.4, 0.6, (1, 1, 6, 6, 6)), dtype=torch.float32)
    x = crop.double().numpy()
    shifts = [augment(crop, seed, brightness=0.2) - x for seed in range(40)]
    assert all(np.ptp(shift) < 1e-6 for shift in shifts)
    scales = [augment(crop, seed, contrast=0.3) / x for seed in range(40)]
    assert all(np.ptp(scale) < 1e-6 for scale in scales)
    gammas = [np.log(augment(crop, seed, gamma=1.5)) / np.log(x) for seed in range(40)]
    assert all(np.ptp(gamma) < 1e-5 for gamma in gammas)
    for values, low, high in ((shifts, -0.2, 0.2), (scales, 0.7, 1.3), (gammas, 1 / 1.5, 1.5)):
        drawn = [value.mean() for value in values]
        assert low - 1e-6 <= min(drawn) < low + 0.15 * (high - low)
        assert high - 0.15 * (high - low) < max(drawn) <= high + 1e-6


def test_noise(rng: np.random.Generator) -> None:
    crop = torch.full((1, 1, 16, 16, 16), 0.5)
    deviations = [augment(crop, seed, noise=0.05).std() for seed in range(40)]
    assert max(deviations) < 0.05 * 1.05
    assert max(deviations) > 0.04
    assert min(deviations) < 0.01
    assert augment(crop, 3, noise=0.05).mean() == pytest.approx(0.5, abs=0.003)


def test_bias_field_is_smooth_and_of_the_given_strength() -> None:
    crop = torch.full((1, 1, 13, 13, 13), 0.3)
    fields = [np.log(augment(crop, seed, bias=0.1)[0, 0] / 0.3) for seed in range(60)]
    corners = np.array([field[::12, ::12, ::12].ravel() for field in fields])
    assert corners.std() == pytest.approx(0.1, rel=0.15)
    for field in fields[:10]:
        # Trilinear between 4 control points an axis, here at every 4th voxel.
        between = field[:, 0, 0]
        np.testing.assert_allclose(
            between[1:4], between[0] + (between[4] - between[0]) * np.array([1, 2, 3]) / 4, atol=1e-5
        )


def test_blur_is_a_gaussian_within_its_range() -> None:
    crop = torch.zeros(1, 1, 15, 15, 15)
    crop[..., 7, 7, 7] = 1.0
    place = np.arange(15) - 7.0
    variances = []
    for seed in range(60):
        result = augment(crop, seed, blur=1.2, blur_probability=1.0)[0, 0]
        assert result.sum() == pytest.approx(1.0, abs=0.01)
        np.testing.assert_allclose(result, result.transpose(2, 0, 1), atol=1e-7)
        variances.append((result.sum(axis=(1, 2)) * place**2).sum())
    # The variance of a Gaussian averaged over voxels is larger by that of a voxel, 1/12.
    assert max(variances) < 1.2**2 + 1 / 12 + 0.05
    assert max(variances) > 1.0
    assert min(variances) < 0.3
    untouched = [np.array_equal(augment(crop, s, blur=1.2, blur_probability=0.5), crop.double()) for s in range(100)]
    assert np.mean(untouched) == pytest.approx(0.5, abs=0.15)


def test_intensities_stay_in_range(rng: np.random.Generator) -> None:
    crop = torch.tensor(rng.random((1, 1, 8, 8, 8)), dtype=torch.float32)
    for seed in range(20):
        result = augment(crop, seed, brightness=0.5, contrast=0.5, gamma=2, bias=0.5, noise=0.3, blur=1)
        assert 0 <= result.min() <= result.max() <= 1
    assert np.array_equal(augment(crop, 0), crop.double().numpy())  # all off: nothing happens


def test_an_intensity_change_is_its_formula(rng: np.random.Generator) -> None:
    """``clip(contrast * bias * x^gamma + brightness + noise)``, the log bias interpolated by SciPy; air stays dark."""
    change = IntensityAugment(0.1, 0.2, 1.4, 0.2, 0.05)
    plan = change.draw(rng)
    crop = torch.tensor(rng.random((1, 1, 7, 10, 13)), dtype=torch.float32)
    crop[..., :3] = 0
    noise = torch.randn(crop.shape, generator=torch.Generator().manual_seed(1))
    gamma, scale, shift, deviation, _ = plan.numbers.tolist()
    bias = np.exp(ndimage.zoom(plan.field[0, 0].double().numpy(), np.divide(crop.shape[2:], 4), order=1))
    x = crop[0, 0].double().numpy()
    expected = np.clip(scale * bias * x**gamma + shift + deviation * noise[0, 0].double().numpy(), 0, 1)
    np.testing.assert_allclose(change(crop, plan, noise)[0, 0], expected, atol=1e-5)


def test_teacher_and_student_have_noise_of_their_own(rng: np.random.Generator) -> None:
    """And what is masked by noise has its own deviates too."""
    noisy = IntensityAugment(noise=0.05)
    generator = tiny_views(teacher_intensity=noisy, student_intensity=noisy)
    views = make_views(generator, volumes(rng), [(1, 0), (1, 1), (1, 2)])
    seen, inner = ~views.masked, (views.image > 0.3) & (views.image < 0.7)
    teacher, student = views.teacher - views.image, views.student - views.image
    assert teacher[seen & inner].std() > 0.005 and student[seen & inner].std() > 0.005
    assert abs(np.corrcoef(teacher[seen & inner], student[seen & inner])[0, 1]) < 0.1
    filled = views.masked & (views.student > 0) & inner
    assert abs(np.corrcoef(teacher[filled], views.student[filled])[0, 1]) < 0.1


def volumes(rng: np.random.Generator, count: int = 3) -> torch.Tensor:
    coarse = rng.random((count, 5, 7, 7))
    fine = np.stack([ndimage.zoom(item, 2, order=1) for item in coarse])
    return torch.tensor(fine, dtype=torch.float32)[:, None]


def test_shapes_and_ranges(rng: np.random.Generator) -> None:
    views = make_views(tiny_views(num_local=3), volumes(rng), [(1, 0), (1, 5), (2, 0)])
    assert views.image.shape == views.teacher.shape == views.student.shape == views.masked.shape == (2, 3, 1, *IMAGE)
    assert views.local.shape == (3, 3, 1, 8, 8, 8)
    assert views.masked.dtype == torch.bool
    for name in ("image", "teacher", "student", "local"):
        part = getattr(views, name)
        assert -1e-6 <= part.min() <= part.max() <= 1 + 1e-6, name
    assert make_views(tiny_views(num_local=0), volumes(rng, 1), [(1, 0)]).local.shape == (0, 1, 1, 8, 8, 8)


def assert_same(first: Views, second: Views) -> None:
    for name in Views._fields:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_views_depend_on_seed_and_key_alone(rng: np.random.Generator) -> None:
    batch, keys = volumes(rng), [(1, 0), (1, 5), (2, 0)]
    generator = tiny_views(seed=3)
    together = make_views(generator, batch, keys)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    for position in (2, 0, 1):
        alone = make_views(tiny_views(seed=3), batch[position : position + 1], keys[position : position + 1])
        assert_same(Views(*(part[:, position : position + 1] for part in together)), alone)
    again = make_views(generator, batch[:1], [keys[0]])
    assert_same(again, make_views(generator, batch[:1], [keys[0]]))
    for other in (
        make_views(tiny_views(seed=4), batch[:1], [keys[0]]),
        make_views(generator, batch[:1], [(2, 0)]),
        make_views(generator, batch[:1], [(1, 1)]),
    ):
        assert not torch.equal(other.image, again.image)
        assert not torch.equal(other.masked, again.masked)
        assert not torch.equal(other.local, again.local)


def test_teacher_student_and_target_share_their_geometry(rng: np.random.Generator) -> None:
    """Without intensity changes all three are one picture, but for what is masked."""
    views = make_views(tiny_views(plain=True), volumes(rng), [(1, i) for i in range(3)])
    torch.testing.assert_close(views.teacher, views.image, atol=1e-6, rtol=0)
    visible = ~views.masked
    torch.testing.assert_close(views.student[visible], views.image[visible], atol=1e-6, rtol=0)
    hidden = views.student[views.masked]
    assert 0.2 < (hidden == 0).float().mean() < 0.8  # zeros, and noise around 0.5 otherwise
    noise = hidden[hidden != 0]
    assert noise.mean().item() == pytest.approx(0.5, abs=0.03)
    assert noise.std().item() == pytest.approx(1 / 6, abs=0.03)
    for crop in views.masked.flatten(0, 1):
        assert 0.5 <= crop.float().mean() <= 0.6
    assert not torch.equal(views.masked[0], views.masked[1])  # each crop has a mask of its own
    assert not torch.equal(views.image[0], views.image[1])


def test_of_two_scanners_the_teacher_sees_the_first_and_the_student_the_second(rng: np.random.Generator) -> None:
    one, other = volumes(rng), volumes(rng)
    keys = [(0, 0), (0, 1), (0, 2)]
    both = make_views(tiny_views(), torch.cat([one, other], dim=1), keys)
    first, second = (make_views(tiny_views(), each, keys) for each in (one, other))
    torch.testing.assert_close(both.teacher, first.teacher)
    for name in ("image", "student", "masked", "local"):
        torch.testing.assert_close(getattr(both, name), getattr(second, name))
    # A third channel is what is reconstructed, and nothing else.
    third = volumes(rng)
    of_three = make_views(tiny_views(), torch.cat([one, other, third], dim=1), keys)
    torch.testing.assert_close(of_three.image, make_views(tiny_views(), third, keys).image)
    for name in ("teacher", "student", "masked", "local"):
        torch.testing.assert_close(getattr(of_three, name), getattr(both, name))


def test_student_is_changed_more_than_the_teacher_and_locals_not_at_all(rng: np.random.Generator) -> None:
    batch, keys = volumes(rng), [(1, i) for i in range(3)]
    plain, strong = (make_views(tiny_views(plain=plain), batch, keys) for plain in (True, False))
    assert torch.equal(plain.image, strong.image)
    visible = ~strong.masked
    change_of_student = (strong.student - strong.image)[visible].abs().mean()
    change_of_teacher = (strong.teacher - strong.image).abs().mean()
    assert 0 < 2 * change_of_teacher < change_of_student
    # Each is made from the crop itself, not one from the other.
    mine = make_views(tiny_views(student_intensity=IntensityAugment()), batch, keys)
    torch.testing.assert_close(mine.student[~mine.masked], mine.image[~mine.masked], atol=1e-6, rtol=0)
    theirs = make_views(tiny_views(teacher_intensity=IntensityAugment()), batch, keys)
    torch.testing.assert_close(theirs.teacher, theirs.image, atol=1e-6, rtol=0)
    # Clean: a local crop is a pure resampling of the volume, so a constant volume stays constant inside.
    generator = tiny_views(local_geometry=CropGeometry((4, 4, 4), cube_side=(4, 6), anywhere=True), num_local=5)
    local = make_views(generator, torch.full((1, 1, 10, 14, 14), 0.6), [(1, 0)]).local
    np.testing.assert_allclose(local.numpy(), 0.6, atol=1e-6)


def test_the_transform_draws_for_the_items_own_key_and_drops_metadata(rng: np.random.Generator) -> None:
    generator = tiny_views()
    image = MetaTensor(volumes(rng, 1)[0], meta={"filename_or_obj": "a.nii"})
    item = DrawViewsd(generator)({"image": image, "key": torch.tensor([3, 7]), "subject_id": "a"})
    assert type(item["image"]) is torch.Tensor
    assert set(item) == {"image", "key", "plan"}
    views = generator(item["image"][None], default_collate([item["plan"]]))
    assert_same(views, make_views(generator, item["image"][None], [(3, 7)]))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="empty side"):
        CropGeometry((8, 0, 8))
    with pytest.raises(InputError, match="zoom"):
        CropGeometry((8, 8, 8), zoom=(1.1, 0.9))
    with pytest.raises(InputError, match="cube_side"):
        CropGeometry((8, 8, 8), cube_side=(0, 4))
    with pytest.raises(InputError, match="gamma"):
        IntensityAugment(gamma=0.5)
    with pytest.raises(InputError, match="contrast"):
        IntensityAugment(contrast=1)
    with pytest.raises(InputError, match="coverage"):
        GroupMask(coverage=1.2)


@pytest.mark.parametrize("width", [3, 5, 9])
def test_filtering_is_scipys_with_zeros_outside(rng: np.random.Generator, width: int) -> None:
    image = torch.from_numpy(rng.random((2, 1, 7, 9, 3), dtype=np.float32))
    half = rng.random(width // 2 + 1)
    weights = np.concatenate([half[:0:-1], half])
    expected = image.numpy()
    for axis in (2, 3, 4):
        expected = ndimage.correlate1d(expected, weights, axis=axis, mode="constant")
    np.testing.assert_allclose(filtered(image, weights.tolist()).numpy(), expected, rtol=1e-4)
