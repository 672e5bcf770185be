# SPDX-License-Identifier: Apache-2.0
"""The views of a volume (paper, fig. 1): made on the device, all crops of a volume in one resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.transforms.utils import create_rotate, create_scale, create_translate
from torch import Tensor
from torch.nn import functional

from volta_components.errors import InputError
from volta_components.method.masking import VISIBLE, GroupMask
from volta_components.training.sampling import derived_seed


def sample_crops(volume: Tensor, affines: Sequence[np.ndarray] | np.ndarray, size: Sequence[int]) -> Tensor:
    """Crops ``[n, C, *size]`` of one volume by affine resampling (trilinear, zeros outside), all of them in one call.

    MONAI's ``AffineTransform`` takes one source for each crop, which would copy the volume once for each. Here the
    sampling grids are joined, and the volume is read in place. Crops that are coarser than 1.5 voxels are taken from
    the volume averaged over 2 x 2 x 2 voxels (and so on), so that fine detail does not alias.

    Args:
        volume: ``[1, C, D, H, W]``.
        affines: ``[n, 4, 4]``, from voxel indices of a crop to voxel indices of the volume (the "pull" convention of
            ``scipy.ndimage.affine_transform``).
        size: voxels of a crop along each axis.
    """
    matrices = np.asarray(affines, dtype=np.float64)
    steps = np.linalg.norm(matrices[:, :3, :3], axis=1).mean(axis=1)
    levels = np.maximum(0, np.floor(np.log2(np.maximum(steps, 1e-6) / 1.5) + 1)).astype(int)
    crops = volume.new_empty((len(matrices), volume.shape[1], *size))
    for level in np.unique(levels):
        chosen = np.flatnonzero(levels == level)
        factor = 2 ** int(level)
        source = volume if factor == 1 else functional.avg_pool3d(volume, factor, ceil_mode=True)
        # Voxel i of the averaged volume is centred on voxel factor * i + (factor - 1) / 2 of the volume.
        to_level = create_scale(3, [1 / factor] * 3) @ create_translate(3, [-(factor - 1) / 2] * 3)
        grid = _sampling_grid(to_level @ matrices[chosen], source.shape[2:], size, volume)
        row = functional.grid_sample(source, grid.flatten(0, 1)[None], align_corners=False, padding_mode="zeros")
        crops[torch.as_tensor(chosen, device=volume.device)] = row[0].unflatten(1, (len(chosen), -1)).transpose(0, 1)
    return crops


def _sampling_grid(matrices: np.ndarray, source: Sequence[int], size: Sequence[int], like: Tensor) -> Tensor:
    """Where crops read, ``[n, *size, 3]``, in ``grid_sample``'s normalised (x, y, z) order.

    An affine grid is a sum of three terms, each along one axis of the crop; adding them up by broadcasting takes a
    third of the time of ``affine_grid``, which multiplies a matrix with the coordinates of every voxel.
    """
    # Voxel index i of a source of n voxels is at (2 i + 1) / n - 1.
    scale = 2.0 / np.asarray(source, dtype=np.float64)
    linear = matrices[:, :3, :3] * scale[:, None]
    offset = matrices[:, :3, 3] * scale + scale / 2 - 1.0
    terms = []
    for axis, count in enumerate(size):
        term = linear[:, None, :, axis] * np.arange(count)[:, None] + (offset[:, None] if axis == 0 else 0.0)
        shape = [len(matrices), 1, 1, 1, 3]
        shape[axis + 1] = count
        reversed_term = np.ascontiguousarray(term[..., ::-1]).reshape(shape)
        terms.append(torch.as_tensor(reversed_term, dtype=like.dtype, device=like.device))
    return terms[0] + terms[1] + terms[2]


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
        translation: largest shift of a crop along each axis, voxels of the volume, when it is centred.
        anywhere: place the crop uniformly where it fits into the volume, rather than around its centre.
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
        centre = centre + rng.uniform(-self.translation, self.translation, size=3)
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


@dataclass(eq=False)
class IntensityAugment:
    """Random contrast, brightness, gamma, smooth bias field, blur and noise; mild and strong are two settings of it.

    Everything but the blur is one pass over the voxels: ``clip(field * x^gamma + brightness + noise)``, the field
    holding contrast and bias. MONAI's transforms would take six passes and one Python call a crop each.

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

    def __call__(self, crop: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """Augment a crop ``[1, C, D, H, W]`` in [0, 1], which is not changed.

        ``generator`` gives the voxels' noise on the crop's device, ``rng`` the few other numbers.
        """
        gamma = math.exp(rng.uniform(-1.0, 1.0) * math.log(self.gamma))
        scale = 1.0 + rng.uniform(-self.contrast, self.contrast)
        shift = rng.uniform(-self.brightness, self.brightness)
        deviation = rng.uniform(0.0, self.noise)
        control = rng.normal(0.0, self.bias, size=(1, 1, 4, 4, 4)) if self.bias else None
        sigma = rng.uniform(0.2, max(0.2, self.blur)) if self.blur and rng.random() < self.blur_probability else 0.0
        result = crop.clone()
        if sigma:
            kernel = gaussian_1d(torch.tensor(sigma), truncated=3.0).to(crop.device)
            result = separable_filtering(result, [kernel] * 3)
        if gamma != 1.0:
            result = result.clamp_(min=0.0).pow_(gamma)
        if control is not None:
            points = torch.as_tensor(control, dtype=crop.dtype, device=crop.device)
            field = functional.interpolate(points, size=crop.shape[2:], mode="trilinear", align_corners=True)
            result = result.mul_(field.exp_())
        if scale != 1.0 or shift != 0.0:
            result = result.mul_(scale).add_(shift)
        if deviation:
            noise = torch.randn(crop.shape, generator=generator, device=crop.device, dtype=crop.dtype)
            result = result.add_(noise, alpha=deviation)
        return result.clamp_(0.0, 1.0)


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


@dataclass(eq=False)
class ViewGenerator:
    """Makes the views of a mini-batch on its own device.

    The views of a volume depend on the seed and the volume's key (epoch, index) alone: not on the batch, the worker,
    the process, or earlier mini-batches.

    Attributes:
        global_geometry: placement of the two global crops.
        local_geometry: placement of local crops.
        num_local: local crops of each volume; 0 for none.
        teacher_intensity: mild changes.
        student_intensity: stronger changes.
        mask: group mask for the student's global crops.
        seed: base seed.
    """

    num_global = 2

    global_geometry: CropGeometry
    local_geometry: CropGeometry
    num_local: int
    teacher_intensity: IntensityAugment
    student_intensity: IntensityAugment
    mask: GroupMask
    seed: int = 0

    @torch.no_grad()
    def __call__(self, volumes: Tensor, keys: Sequence[Sequence[int]] | Tensor) -> Views:
        """Views of volumes ``[B, 1, D, H, W]`` in [0, 1], on their device; keys are (epoch, index) of each."""
        batch = [
            self._views_of(volume, [int(part) for part in key])
            for volume, key in zip(volumes.split(1), keys, strict=True)
        ]
        if len(batch) == 1:
            return Views(*(part[:, None] for part in batch[0]))
        return Views(*(torch.stack(parts, dim=1) for parts in zip(*batch, strict=True)))

    def _views_of(self, volume: Tensor, key: Sequence[int]) -> tuple[Tensor, ...]:
        seed = derived_seed(self.seed, "views", *key)
        rng = np.random.default_rng(seed)
        generator = torch.Generator(device=volume.device).manual_seed(seed)
        shape = volume.shape[2:]
        size = self.global_geometry.size
        image = sample_crops(volume, [self.global_geometry.draw(shape, rng) for _ in range(self.num_global)], size)
        teacher, student, masked = [], [], []
        for crop in image.split(1):
            teacher.append(self.teacher_intensity(crop, rng, generator))
            strong = self.student_intensity(crop, rng, generator)
            labels = self.mask.enlarge(self.mask.draw(size, rng), size, volume.device).expand_as(crop)
            noise = torch.randn(crop.shape, generator=generator, device=crop.device, dtype=crop.dtype)
            student.append(self.mask.fill(strong, labels, noise))
            masked.append(labels != VISIBLE)
        if self.num_local:
            affines = [self.local_geometry.draw(shape, rng) for _ in range(self.num_local)]
            local = sample_crops(volume, affines, self.local_geometry.size)
        else:
            local = volume.new_empty((0, volume.shape[1], *self.local_geometry.size))
        return image, torch.cat(teacher), torch.cat(student), torch.cat(masked), local
