# SPDX-License-Identifier: Apache-2.0
"""The views of a volume (paper, fig. 1): made on the device, all crops of a volume in one resampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.networks.layers import gaussian_1d
from monai.transforms import MapTransform
from monai.transforms.traits import RandomizableTrait
from monai.transforms.utils import create_rotate, create_scale, create_translate
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate

from volta_components.errors import InputError
from volta_components.method.air import AirTokens
from volta_components.method.masking import VISIBLE, GroupMask
from volta_components.training.sampling import derived_seed


class CropPlan(NamedTuple):
    """Where crops read, drawn on the host; see ``plan_crops``.

    Attributes:
        levels: ``[n]``, how often the volume is halved before a crop is taken from it. Stays on the host, where it
            decides which kernels run.
        readings: ``[n, 3, 4]`` float64, from voxel indices of a crop to ``grid_sample``'s normalised (x, y, z).
    """

    levels: Tensor
    readings: Tensor


def plan_crops(affines: Sequence[np.ndarray] | np.ndarray, volume_shape: Sequence[int]) -> CropPlan:
    """Plan crops by affine resampling.

    Crops that are coarser than 1.5 voxels are taken from the volume averaged over 2 x 2 x 2 voxels (and so on), so that
    fine detail does not alias.

    Args:
        affines: ``[n, 4, 4]``, from voxel indices of a crop to voxel indices of the volume (the "pull" convention of
            ``scipy.ndimage.affine_transform``).
        volume_shape: voxels of the volume along each axis.
    """
    matrices = np.asarray(affines, dtype=np.float64).reshape(-1, 4, 4)
    steps = np.linalg.norm(matrices[:, :3, :3], axis=1).mean(axis=1)
    levels = np.maximum(0, np.floor(np.log2(np.maximum(steps, 1e-6) / 1.5) + 1)).astype(np.int64)
    readings = np.empty((len(matrices), 3, 4))
    for i, (matrix, level) in enumerate(zip(matrices, levels.tolist())):
        factor = 2**level
        # Voxel i of the averaged volume is centred on voxel factor * i + (factor - 1) / 2 of the volume.
        to_level = create_scale(3, [1 / factor] * 3) @ create_translate(3, [-(factor - 1) / 2] * 3)
        # Voxel index i of a source of n voxels is at (2 i + 1) / n - 1.
        scale = 2.0 / np.ceil(np.asarray(volume_shape) / factor)
        reading = (to_level @ matrix)[:3] * scale[:, None]
        reading[:, 3] += scale / 2 - 1.0
        readings[i] = reading[::-1]
    return CropPlan(torch.from_numpy(levels), torch.from_numpy(readings))


def sample_crops(volume: Tensor, plan: CropPlan, size: Sequence[int]) -> Tensor:
    """Crops of one volume by affine resampling (trilinear, zeros outside).

    MONAI's ``AffineTransform`` would copy the volume once for each crop; here it is read in place.

    Args:
        volume: ``[1, C, D, H, W]``.
        plan: of n crops, its ``readings`` on the volume's device.
        size: voxels of a crop along each axis.
    """
    levels = plan.levels.tolist()
    crops: dict[int, Tensor] = {}
    for level in sorted(set(levels)):
        chosen = [i for i, own in enumerate(levels) if own == level]
        source = functional.avg_pool3d(volume, 2**level, ceil_mode=True) if level else volume
        grid = _sampling_grid(torch.stack([plan.readings[i] for i in chosen]), size).to(volume.dtype)
        sources = source.expand(len(chosen), -1, -1, -1, -1)
        found = functional.grid_sample(sources, grid, align_corners=False, padding_mode="zeros")
        if len(found) == len(levels):
            return found
        crops |= dict(zip(chosen, found.split(1)))
    if not crops:
        return volume.new_empty((0, volume.shape[1], *size))
    return torch.cat([crops[i] for i in range(len(levels))])


def _sampling_grid(readings: Tensor, size: Sequence[int]) -> Tensor:
    """Where crops read, ``[n, *size, 3]``, in ``grid_sample``'s normalised (x, y, z) order.

    An affine grid is a sum of three terms, each along one axis of the crop. They are added up by broadcasting, each
    coordinate as an image of its own, which takes a tenth of the time of ``affine_grid``: that multiplies a matrix with
    the coordinates of every voxel.
    """
    terms = []
    for axis, count in enumerate(size):
        term = readings[:, :, axis, None] * torch.arange(count, device=readings.device)
        if axis == 0:
            term = term + readings[:, :, 3, None]
        shape = [len(readings), 3, 1, 1, 1]
        shape[axis + 2] = count
        terms.append(term.float().view(shape))
    return (terms[0] + terms[1] + terms[2]).permute(0, 2, 3, 4, 1)


@dataclass(eq=False)
class CropGeometry:
    """Random placement of a crop: its position in the volume, its size and its rotation.

    Attributes:
        size: voxels of the crop along each axis.
        extent: voxels of the volume along each axis that the crop spans before zoom; ``size`` by default. A larger
            extent gives a coarser crop.
        zoom: range of the linear zoom, drawn log-uniformly; over 1 shows less of the volume, enlarged.
        cube_side: instead of ``extent`` and ``zoom``: range of the side of a cube in voxels of the volume, drawn
            log-uniformly.
        rotation: largest rotation about each axis, degrees.
        translation: largest shift of a crop along each axis, voxels of the volume; none with ``anywhere``.
        anywhere: place the crop uniformly where it fits into the volume before it is turned, rather than around the
            volume's centre.
        flip: chance of a left-right flip (first axis); 0 since left and right are different classes downstream.
    """

    size: Sequence[int]
    extent: Sequence[float] | None = None
    zoom: tuple[float, float] = (1.0, 1.0)
    cube_side: tuple[float, float] | None = None
    rotation: float = 0.0
    translation: float = 0.0
    anywhere: bool = False
    flip: float = 0.0

    def __post_init__(self) -> None:
        if any(side < 1 for side in self.size):
            raise InputError(f"crop size {tuple(self.size)} has an empty side")
        for name, span in {"zoom": self.zoom, "cube_side": self.cube_side}.items():
            if span is not None and not 0 < span[0] <= span[1]:
                raise InputError(f"crop {name} {tuple(span)} is not a range of positive numbers from small to large")

    def middle_of(self, volume: Tensor) -> Tensor:
        """The crop ``[1, C, *size]`` of a volume ``[1, C, D, H, W]`` without anything random: its middle."""
        shape = volume.shape[2:]
        affine = CropGeometry(self.size, self.extent).draw(shape, np.random.default_rng(0))
        return sample_crops(volume, to_device(plan_crops(affine, shape), volume.device), self.size)

    def draw(self, volume_shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """One random affine ``[4, 4]`` from voxel indices of the crop to voxel indices of the volume."""
        if self.cube_side is not None:
            extent = np.full(3, math.exp(rng.uniform(*np.log(self.cube_side))))
        else:
            extent = np.asarray(self.extent or self.size, float) / math.exp(rng.uniform(*np.log(self.zoom)))
        shape = np.asarray(volume_shape, dtype=float)
        centre = shape / 2
        if self.anywhere:
            room = np.maximum(0.0, shape - extent) / 2
            centre = centre + rng.uniform(-room, room)
        reach = 0.0 if self.anywhere else self.translation
        centre = centre + rng.uniform(-reach, reach, size=3)
        angles = np.radians(rng.uniform(-self.rotation, self.rotation, size=3))
        step = extent / np.asarray(self.size)
        mirror = np.array([-1.0 if rng.random() < self.flip else 1.0, 1.0, 1.0])
        # Voxel i covers [i, i + 1): its centre is i + 0.5, and the middle of a crop is size / 2.
        return np.asarray(
            create_translate(3, (centre - 0.5).tolist())
            @ create_rotate(3, angles.tolist())
            @ create_scale(3, (step * mirror).tolist())
            @ create_translate(3, [0.5 - side / 2 for side in self.size])
        )


class IntensityPlan(NamedTuple):
    """The numbers of an intensity change, drawn on the host.

    Attributes:
        numbers: ``[5]`` float64: gamma, scale, shift, deviation of the noise, weights of the blur (0: none). They stay
            on the host, where they decide which kernels run.
        kernel: weights of the blur, filled up with zeros; on the host as well.
        field: ``[1, 1, 4, 4, 4]``, control points of the log bias field.
    """

    numbers: Tensor
    kernel: Tensor
    field: Tensor


@dataclass(eq=False)
class IntensityAugment:
    """Random contrast, brightness, gamma, smooth bias field, blur and noise; mild and strong are two settings of it.

    Everything but the blur is one formula for each voxel: ``clip(field * x^gamma + brightness + noise)``, the field
    holding contrast and bias. It is computed as ``exp(gamma * log(x) + log(field))``, which takes half the passes.
    MONAI's transforms would take one call and some passes each.

    Attributes:
        brightness: largest shift, in units of intensity.
        contrast: largest relative change of the scale.
        gamma: largest exponent; drawn log-uniformly between its reciprocal and itself; at least 1.
        bias: deviation of the log bias field's control points.
        noise: largest deviation of the Gaussian noise, in units of intensity.
        blur: largest deviation of the Gaussian blur, in voxels.
        blur_probability: chance of a blur.

    Raises:
        InputError: for values out of range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 1.0
    bias: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    blur_probability: float = 0.5

    def __post_init__(self) -> None:
        strengths = (self.brightness, self.contrast, self.bias, self.noise, self.blur)
        if min(strengths) < 0 or self.gamma < 1 or self.contrast >= 1:
            raise InputError("intensity augmentation: strengths are >= 0, contrast < 1 and gamma >= 1")

    def draw(self, rng: np.random.Generator) -> IntensityPlan:
        """Draw the few numbers that a change is made of."""
        gamma = math.exp(rng.uniform(-1.0, 1.0) * math.log(self.gamma))
        scale = 1.0 + rng.uniform(-self.contrast, self.contrast)
        shift = rng.uniform(-self.brightness, self.brightness)
        deviation = rng.uniform(0.0, self.noise)
        field = rng.normal(0.0, self.bias, size=(1, 1, 4, 4, 4)) if self.bias else np.zeros((1, 1, 4, 4, 4))
        widest = max(0.2, self.blur)
        kernel, width = torch.zeros_like(gaussian_1d(torch.tensor(widest), truncated=3.0)), 0
        if self.blur and rng.random() < self.blur_probability:
            weights = gaussian_1d(torch.tensor(rng.uniform(0.2, widest)), truncated=3.0)
            width = len(weights)
            kernel[:width] = weights
        numbers = torch.tensor([gamma, scale, shift, deviation, width], dtype=torch.float64)
        return IntensityPlan(numbers, kernel, torch.from_numpy(field).float())

    def __call__(self, crop: Tensor, plan: IntensityPlan, noise: Tensor) -> Tensor:
        """Augment one crop in place.

        Args:
            crop: ``[1, C, D, H, W]`` in [0, 1].
            plan: what ``draw`` gave.
            noise: normal deviates for the voxels, of the crop's shape.

        Returns:
            The crop, in [0, 1].
        """
        gamma, scale, shift, deviation, width = plan.numbers.tolist()
        if width:
            crop.copy_(filtered(crop, plan.kernel[: int(width)].tolist()))
        if gamma != 1.0 or scale != 1.0 or self.bias:
            field = _enlarged(plan.field + math.log(scale), crop.shape[2:])
            torch.add(field, crop.clamp_(min=0.0).log_(), alpha=gamma, out=crop).exp_()
        if shift != 0.0:
            crop.add_(shift)
        if deviation:
            crop.add_(noise, alpha=deviation)
        return crop.clamp_(0.0, 1.0)


def _enlarged(field: Tensor, shape: Sequence[int]) -> Tensor:
    """Control points ``[1, 1, d, h, w]`` interpolated linearly, the outer ones on the outer voxels.

    ``functional.interpolate`` (trilinear, ``align_corners``) gives the same in five times the time: an axis at a time,
    interpolation is a product with a small matrix.
    """
    for side in shape:
        # The axis that is done goes to the end; after three turns the axes are in order again.
        field = torch.einsum("abxyz,sx->abyzs", field, _line_weights(field.shape[2], side, field.device))
    return field


@functools.lru_cache(maxsize=16)
def _line_weights(count: int, side: int, device: torch.device) -> Tensor:
    """How much each of some voxels takes of each control point on its line, ``[side, count]``.

    Kept: made anew for each crop, they were 72 of the 182 operations of a volume's views, and to start one costs time.
    """
    with torch.inference_mode(False):
        places = torch.linspace(0, count - 1, side, device=device)
        return (1 - (places[:, None] - torch.arange(count, device=device)).abs()).clamp_(min=0)


def filtered(image: Tensor, weights: Sequence[float]) -> Tensor:
    """Images ``[..., D, H, W]`` filtered by the same odd number of symmetric weights along each axis, zeros outside.

    A sum of shifted images, which takes a fifth of the time of MONAI's ``separable_filtering``: ``conv3d`` is slow with
    one channel, on CPUs and GPUs.
    """
    radius = len(weights) // 2
    for axis in (-3, -2, -1):
        result, length = image * weights[radius], image.shape[axis]
        for step in range(1, min(radius, length - 1) + 1):
            inner = (axis, 0, length - step), (axis, step, length - step)
            for to, source in (inner, inner[::-1]):
                result.narrow(*to).add_(image.narrow(*source), alpha=weights[radius + step])
        image = result
    return image


class Views(NamedTuple):
    """All views of a mini-batch; the first axis runs over views, the second over volumes.

    Attributes:
        image: ``[2, B, 1, D, H, W]``, global crops after geometry and before any intensity change: what is
            reconstructed ("the original MRI").
        teacher: global crops with mild intensity changes, never masked.
        student: the same crops with stronger intensity changes, masked.
        masked: ``[2, B, 1, D, H, W]``, true where the student's crop was replaced.
        local: ``[L, B, 1, d, h, w]``, clean local crops.
    """

    image: Tensor
    teacher: Tensor
    student: Tensor
    masked: Tensor
    local: Tensor


class ViewPlan(NamedTuple):
    """What is random about a volume's views, but for the noise of voxels; made in the loader's workers.

    Attributes:
        seed: ``[]``, of the noise; stays on the host.
        global_crops: of the two global crops.
        teacher: intensity changes of the global crops; every tensor's first axis runs over the two.
        student: intensity changes of the same crops for the student, with the same axes.
        cells: ``[2, d, h, w]`` uint8, what each cell of the student's global crops is masked by.
        local_crops: of the local crops.
    """

    seed: Tensor
    global_crops: CropPlan
    teacher: IntensityPlan
    student: IntensityPlan
    cells: Tensor
    local_crops: CropPlan


@dataclass(eq=False)
class ViewGenerator:
    """Makes the views of a mini-batch on its own device.

    What is random is drawn on the host, by ``draw``: in the loader's workers, so that neither the training process nor
    a GPU waits for it. The views of a volume depend on the seed and the volume's key (epoch, index) alone: not on the
    batch, the worker, the process, or earlier mini-batches.

    Attributes:
        global_geometry: placement of the two global crops.
        local_geometry: placement of local crops.
        num_local: local crops of each volume; 0 for none.
        teacher_intensity: mild changes.
        student_intensity: stronger changes.
        mask: group mask for the student's global crops.
        seed: base seed.
        air: finds the tokens of crops that show only air, which then take no part; by default all take part.
    """

    num_global = 2

    global_geometry: CropGeometry
    local_geometry: CropGeometry
    num_local: int
    teacher_intensity: IntensityAugment
    student_intensity: IntensityAugment
    mask: GroupMask
    seed: int = 0
    air: AirTokens | None = None

    def draw(self, shape: Sequence[int], key: Sequence[int]) -> ViewPlan:
        """Draw what is random about the views of one volume.

        Args:
            shape: voxels of the volume along each axis.
            key: (epoch, index) of the volume.
        """
        seed = derived_seed(self.seed, "views", *(int(part) for part in key))
        rng = np.random.default_rng(seed)
        size = self.global_geometry.size
        global_crops = plan_crops([self.global_geometry.draw(shape, rng) for _ in range(self.num_global)], shape)
        teacher, student, cells = [], [], []
        for _ in range(self.num_global):
            teacher.append(self.teacher_intensity.draw(rng))
            student.append(self.student_intensity.draw(rng))
            cells.append(torch.from_numpy(self.mask.draw(size, rng)))
        local_crops = plan_crops([self.local_geometry.draw(shape, rng) for _ in range(self.num_local)], shape)
        intensities = default_collate(teacher), default_collate(student)
        return ViewPlan(torch.tensor(seed), global_crops, *intensities, torch.stack(cells), local_crops)

    @torch.no_grad()
    def __call__(self, volumes: Tensor, plan: ViewPlan) -> Views:
        """Views of volumes ``[B, 1, D, H, W]`` in [0, 1].

        Args:
            volumes: the mini-batch; views are made on its device. With two channels, the teacher sees the first and the
                student the second: the same head by two scanners. A third channel is what is reconstructed; otherwise
                it is what the student sees.
            plan: what ``draw`` gave for each volume, collated: every tensor's first axis runs over volumes.
        """
        plan = to_device(plan, volumes.device)
        batch = [self._views_of(volume, part_of(plan, i)) for i, volume in enumerate(volumes.split(1))]
        if len(batch) == 1:
            return Views(*(part[:, None] for part in batch[0]))
        return Views(*(torch.stack(parts, dim=1) for parts in zip(*batch, strict=True)))

    def _views_of(self, volume: Tensor, plan: ViewPlan) -> tuple[Tensor, ...]:
        # On meta nothing is computed, and there are no generators.
        generator = None if volume.is_meta else torch.Generator(volume.device).manual_seed(int(plan.seed))
        size = self.global_geometry.size
        both = sample_crops(volume, plan.global_crops, size)
        image, own = both[:, -1:], min(1, both.shape[1] - 1)
        teacher, student = both[:, :1].clone(), both[:, own : own + 1].clone()
        labels = torch.stack([self.mask.enlarge(plan.cells[i], size) for i in range(len(student))])[:, None]
        # A voxel of the student is either masked or seen, so that both kinds of noise can be the same deviates.
        hazes = [torch.empty_like(part).normal_(generator=generator) for part in (teacher, student)]
        for i in range(len(student)):
            one = slice(i, i + 1)
            self.teacher_intensity(teacher[one], part_of(plan.teacher, i), hazes[0][one])
            self.student_intensity(student[one], part_of(plan.student, i), hazes[1][one])
        student = self.mask.fill(student, labels, hazes[1])
        local = sample_crops(volume[:, own : own + 1], plan.local_crops, self.local_geometry.size)
        return image, teacher, student, labels != VISIBLE, local


# Fields that the host reads to decide what to compute.
_ON_HOST = {"levels", "numbers", "kernel", "seed"}


def to_device(plan: Any, device: torch.device) -> Any:
    """A plan with what kernels read on the device, and the rest where it is; nothing waits if memory is pinned."""
    if isinstance(plan, Tensor):
        return plan.to(device, non_blocking=True)
    parts = {name: part if name in _ON_HOST else to_device(part, device) for name, part in plan._asdict().items()}
    return type(plan)(**parts)


def part_of(plan: Any, i: int) -> Any:
    """The i-th of what is collated in a plan."""
    return plan[i] if isinstance(plan, Tensor) else type(plan)(*(part_of(part, i) for part in plan))


class DrawViewsd(MapTransform, RandomizableTrait):
    """Makes of an item what the trainer needs: ``image``, ``key``, and the views' ``plan``, all without metadata.

    With the option ``air`` of the views there is ``kept`` as well: which tokens of global and local crops take part.

    A transform, so that the loader's workers draw. ``RandomizableTrait`` keeps it out of caches.

    Args:
        views: whose ``draw`` is called.
    """

    def __init__(self, views: ViewGenerator) -> None:
        super().__init__(("image", "key"))
        self.views = views

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """An item with ``image`` ``[1, D, H, W]`` and its ``key``, (epoch, index)."""
        image = convert_to_tensor(data["image"], dtype=torch.float32, track_meta=False)
        plan = self.views.draw(image.shape[1:], data["key"].tolist())
        item: dict[Hashable, Any] = {"image": image, "key": data["key"], "plan": plan}
        if self.views.air is not None:
            item["kept"] = {
                "globals": self.views.air.kept(image, *plan.global_crops, self.views.global_geometry.size),
                "locals": self.views.air.kept(image, *plan.local_crops, self.views.local_geometry.size),
            }
        return item
