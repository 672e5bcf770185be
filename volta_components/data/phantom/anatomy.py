# SPDX-License-Identifier: Apache-2.0
"""The shape of a phantom's head: an anatomy, effects on it, deformation, pose."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nibabel.affines import from_matvec, voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from volta_components.data.phantom.deformation import (
    Box,
    Scales,
    exponential,
    follow,
    least_jacobian,
    random_velocity,
    rotation_matrix,
    sample_field,
    volume_field,
)
from volta_components.data.phantom.subjects import FIELD_OF_VIEW, Subject, random_stream
from volta_components.data.resample import resample
from volta_components.errors import InputError

TEMPLATE_BOX = Box((-84.0, -120.0, -84.0), (84.0, 87.0, 96.0), grid=3, squarings=6)
CENTRE = np.array([0.0, -17.0, 5.0])  # of the template's brain, mm; other brains are put there
_MARGIN = 3.0  # mm, least distance between brain and edge of the image: as much as between points of the surface


@dataclass(frozen=True)
class Anatomy:
    """One anatomy over a box at 1 mm, and what moves its structures.

    Attributes:
        name: of the anatomy; empty for the template.
        box: the box.
        centre: ``[3]`` mm; of the brain: what a head is scaled and turned about.
        hippocampus_left, hippocampus_right, ventricles: ``[3, x, y, z]`` velocities in mm on the velocity grid; looking
            the anatomy up at ``exp(velocity)`` makes the structure's log volume *fall* by 1, to first order.
        surface: ``[n, 3]`` positions on the brain's surface, mm.
        random_scales: smoothing and amplitude of the random velocity: standard deviations, mm; the latter of each
            component.
        field: size of the images, mm: left-right, posterior-anterior, inferior-superior.
        middle: ``[3]`` mm; the middle of the images before the head is moved.
    """

    name: str
    box: Box
    centre: NDArray[np.float64]
    hippocampus_left: torch.Tensor
    hippocampus_right: torch.Tensor
    ventricles: torch.Tensor
    surface: torch.Tensor
    random_scales: Scales
    field: tuple[int, int, int]
    middle: NDArray[np.float64]

    def image_shape(self, spacing: int) -> tuple[int, ...]:
        """Voxels of an image of a spacing (mm)."""
        return tuple(side // spacing for side in self.field)

    def image_affine(self, spacing: int) -> NDArray[np.float64]:
        """``[4, 4]`` affine of every image of a spacing (mm): RAS."""
        first = self.middle - (np.array(self.image_shape(spacing)) - 1) / 2 * spacing
        return from_matvec(np.diag([float(spacing)] * 3), first)


@dataclass(frozen=True)
class Template(Anatomy):
    """The MNI152 template.

    Attributes:
        maps: ``[7, X, Y, Z]`` in [0, 1], smoothed for the spacing at which they will be sampled: T1 intensity, and the
            shares of grey matter, fluid, brain, left hippocampus, right hippocampus and ventricles.
    """

    maps: torch.Tensor


def _hippocampus(side: int) -> NDArray[np.bool_]:
    """Ellipsoid around a hippocampus; ``side`` is -1 on the left, 1 on the right."""
    x, y, z = np.meshgrid(*TEMPLATE_BOX.axes(), indexing="ij", sparse=True)
    x, y, z = x - side * 26, y + 20, z + 14
    pitch, yaw = math.radians(-25), math.radians(15) * side
    y, z = math.cos(pitch) * y + math.sin(pitch) * z, -math.sin(pitch) * y + math.cos(pitch) * z
    x, y = math.cos(yaw) * x + math.sin(yaw) * y, -math.sin(yaw) * x + math.cos(yaw) * y
    inside: NDArray[np.bool_] = (x / 8) ** 2 + (y / 20) ** 2 + (z / 8) ** 2 <= 1
    return inside


def _ventricle_region() -> NDArray[np.bool_]:
    """Where cerebrospinal fluid is ventricle: frontal horns and bodies, then the atria beside the midline cisterns."""
    x, y, z = np.meshgrid(*TEMPLATE_BOX.axes(), indexing="ij", sparse=True)
    width = abs(x)
    front = (width < 22) & (y > -25) & (y < 30)
    atria = (width > 9) & (width < 38) & (y <= -25) & (y > -52)
    fissure = (width < 4) & ((y > 22) | (z > 26))
    region: NDArray[np.bool_] = (front | atria) & (z > -4) & (z < 32) & ~fissure
    return region


@functools.lru_cache(maxsize=3)
def load_template(spacing: int) -> Template:
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
    grid = from_matvec(np.eye(3), TEMPLATE_BOX.low)
    t1, grey, white, brain = (
        # In the order of the files, since sums round in another way in another one.
        np.asfortranarray(resample(np.asarray(image.dataobj), image.affine, grid, TEMPLATE_BOX.voxels))
        for image in images
    )
    fluid = np.clip(1 - grey - white, 0, 1) * (brain > 0)
    sides = [(_hippocampus(side) & (grey > 0.5)).astype(np.float32) for side in (-1, 1)]
    ventricles = np.where(_ventricle_region() & (fluid > 0.25), fluid, 0).astype(np.float32)
    deviation = 0.4247 * math.sqrt(spacing**2 - 1)

    def prepare(volume: NDArray[np.float32], least: float = 0.0) -> torch.Tensor:
        width = max(deviation, least)
        return torch.from_numpy(ndimage.gaussian_filter(volume, width, truncate=3) if width else volume.copy())

    tissues = [prepare(volume) for volume in (t1 * (brain > 0), grey * (brain > 0), fluid)]
    shares = [prepare(share, least=0.5) for share in (brain, *sides, ventricles)]
    return Template(
        name="",
        box=TEMPLATE_BOX,
        centre=CENTRE,
        hippocampus_left=volume_field(sides[0], TEMPLATE_BOX, 1, 3.0, 10.0),
        hippocampus_right=volume_field(sides[1], TEMPLATE_BOX, 1, 3.0, 10.0),
        ventricles=volume_field(ventricles, TEMPLATE_BOX, 1, 3.0, 16.0),
        surface=surface_points(brain > 0, TEMPLATE_BOX, 3),
        random_scales=((8.0, 1.0), (24.0, 2.5)),
        field=FIELD_OF_VIEW,
        middle=CENTRE,
        maps=torch.stack([*tissues, *shares]),
    )


def surface_points(brain: NDArray[np.bool_], box: Box, step: int) -> torch.Tensor:
    """``[n, 3]`` positions on a brain's surface, mm, one in each ``step`` mm; outside rather than inside."""
    coarse = ndimage.maximum_filter(brain, step)[::step, ::step, ::step]
    surface = np.argwhere(coarse & ~ndimage.binary_erosion(coarse))
    return torch.from_numpy(np.array(box.low) + surface * step).float()


def draw_velocity(subject: Subject, anatomy: Anatomy, strength: float = 1.0) -> torch.Tensor:
    """Velocity field of a subject: ``[3, x, y, z]`` mm; look the anatomy up at its exponential."""
    random = random_velocity(random_stream(subject.seed, 5, subject.number), anatomy.box, anatomy.random_scales)
    left, right = subject.log_hippocampus_left, subject.log_hippocampus_right
    if subject.mirrored:
        left, right = right, left
    return (
        strength * subject.deformation * random
        - left * anatomy.hippocampus_left
        - right * anatomy.hippocampus_right
        - subject.log_ventricles * anatomy.ventricles
    )


def _fit(
    matrix: NDArray[np.float64], translation: NDArray[np.float64], brain: NDArray[np.float64], anatomy: Anatomy
) -> tuple[float, NDArray[np.float64]]:
    """Factor (at most 1) and translation (mm) that bring a brain's surface into the field of view with least change."""
    room = np.array(anatomy.field) / 2 - _MARGIN
    shift = anatomy.middle - anatomy.centre
    placed = brain @ matrix.T
    low, high = placed.min(axis=0), placed.max(axis=0)
    factor = min(1.0, float((2 * room / (high - low)).min()))
    return factor, np.clip(translation, shift - room - factor * low, shift + room - factor * high)


@dataclass(frozen=True)
class Geometry:
    """A subject's whole map from head to anatomy.

    Attributes:
        box: the anatomy's.
        displacement: ``[3, x, y, z]`` mm; the diffeomorphism, on the velocity grid.
        matrix, offset: ``[3, 3]`` and ``[3]``: from world positions of the head (mm) to those of the deformed anatomy.
        fit: factor by which the head was made smaller to fit the field of view; 1 for nearly all.
        translation: mm, as used.
    """

    box: Box
    displacement: torch.Tensor
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    fit: float
    translation: NDArray[np.float64]

    def voxels(
        self, affine: NDArray[np.float64], shape: tuple[int, ...], device: torch.device | None = None
    ) -> torch.Tensor:
        """Where each voxel of an image looks the anatomy up: ``[3, X, Y, Z]``, fractional voxels of the box's maps."""
        places = self._straight(affine, shape, device)
        displacement = self.displacement.to(places.device)
        # The displacement is smooth: where voxels are small, every second one is enough, and eight times faster.
        if voxel_sizes(affine).max() > self.box.grid / 2 or min(shape) < 4:
            return places.add_(sample_field(displacement, self.between_edges(places), padding="border"))
        half = self._straight(affine @ np.diag([2.0, 2.0, 2.0, 1.0]), tuple(n // 2 + 1 for n in shape), device)
        coarse = sample_field(displacement, self.between_edges(half), padding="border")
        size = [2 * (n // 2) + 1 for n in shape]
        fine = torch.nn.functional.interpolate(coarse[None], size=size, mode="trilinear", align_corners=True)[0]
        return places.add_(fine[:, : shape[0], : shape[1], : shape[2]])

    def _straight(
        self, affine: NDArray[np.float64], shape: tuple[int, ...], device: torch.device | None
    ) -> torch.Tensor:
        """As ``voxels``, without the displacement."""
        matrix = self.matrix @ affine[:3, :3]
        offset = self.matrix @ affine[:3, 3] + self.offset - self.box.low
        places = torch.empty((3, *shape), device=device)
        for axis in range(3):
            ramps = [np.arange(n) * matrix[axis, other] for other, n in enumerate(shape)]
            ramps[0] = ramps[0] + offset[axis]
            x, y, z = (torch.from_numpy(ramp).float().to(device) for ramp in ramps)
            torch.add((x[:, None] + y)[..., None], z, out=places[axis])
        return places

    def between_edges(self, places: torch.Tensor) -> torch.Tensor:
        """``[3, X, Y, Z]`` fractional voxels as ``[X, Y, Z, 3]``, -1 to 1 from edge to edge."""
        return torch.stack([places[axis] / self.box.half[axis] - 1 for axis in range(3)], dim=-1)


def geometry(subject: Subject, anatomy: Anatomy) -> Geometry:
    """Compose deformation, size and pose of a subject.

    The random part of a deformation that would fold is halved until it does not.

    Raises:
        InputError: if the effects are so strong that the deformation folds without any random part.
    """
    for strength in (1.0, 0.5, 0.25, 0.0):
        velocity = draw_velocity(subject, anatomy, strength)
        displacement = exponential(velocity, anatomy.box)
        if (least := least_jacobian(displacement, anatomy.box.grid)) > 0.02:
            break
    else:
        raise InputError(
            f"subject {subject.number} of seed {subject.seed} would fold (Jacobian determinant {least:.3f}); "
            "give smaller --effect-hippocampus or --effect-ventricles"
        )
    brain = follow(-velocity, anatomy.box, anatomy.surface, steps=8).double().numpy()
    matrix = rotation_matrix(subject.rotation) @ np.diag(subject.scale)
    if subject.mirrored:
        matrix = matrix @ np.diag([-1.0, 1.0, 1.0])
    fit, translation = _fit(matrix, np.array(subject.translation), brain - anatomy.centre, anatomy)
    inverse: NDArray[Any] = np.linalg.inv(fit * matrix)
    offset = anatomy.centre - inverse @ (anatomy.centre + translation)
    return Geometry(anatomy.box, displacement, inverse, offset, fit, translation)
