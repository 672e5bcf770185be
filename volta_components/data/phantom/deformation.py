# SPDX-License-Identifier: Apache-2.0
"""Smooth invertible deformations: flows of stationary velocity fields on a coarse grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nibabel.eulerangles import euler2mat
from numpy.typing import NDArray
from scipy import fft, ndimage

Scales = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Box:
    """A part of space with a grid for velocities, mm.

    Attributes:
        low, high: corners; voxel maps over the box have one voxel each mm, the first at ``low``, the last at ``high``.
        grid: spacing of the velocity grid; each side of the box is a multiple of it.
        squarings: steps of scaling and squaring; a flow is divided into ``2 ** squarings`` parts.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    grid: int
    squarings: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Nodes of the velocity grid per axis."""
        return tuple(round((b - a) / self.grid) + 1 for a, b in zip(self.low, self.high, strict=True))

    @property
    def voxels(self) -> tuple[int, ...]:
        """Voxels of 1 mm per axis."""
        return tuple(round(b - a) + 1 for a, b in zip(self.low, self.high, strict=True))

    @functools.cached_property
    def half(self) -> torch.Tensor:
        """Half of each side."""
        return torch.tensor([(b - a) / 2 for a, b in zip(self.low, self.high, strict=True)])

    @functools.cached_property
    def middle(self) -> torch.Tensor:
        """The box's middle."""
        return torch.tensor([(a + b) / 2 for a, b in zip(self.low, self.high, strict=True)])

    @functools.cached_property
    def nodes(self) -> torch.Tensor:
        """``[x, y, z, 3]`` positions of the velocity grid, -1 to 1 from edge to edge."""
        return torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in self.shape), indexing="ij"), dim=-1)

    def axes(self) -> list[NDArray[np.float64]]:
        """Positions of the voxels along each axis, mm."""
        return [np.arange(a, b + 0.5) for a, b in zip(self.low, self.high, strict=True)]

    def waves(self) -> list[Any]:
        """Angular wave numbers (1/mm) of a real Fourier transform over the velocity grid, one array an axis."""
        shape = self.shape
        steps = [fft.fftfreq(shape[0], self.grid), fft.fftfreq(shape[1], self.grid), fft.rfftfreq(shape[2], self.grid)]
        return list(np.meshgrid(*(2 * np.pi * step for step in steps), indexing="ij", sparse=True))


def sample_field(volume: torch.Tensor, points: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
    """Sample ``[C, X, Y, Z]`` over a box at ``[x, y, z, 3]`` positions, -1 to 1 from edge to edge, trilinearly."""
    sampled = torch.nn.functional.grid_sample(
        volume[None], points.flip(-1)[None], mode="bilinear", padding_mode=padding, align_corners=True
    )
    return sampled[0]


def volume_field(share: NDArray[np.float32], box: Box, step: int, fine: float, wide: float) -> torch.Tensor:
    """Velocity whose divergence is 1 on average over a structure, and less than 0 around it.

    Args:
        share: ``[X, Y, Z]`` the structure, in each ``step`` mm from the box's lower corner.
        box: the box.
        step: mm; the velocity grid's spacing is a multiple.
        fine: deviation (mm) of the blur that is the divergence's positive part.
        wide: deviation (mm) of the blur that is taken from it; the integral is 0, so that nothing moves far away.

    Returns:
        ``[3, x, y, z]`` mm, on the velocity grid: the gradient of a potential (Poisson's equation, in Fourier space).
    """
    blurred = [ndimage.gaussian_filter(share, deviation / step, truncate=3) for deviation in (fine, wide)]
    divergence = blurred[0].astype(np.float64) - blurred[1]
    divergence /= (divergence * share).sum() / share.sum()
    every = slice(None, None, box.grid // step)
    nodes = divergence[every, every, every]
    spectrum = fft.rfftn(nodes)
    waves = box.waves()
    square = sum(wave**2 for wave in waves)
    square[0, 0, 0] = 1.0
    spectrum[0, 0, 0] = 0.0
    parts = [fft.irfftn(-1j * wave * spectrum / square, s=nodes.shape) for wave in waves]
    return torch.from_numpy(np.stack(parts).astype(np.float32))


def exponential(velocity: torch.Tensor, box: Box) -> torch.Tensor:
    """Displacement ``[3, x, y, z]`` (mm) of a stationary velocity field after unit time, by scaling and squaring."""
    half = box.half[:, None, None, None]
    step = velocity / half / 2**box.squarings
    for _ in range(box.squarings):
        step = step + sample_field(step, box.nodes + step.permute(1, 2, 3, 0), padding="border")
    return step * half


def follow(velocity: torch.Tensor, box: Box, points: torch.Tensor, steps: int = 16) -> torch.Tensor:
    """Carry points ``[n, 3]`` (mm) along a stationary velocity field for unit time, by the midpoint rule.

    It gives what `exponential` gives, for a few points.
    """

    def speed(places: torch.Tensor) -> torch.Tensor:
        positions = ((places - box.middle) / box.half)[:, None, None]
        return sample_field(velocity, positions, padding="border")[:, :, 0, 0].T

    for _ in range(steps):
        points = points + speed(points + speed(points) / (2 * steps)) / steps
    return points


@functools.lru_cache(maxsize=64)
def _random_spectrum(box: Box, scales: Scales) -> NDArray[np.float32]:
    """Factors that turn the spectrum of white noise over the velocity grid into that of one component of velocity."""
    shape = box.shape
    waves = sum(wave**2 for wave in box.waves())
    power = np.zeros(waves.shape)
    for width, deviation in scales:
        part = np.exp(-waves * width**2)
        part[0, 0, 0] = 0.0  # no shift of the whole
        twice = np.full(part.shape[2], 2.0)  # a real transform keeps one of each pair of conjugates
        twice[0] = 1.0
        if shape[2] % 2 == 0:
            twice[-1] = 1.0
        power += deviation**2 * part * math.prod(shape) / (part * twice).sum()
    spectrum: NDArray[np.float32] = np.sqrt(power).astype(np.float32)
    return spectrum


def random_velocity(rng: np.random.Generator, box: Box, scales: Scales) -> torch.Tensor:
    """A smooth random velocity field ``[3, x, y, z]``, mm; for each scale its smoothing and amplitude, mm."""
    shape, spectrum = box.shape, _random_spectrum(box, scales)
    noise = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    return torch.from_numpy(np.stack([fft.irfftn(fft.rfftn(part) * spectrum, s=shape) for part in noise]))


def least_jacobian(displacement: torch.Tensor, grid: int) -> float:
    """Smallest change of volume of ``p -> p + displacement(p)`` by differences to neighbours on either side.

    Central differences would average a fold with its surroundings.
    """
    steps = [displacement.diff(dim=axis) / grid for axis in (1, 2, 3)]
    least = []
    for side in (slice(None, -1), slice(1, None)):
        rows = []
        for axis, step in enumerate(steps):
            cut = tuple(slice(None) if other == axis else side for other in range(3))
            row = step[(slice(None), *cut)].clone()
            row[axis] += 1
            rows.append(row)
        (a, b, c), (d, e, f), (g, h, i) = rows
        least.append((a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)).min())
    return float(min(least))


def rotation_matrix(degrees: Iterable[float]) -> NDArray[np.float64]:
    """Rotation about x, then y, then z."""
    x, y, z = map(math.radians, degrees)
    # NiBabel turns about z, then y, then x: with the opposite angles, that is the way back.
    back: NDArray[np.float64] = euler2mat(-z, -y, -x)
    return back.T


def box_around(low: Sequence[float], high: Sequence[float], grid: int, squarings: int) -> Box:
    """The smallest box with sides of whole grid steps that holds two corners (mm); it grows at the upper ends."""
    steps = [math.ceil((b - a) / grid) for a, b in zip(low, high, strict=True)]
    corners = [(float(a), float(a + n * grid)) for a, n in zip(low, steps, strict=True)]
    return Box(tuple(a for a, _ in corners), tuple(b for _, b in corners), grid, squarings)  # type: ignore[arg-type]
