# SPDX-License-Identifier: Apache-2.0
"""The shape of a phantom's head: template, effects, deformation, pose."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage

from volta_components.data.phantom.subjects import FIELD_OF_VIEW, Subject, random_stream
from volta_components.errors import InputError

_BOX = np.array([[-84.0, 84.0], [-120.0, 87.0], [-84.0, 96.0]])


_GRID = 3


_CENTRE = np.array([0.0, -17.0, 5.0])


_MARGIN = 3.0


_SQUARINGS = 6


_RANDOM_SCALES = ((8.0, 1.0), (24.0, 2.5))


@dataclass(frozen=True)
class Atlas:
    """The template's maps over one box of MNI space, at 1 mm, and what moves its structures.

    Attributes:
        maps: ``[7, X, Y, Z]`` in [0, 1], smoothed for the spacing at which they will be sampled: T1 intensity, and the
            shares of grey matter, fluid, brain, left hippocampus, right hippocampus and ventricles.
        hippocampus_left, hippocampus_right, ventricles: ``[3, x, y, z]`` velocities in mm on the 3 mm grid; looking the
            template up at ``exp(velocity)`` makes the structure's log volume *fall* by 1, to first order.
        surface: ``[n, 3]`` positions on the brain's surface, mm, one in each 3 mm.
    """

    maps: torch.Tensor
    hippocampus_left: torch.Tensor
    hippocampus_right: torch.Tensor
    ventricles: torch.Tensor
    surface: torch.Tensor


def _axes(step: int) -> list[NDArray[np.float64]]:
    return [np.arange(low, high + step / 2, step) for low, high in _BOX]


def _cut(volume: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """Bring a template map to the box, at 1 mm, with zeros where it has no values."""
    start = np.rint(_BOX[:, 0] - affine[:3, 3]).astype(int)
    stop = np.rint(_BOX[:, 1] - affine[:3, 3]).astype(int) + 1
    inner = tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(start, stop, volume.shape))
    padding = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(start, stop, volume.shape)]
    return np.pad(volume[inner].astype(np.float32), padding)


def _hippocampus(side: int) -> NDArray[np.bool_]:
    """Ellipsoid around a hippocampus; ``side`` is -1 on the left, 1 on the right. See the module's notes."""
    x, y, z = np.meshgrid(*_axes(1), indexing="ij", sparse=True)
    x, y, z = x - side * 26, y + 20, z + 14
    pitch, yaw = math.radians(-25), math.radians(15) * side
    y, z = math.cos(pitch) * y + math.sin(pitch) * z, -math.sin(pitch) * y + math.cos(pitch) * z
    x, y = math.cos(yaw) * x + math.sin(yaw) * y, -math.sin(yaw) * x + math.cos(yaw) * y
    inside: NDArray[np.bool_] = (x / 8) ** 2 + (y / 20) ** 2 + (z / 8) ** 2 <= 1
    return inside


def _ventricle_region() -> NDArray[np.bool_]:
    """Where cerebrospinal fluid is ventricle: frontal horns and bodies, then the atria beside the midline cisterns."""
    x, y, z = np.meshgrid(*_axes(1), indexing="ij", sparse=True)
    width = abs(x)
    front = (width < 22) & (y > -25) & (y < 30)
    atria = (width > 9) & (width < 38) & (y <= -25) & (y > -52)
    fissure = (width < 4) & ((y > 22) | (z > 26))
    region: NDArray[np.bool_] = (front | atria) & (z > -4) & (z < 32) & ~fissure
    return region


def _volume_field(share: NDArray[np.float32], fine: float, wide: float) -> torch.Tensor:
    """Velocity whose divergence is 1 on average over a structure, and less than 0 around it.

    Args:
        share: ``[X, Y, Z]`` the structure, at 1 mm.
        fine: deviation (mm) of the blur that is the divergence's positive part.
        wide: deviation (mm) of the blur that is taken from it; the integral is 0, so that nothing moves far away.

    Returns:
        ``[3, x, y, z]`` mm, on the velocity grid: the gradient of a potential (Poisson's equation, in Fourier space).
    """
    blurred = [
        ndimage.gaussian_filter(share, deviation, truncate=3)[::_GRID, ::_GRID, ::_GRID] for deviation in (fine, wide)
    ]
    divergence = blurred[0].astype(np.float64) - blurred[1]
    weight = share[::_GRID, ::_GRID, ::_GRID]
    divergence /= (divergence * weight).sum() / weight.sum()
    spectrum = fft.rfftn(divergence)
    waves = _waves(divergence.shape)
    square = sum(wave**2 for wave in waves)
    square[0, 0, 0] = 1.0
    spectrum[0, 0, 0] = 0.0
    parts = [fft.irfftn(-1j * wave * spectrum / square, s=divergence.shape) for wave in waves]
    return torch.from_numpy(np.stack(parts).astype(np.float32))


def _waves(shape: tuple[int, ...]) -> list[Any]:
    """Angular wave numbers (1/mm) of a real Fourier transform over the velocity grid, one array an axis."""
    steps = [fft.fftfreq(shape[0], _GRID), fft.fftfreq(shape[1], _GRID), fft.rfftfreq(shape[2], _GRID)]
    return list(np.meshgrid(*(2 * np.pi * step for step in steps), indexing="ij", sparse=True))


@functools.lru_cache(maxsize=3)
def load_atlas(spacing: int) -> Atlas:
    """Load the template for phantoms of one spacing (mm); kept for the process.

    Maps are smoothed so that a voxel of that size sees about its own share of the template, and nothing aliases.
    """
    from nilearn import datasets

    images = [
        load(resolution=1)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_brain_mask,
        )
    ]
    t1, grey, white, brain = (_cut(np.asarray(image.dataobj), image.affine) for image in images)
    fluid = np.clip(1 - grey - white, 0, 1) * (brain > 0)
    sides = [(_hippocampus(side) & (grey > 0.5)).astype(np.float32) for side in (-1, 1)]
    ventricles = np.where(_ventricle_region() & (fluid > 0.25), fluid, 0).astype(np.float32)
    deviation = 0.4247 * math.sqrt(spacing**2 - 1)

    def prepare(volume: NDArray[np.float32], least: float = 0.0) -> torch.Tensor:
        width = max(deviation, least)
        return torch.from_numpy(ndimage.gaussian_filter(volume, width, truncate=3) if width else volume.copy())

    tissues = [prepare(volume) for volume in (t1 * (brain > 0), grey * (brain > 0), fluid)]
    shares = [prepare(share, least=0.5) for share in (brain, *sides, ventricles)]
    coarse = ndimage.maximum_filter(brain, _GRID)[::_GRID, ::_GRID, ::_GRID] > 0
    surface = np.argwhere(coarse & ~ndimage.binary_erosion(coarse))
    return Atlas(
        maps=torch.stack([*tissues, *shares]),
        hippocampus_left=_volume_field(sides[0], 3.0, 10.0),
        hippocampus_right=_volume_field(sides[1], 3.0, 10.0),
        ventricles=_volume_field(ventricles, 3.0, 16.0),
        surface=torch.from_numpy(_BOX[:, 0] + surface * _GRID).float(),
    )


def sample_field(volume: torch.Tensor, points: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
    """Sample ``[C, X, Y, Z]`` over the box at ``[x, y, z, 3]`` positions, -1 to 1 from edge to edge, trilinearly."""
    sampled = torch.nn.functional.grid_sample(
        volume[None], points.flip(-1)[None], mode="bilinear", padding_mode=padding, align_corners=True
    )
    return sampled[0]


def _grid_positions() -> torch.Tensor:
    """``[x, y, z, 3]`` positions of the velocity grid, -1 to 1."""
    return torch.stack(
        torch.meshgrid(*(torch.linspace(-1, 1, len(axis)) for axis in _axes(_GRID)), indexing="ij"), dim=-1
    )


_HALF = torch.from_numpy((_BOX[:, 1] - _BOX[:, 0]) / 2).float()


_MIDDLE = torch.from_numpy(_BOX.mean(axis=1)).float()


def exponential(velocity: torch.Tensor) -> torch.Tensor:
    """Flow of a stationary velocity field after unit time, by scaling and squaring.

    Args:
        velocity: ``[3, x, y, z]`` mm, on the velocity grid.

    Returns:
        ``[3, x, y, z]`` displacement in mm: position ``p`` goes to ``p + displacement(p)``.
    """
    identity = _grid_positions()
    half = _HALF[:, None, None, None]
    step = velocity / half / 2**_SQUARINGS
    for _ in range(_SQUARINGS):
        step = step + sample_field(step, identity + step.permute(1, 2, 3, 0), padding="border")
    return step * half


def follow(velocity: torch.Tensor, points: torch.Tensor, steps: int = 16) -> torch.Tensor:
    """Carry points along a stationary velocity field for unit time, by the midpoint rule.

    Args:
        velocity: ``[3, x, y, z]`` mm, on the velocity grid.
        points: ``[n, 3]`` mm.
        steps: of equal length.

    Returns:
        ``[n, 3]`` mm; what `exponential` gives, for a few points.
    """

    def speed(places: torch.Tensor) -> torch.Tensor:
        return sample_field(velocity, ((places - _MIDDLE) / _HALF)[:, None, None], padding="border")[:, :, 0, 0].T

    for _ in range(steps):
        points = points + speed(points + speed(points) / (2 * steps)) / steps
    return points


@functools.lru_cache(maxsize=1)
def _random_spectrum() -> NDArray[np.float64]:
    """Factors that turn the spectrum of white noise over the velocity grid into that of one component of velocity."""
    shape = tuple(len(axis) for axis in _axes(_GRID))
    waves = sum(wave**2 for wave in _waves(shape))
    power = np.zeros(waves.shape)
    for width, deviation in _RANDOM_SCALES:
        part = np.exp(-waves * width**2)
        part[0, 0, 0] = 0.0  # no shift of the whole
        twice = np.full(part.shape[2], 2.0)  # a real transform keeps one of each pair of conjugates
        twice[0] = 1.0
        if shape[2] % 2 == 0:
            twice[-1] = 1.0
        power += deviation**2 * part * math.prod(shape) / (part * twice).sum()
    spectrum: NDArray[np.float64] = np.sqrt(power)
    return spectrum


def draw_velocity(subject: Subject, atlas: Atlas) -> torch.Tensor:
    """Velocity field of a subject's anatomy: ``[3, x, y, z]`` mm; look the template up at its exponential."""
    rng = random_stream(subject.seed, 5, subject.number)
    shape = tuple(len(axis) for axis in _axes(_GRID))
    random = [fft.irfftn(fft.rfftn(rng.standard_normal(shape)) * _random_spectrum(), s=shape) for _ in range(3)]
    return (
        torch.from_numpy(np.stack(random).astype(np.float32))
        - subject.log_hippocampus_left * atlas.hippocampus_left
        - subject.log_hippocampus_right * atlas.hippocampus_right
        - subject.log_ventricles * atlas.ventricles
    )


def jacobian_determinant(displacement: torch.Tensor) -> NDArray[np.float32]:
    """Local change of volume of ``p -> p + displacement(p)``: ``[x, y, z]``, by finite differences on the grid."""
    rows = [np.stack(np.gradient(part.numpy(), _GRID)) for part in displacement]
    for axis, row in enumerate(rows):
        row[axis] += 1
    determinant: NDArray[np.float32] = (rows[0] * np.cross(rows[1], rows[2], axis=0)).sum(axis=0)
    return determinant


def _rotation(degrees: Iterable[float]) -> NDArray[np.float64]:
    """Rotation about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(degrees):
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = cosine
        turn[first, second], turn[second, first] = -sine, sine
        matrix = turn @ matrix
    return matrix


def _fit(
    matrix: NDArray[np.float64], translation: NDArray[np.float64], brain: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Smallest change of size and place that brings a brain into the field of view.

    Args:
        matrix: ``[3, 3]`` from the deformed template to the head.
        translation: ``[3]`` mm.
        brain: ``[n, 3]`` positions of the brain's surface in the deformed template, mm from its centre.

    Returns:
        A factor of at most 1, and the translation, mm.
    """
    room = np.array(FIELD_OF_VIEW) / 2 - _MARGIN
    placed = brain @ matrix.T
    low, high = placed.min(axis=0), placed.max(axis=0)
    factor = min(1.0, float((2 * room / (high - low)).min()))
    return factor, np.clip(translation, -room - factor * low, room - factor * high)


def image_affine(spacing: int) -> NDArray[np.float64]:
    """``[4, 4]`` affine of every phantom of a spacing (mm): RAS, with the template's centre in the middle."""
    affine = np.diag([float(spacing)] * 3 + [1.0])
    shape = np.array(FIELD_OF_VIEW) // spacing
    affine[:3, 3] = _CENTRE - (shape - 1) / 2 * spacing
    return affine


@dataclass(frozen=True)
class Geometry:
    """A subject's whole map from head to template.

    Attributes:
        displacement: ``[3, x, y, z]`` mm; the diffeomorphism, on the velocity grid.
        matrix, offset: ``[3, 3]`` and ``[3]``: from world positions of the head (mm) to those of the deformed template.
        fit: factor by which the head was made smaller to fit the field of view; 1 for nearly all.
        translation: mm, as used.
    """

    displacement: torch.Tensor
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    fit: float
    translation: NDArray[np.float64]

    def template_positions(self, affine: NDArray[np.float64], shape: tuple[int, ...]) -> torch.Tensor:
        """Where each voxel of an image looks the template up: ``[X, Y, Z, 3]``, -1 to 1 over the box."""
        matrix = self.matrix @ affine[:3, :3]
        offset = self.matrix @ affine[:3, 3] + self.offset
        parts = []
        for axis in range(3):
            ramps = [np.arange(n) * matrix[axis, other] for other, n in enumerate(shape)]
            ramps[0] = ramps[0] + offset[axis]
            x, y, z = (torch.from_numpy(ramp).float() for ramp in ramps)
            parts.append((x[:, None, None] + y[None, :, None] + z - _MIDDLE[axis]) / _HALF[axis])
        positions = torch.stack(parts, dim=-1)
        displacement = self.displacement / _HALF[:, None, None, None]
        positions += sample_field(displacement, positions, padding="border").permute(1, 2, 3, 0)
        return positions


def geometry(subject: Subject, atlas: Atlas) -> Geometry:
    """Compose deformation, size and pose of a subject.

    Raises:
        InputError: if the effects are so strong that the deformation folds.
    """
    velocity = draw_velocity(subject, atlas)
    displacement = exponential(velocity)
    if (least := jacobian_determinant(displacement).min()) <= 0:
        raise InputError(
            f"subject {subject.number} of seed {subject.seed} would fold (Jacobian determinant {least:.3f}); "
            "give smaller --effect-hippocampus or --effect-ventricles"
        )
    brain = follow(-velocity, atlas.surface).double().numpy()
    matrix = _rotation(subject.rotation) @ np.diag(subject.scale)
    fit, translation = _fit(matrix, np.array(subject.translation), brain - _CENTRE)
    inverse: NDArray[Any] = np.linalg.inv(fit * matrix)
    offset = _CENTRE - inverse @ (_CENTRE + translation)
    return Geometry(displacement, inverse, offset, fit, translation)
