# SPDX-License-Identifier: Apache-2.0
"""A cohort of brain phantoms: a BIDS data set of any size, with known sex, diagnosis, age and hippocampi.

Every phantom is the MNI ICBM152 (2009a, symmetric) T1 template that ships with nilearn, seen through a transformation
of its own and a scanner of its own::

    template --exp(v)--> deformed anatomy --size, pose--> head --contrast, gamma, bias, blur, noise--> T1w image

Anatomy
    The deformation is the exponential of a stationary velocity field, by scaling and squaring, and so a diffeomorphism:
    a smooth random field (two scales) plus fields that change the volume of one structure each. Such a field has a
    given divergence, which is the change of log volume: the structure's smoothed map minus a wider blur of the same
    map, so that what the structure gains or loses its surroundings give or take, and the head keeps its shape. With
    size and pose it is one map, through which template, brain mask and label maps are sampled once.

Known truth
    - ``sex``: heads of men are larger by ``effect_sex`` in their linear size, on average;
    - ``diagnosis``: with AD the hippocampi lose and the ventricles gain log volume, in proportion to a severity
      in [0.5, 1.5] (CN: 0), independently of sex, age and site;
    - ``age``: the same two structures, much more mildly;
    - ``site``: contrast between tissues, gamma, strength of bias field, noise and sharpness.
    All parameters drawn and all true volumes are in each image's JSON sidecar, under ``Phantom``. With the default
    effects and 800 subjects of 3 mm, 100 voxel components tell AD from CN with an AUROC of 0.93 and sex with 0.90,
    while the mean token of a random encoder stays at 0.56 to 0.65 for AD (``benchmarks/phantom_effects.py``).

Label maps
    Left (1) and right (2) hippocampus: ellipsoids of semi-axes 8, 20 and 8 mm around MNI (-26, -20, -14) and (26, -20,
    -14) mm, pitched 25 degrees (head of the hippocampus low) and turned 15 degrees (head towards the midline), met with
    the grey-matter map above 0.5: 4.1 ml a side in the template. Checked by eye on rendered sagittal, coronal
    and axial slices: they cover the hippocampus from head to body, the posterior end of the tail is not covered, and a
    rim of the parahippocampal gyrus and of the amygdala is. They are a stand-in for a manual segmentation, not one.
    The ventricles are the cerebrospinal fluid (1 - grey - white matter) of a region around the midline, checked in the
    same way: lateral ventricles without their temporal horns, and the third ventricle's upper part, 18 ml.

Source of the anatomy: Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54
(2011). Scaling and squaring: Arsigny et al., MICCAI 2006.
"""

from __future__ import annotations

import csv
import functools
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage
from tqdm import tqdm

from volta_components._version import __version__
from volta_components.cores import cores
from volta_components.errors import InputError
from volta_components.files import atomic_path, read_json, remove_partials, write_json

FIELD_OF_VIEW = (144, 192, 192)
"""Size of every image, mm: left-right, posterior-anterior, inferior-superior."""

FORMAT = 1
"""Raised whenever the same parameters begin to give other images."""

SESSION = "ses-M000"
PARAMETERS_FILE = "code/phantom.json"
LABELS_FOLDER = "derivatives/hippocampus"
TEMPLATE_URL = "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"

_BOX = np.array([[-84.0, 84.0], [-120.0, 87.0], [-84.0, 96.0]])
"""The part of MNI space that is used, mm; the corners of template and velocity grid alike."""
_GRID = 3
"""Spacing of the velocity grid, mm."""
_CENTRE = np.array([0.0, -17.0, 5.0])
"""Middle of the template's brain, mm: what a head is scaled and turned about."""
_MEAN_SCALE = 0.88
"""The template is 145 mm wide; the mean head must leave room for larger ones in 144 mm."""
_MARGIN = 3.0
"""Least distance between brain and edge of the image, mm; as much as the step at which a brain's surface is sampled."""
_SQUARINGS = 6
_RANDOM_SCALES = ((8.0, 1.0), (24.0, 2.5))
"""Smoothing and amplitude of the random velocity: standard deviations, mm; the latter of each component."""

# Between scanners: shift of grey matter and fluid (white matter is about 0.87), gamma, bias field, blur (mm), noise.
_SITES: dict[str, dict[str, float]] = {
    "A": {"grey": 0.0, "fluid": 0.0, "gamma": 1.0, "bias": 0.10, "blur": 0.3, "noise": 0.02},
    "B": {"grey": -0.07, "fluid": -0.06, "gamma": 1.2, "bias": 0.18, "blur": 0.6, "noise": 0.03},
    "C": {"grey": 0.05, "fluid": 0.06, "gamma": 0.85, "bias": 0.14, "blur": 0.5, "noise": 0.04},
}

_TEMPLATE_NOTICE = """\
The images in this data set are derived from the MNI ICBM152 2009a symmetric template, which comes with this notice:

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property loss,
or injury to subjects or patients resulting from the use or misuse of this software package.
"""


@dataclass(frozen=True)
class Settings:
    """What decides how subject number ``i`` of a cohort looks, whatever the cohort's size.

    Attributes:
        seed: any integer from 0.
        spacing: voxel size, mm: 1, 2 or 3.
        sites: number of sites, 1 to 3.
        ad_share: share of subjects with AD, in [0, 1].
        prefix: what subject ids begin with, after ``sub-``.
        effect_sex: mean difference of log linear head size between men and women.
        effect_age: log volume that the ventricles gain in ten years; the hippocampi lose a third of it.
        effect_hippocampus: log volume that the hippocampi lose at a severity of 1.
        effect_ventricles: log volume that the ventricles gain at a severity of 1.

    Raises:
        InputError: if a value is out of its range.
    """

    seed: int = 0
    spacing: int = 1
    sites: int = 3
    ad_share: float = 0.5
    prefix: str = "PH"
    effect_sex: float = 0.05
    effect_age: float = 0.1
    effect_hippocampus: float = 0.45
    effect_ventricles: float = 0.75

    def __post_init__(self) -> None:
        def demand(good: bool, name: str, wanted: str) -> None:
            if not good:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}; give {wanted}")

        for name in ("seed", "spacing", "sites"):
            demand(type(getattr(self, name)) is int, name, "a whole number")
        demand(self.seed >= 0, "seed", "a whole number from 0")
        demand(self.spacing in (1, 2, 3), "spacing", "1, 2 or 3 (mm)")
        demand(1 <= self.sites <= len(_SITES), "sites", f"a number of sites from 1 to {len(_SITES)}")
        demand(
            isinstance(self.prefix, str) and re.fullmatch(r"[A-Za-z0-9]*[A-Za-z]", self.prefix) is not None,
            "prefix",
            "letters and digits that end in a letter, such as PH",
        )
        for name, low, high in (
            ("ad_share", 0.0, 1.0),
            ("effect_sex", 0.0, 0.1),
            ("effect_age", 0.0, 0.3),
            ("effect_hippocampus", 0.0, 0.8),
            ("effect_ventricles", 0.0, 1.0),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            demand(number and low <= value <= high, name, f"a number from {low} to {high}")
            object.__setattr__(self, name, float(value))

    def subject_id(self, number: int) -> str:
        """BIDS id of a subject, such as ``sub-PH0001``."""
        return f"sub-{self.prefix}{number:04d}"


@dataclass(frozen=True)
class Subject:
    """Everything that is drawn for one phantom, but for the random fields (these come from ``seed`` and ``number``).

    Lengths are in mm, angles in degrees; ``scale`` holds one factor for each axis; ``rotation`` is pitch, roll and yaw
    about the x, y and z axis. ``log_*`` are changes of log volume against the template's structure.
    """

    seed: int
    number: int
    sex: str
    age: float
    diagnosis: str
    severity: float
    site: str
    scale: tuple[float, float, float]
    rotation: tuple[float, float, float]
    translation: tuple[float, float, float]
    log_hippocampus_left: float
    log_hippocampus_right: float
    log_ventricles: float
    grey: float
    fluid: float
    gamma: float
    bias: float
    blur: float
    noise: float
    gain: float


@dataclass(frozen=True)
class Phantom:
    """One rendered subject.

    Attributes:
        image: ``[X, Y, Z]`` int16 T1-weighted intensities, 0 outside the brain.
        labels: ``[X, Y, Z]`` uint8; 1 left, 2 right hippocampus.
        affine: ``[4, 4]`` voxel to world, RAS, mm.
        truth: parameters and true volumes, as JSON can hold them.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]
    truth: dict[str, Any]


# --- who the subjects are ---------------------------------------------------------------------------------------------


def _random(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, *stream]))


def _diagnosis(settings: Settings, number: int) -> tuple[bool, int]:
    """Whether a subject has AD, and how many of the same diagnosis come before it.

    Patients are spread evenly: a share of 0.5 has two in each group of four, in a random place.
    """
    index = number - 1
    group, place = divmod(index, 4)
    position = 4 * group + int(_random(settings.seed, 1, group).permutation(4)[place])
    patients = math.floor(position * settings.ad_share + 0.5)
    patient = math.floor((position + 1) * settings.ad_share + 0.5) > patients
    return patient, patients if patient else position - patients


def draw_subject(settings: Settings, number: int) -> Subject:
    """Draw the person and the scanner of one phantom.

    Sexes and sites are in turn within each diagnosis, in random order, so that even a few subjects have all of them and
    none goes with another.

    Args:
        settings: the cohort's.
        number: the subject's, from 1.
    """
    patient, rank = _diagnosis(settings, number)
    pair, turn = divmod(rank, 2)
    sex = "MF"[_random(settings.seed, 2, int(patient), pair).permutation(2)[turn]]
    round_, turn = divmod(rank, settings.sites)
    site = list(_SITES)[_random(settings.seed, 3, int(patient), round_).permutation(settings.sites)[turn]]

    rng = _random(settings.seed, 4, number)

    def normal(mean: float, deviation: float, limit: float = 2.0) -> float:
        """A normal deviate, drawn again while it is beyond ``limit`` deviations."""
        while abs(value := rng.standard_normal()) > limit:
            pass
        return float(mean + deviation * value)

    age = round(normal(72.0, 7.0), 1)
    severity = float(rng.uniform(0.5, 1.5))  # drawn for everybody: the diagnosis changes nothing else of a subject
    severity = round(severity, 3) if patient else 0.0
    decades = (age - 72.0) / 10
    size = normal(math.log(_MEAN_SCALE), 0.022) + settings.effect_sex * (0.5 if sex == "M" else -0.5)
    scale = [math.exp(size + normal(0.0, 0.008)) for _ in range(3)]
    rotation = [normal(0.0, 3.0) for _ in range(3)]
    translation = [normal(0.0, deviation) for deviation in (1.5, 2.5, 2.5)]
    hippocampus = normal(0.0, 0.08) - settings.effect_age / 3 * decades - settings.effect_hippocampus * severity
    sides = [hippocampus + normal(0.0, 0.03) for _ in range(2)]
    ventricles = normal(0.0, 0.2) + settings.effect_age * decades + settings.effect_ventricles * severity
    scanner = _SITES[site]
    return Subject(
        seed=settings.seed,
        number=number,
        sex=sex,
        age=age,
        diagnosis="AD" if patient else "CN",
        severity=severity,
        site=site,
        scale=(scale[0], scale[1], scale[2]),
        rotation=(rotation[0], rotation[1], rotation[2]),
        translation=(translation[0], translation[1], translation[2]),
        log_hippocampus_left=sides[0],
        log_hippocampus_right=sides[1],
        log_ventricles=ventricles,
        grey=scanner["grey"] + normal(0.0, 0.02),
        fluid=scanner["fluid"] + normal(0.0, 0.02),
        gamma=scanner["gamma"] * math.exp(normal(0.0, 0.08)),
        bias=scanner["bias"] * math.exp(normal(0.0, 0.2)),
        blur=scanner["blur"] * math.exp(normal(0.0, 0.2)),
        noise=scanner["noise"] * math.exp(normal(0.0, 0.2)),
        gain=math.exp(normal(math.log(1200.0), 0.3)),
    )


# --- the template -----------------------------------------------------------------------------------------------------


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


# --- geometry ---------------------------------------------------------------------------------------------------------


def _sample(volume: torch.Tensor, points: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
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
        step = step + _sample(step, identity + step.permute(1, 2, 3, 0), padding="border")
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
        return _sample(velocity, ((places - _MIDDLE) / _HALF)[:, None, None], padding="border")[:, :, 0, 0].T

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
    rng = _random(subject.seed, 5, subject.number)
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
        positions += _sample(displacement, positions, padding="border").permute(1, 2, 3, 0)
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


# --- image ------------------------------------------------------------------------------------------------------------


def _bias_field(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
    """Smooth multiplicative field ``[X, Y, Z]`` around 1: the exponential of a random polynomial of third degree."""
    axes = np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij", sparse=True)
    powers = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if 0 < i + j + k <= 3]
    field: Any = sum(rng.standard_normal() * axes[0] ** i * axes[1] ** j * axes[2] ** k for i, j, k in powers)
    field = (field - np.mean(field)) / np.std(field) * deviation
    coarse = torch.from_numpy(np.exp(field).astype(np.float32))
    return torch.nn.functional.interpolate(coarse[None, None], size=list(shape), mode="trilinear", align_corners=True)[
        0, 0
    ]


def render(subject: Subject, spacing: int) -> Phantom:
    """Make the image and the label map of one subject.

    Args:
        subject: from `draw_subject`.
        spacing: voxel size, mm: 1, 2 or 3.

    Raises:
        InputError: if the subject's deformation folds.
    """
    atlas = load_atlas(spacing)
    shape = tuple(side // spacing for side in FIELD_OF_VIEW)
    affine = image_affine(spacing)
    where = geometry(subject, atlas)
    sampled = _sample(atlas.maps, where.template_positions(affine, shape))
    shares = sampled[3:]
    contrast = torch.clamp(sampled[0] + subject.grey * sampled[1] + subject.fluid * sampled[2], min=0)

    rng = _random(subject.seed, 6, subject.number)
    intensity = contrast**subject.gamma * _bias_field(rng, shape, subject.bias)
    pixels = ndimage.gaussian_filter(intensity.numpy(), subject.blur / spacing, truncate=3)
    # Magnitude of a complex signal with Gaussian noise in both parts, as in MRI.
    pixels = np.hypot(
        pixels + subject.noise * rng.standard_normal(shape, dtype=np.float32),
        subject.noise * rng.standard_normal(shape, dtype=np.float32),
    )
    image = np.where(shares[0].numpy() > 0.5, np.clip(np.rint(pixels * subject.gain), 1, 32767), 0).astype(np.int16)
    labels = np.zeros(shape, np.uint8)
    labels[shares[1].numpy() > 0.5] = 1
    labels[shares[2].numpy() > 0.5] = 2

    volumes = [float(share.double().sum()) * spacing**3 for share in shares]
    truth = asdict(subject)
    truth["scale"] = [where.fit * factor for factor in subject.scale]
    truth["rotation"] = list(subject.rotation)
    truth["translation"] = where.translation.tolist()
    for name, volume in zip(("brain", "hippocampus_left", "hippocampus_right", "ventricles"), volumes):
        truth[f"volume_{name}"] = volume
    truth = {key: _rounded(value) for key, value in truth.items()}
    return Phantom(image, labels, affine, truth)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- the data set on disk ---------------------------------------------------------------------------------------------


def _paths(output: Path, subject_id: str) -> tuple[Path, Path, Path, Path]:
    """T1w image, label map, sessions table and sidecar of a subject; the sidecar is written last."""
    anat = Path(subject_id) / SESSION / "anat"
    stem = f"{subject_id}_{SESSION}"
    return (
        output / anat / f"{stem}_T1w.nii.gz",
        output / LABELS_FOLDER / anat / f"{stem}_desc-hippocampus_dseg.nii.gz",
        output / subject_id / f"{subject_id}_sessions.tsv",
        output / anat / f"{stem}_T1w.json",
    )


def _finished(output: Path, subject_id: str) -> bool:
    return all(path.is_file() for path in _paths(output, subject_id))


def _write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _save(path: Path, volume: NDArray[Any], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def write_subject(output: str | os.PathLike[str], settings: Settings, number: int) -> None:
    """Render one subject and write its files, each whole or not at all."""
    subject = draw_subject(settings, number)
    made = render(subject, settings.spacing)
    image, labels, sessions, sidecar = _paths(Path(output), settings.subject_id(number))
    _save(image, made.image, made.affine)
    _save(labels, made.labels, made.affine)
    _write_table(sessions, ("session_id", "age", "diagnosis"), [(SESSION, subject.age, subject.diagnosis)])
    content = {
        "Modality": "MR",
        "SkullStripped": True,
        "Phantom": {"generator": f"volta3d phantom {__version__}", **made.truth},
    }
    write_json(sidecar, content)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent winds up, its workers finish


def _run(output: Path, settings: Settings, numbers: list[int], workers: int) -> None:
    """Make subjects, in this process or in several."""
    bar = tqdm(total=len(numbers), desc="phantoms", unit="subject")
    with bar:
        if workers == 1 or len(numbers) < 3:
            for number in numbers:
                write_subject(output, settings, number)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(numbers)), mp_context=context, initializer=_start_worker)
        try:
            futures: list[Future[None]] = [pool.submit(write_subject, output, settings, number) for number in numbers]
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BrokenProcessPool as error:
            raise InputError(
                f"{output}: a worker process was killed, probably for want of memory; give fewer --workers than "
                f"{workers} (about 1 GB each) and start the command again: finished subjects are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _claim(output: Path, settings: Settings) -> None:
    """Make sure that an output folder is new, or holds a cohort of the same parameters.

    Raises:
        InputError: if it holds something else; says what.
    """
    wanted: dict[str, Any] = {"format": FORMAT, **asdict(settings)}
    path = output / PARAMETERS_FILE
    if path.exists():
        found = read_json(path)
        found = found if isinstance(found, dict) else {}
        rows = [(key, f"there {found.get(key)!r}", f"asked {wanted.get(key)!r}") for key in {**wanted, **found}]
        rows = [row for row in rows if found.get(row[0]) != wanted.get(row[0])]
        if rows:
            raise InputError.many(
                f"{output} holds phantoms made with other parameters",
                rows,
                "Give another --output, the same parameters, or remove that folder.",
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not an empty folder and holds no phantom cohort; give another --output")
    write_json(path, wanted)


_README = """\
# Brain phantoms

{count} synthetic T1-weighted head images of nobody, made by `volta3d phantom` (version {version}) from the MNI ICBM152
template: random size, pose and smooth deformation, and the contrast, bias field, blur and noise of {sites} site(s).
Parameters are in `{parameters}`; the same parameters give the same images.

- `participants.tsv`: sex, age, site. `sub-*/sub-*_sessions.tsv`: age and diagnosis (CN or AD).
- `sub-*/{session}/anat/*_T1w.json`: all parameters of an image and its true volumes (mm^3), under `Phantom`.
- `{labels}`: label maps of the left (1) and right (2) hippocampus.

Sex changes the size of the head; AD shrinks the hippocampi and widens the ventricles by a severity; age does the
same, mildly. The images are good for trying software. They say nothing about people.

The template's notice is in `LICENSE`.
"""

_LABELS_README = """\
# Label maps of the phantoms' hippocampi

`*_desc-hippocampus_dseg.nii.gz` is on the grid of the subject's T1w image: 1 is the left hippocampus, 2 the right one.
They are the anatomy that the image was made from, warped as it was: the truth, not somebody's drawing. Volumes in mm^3
are in the sidecar of the T1w image, under `Phantom`.
"""


def _describe(output: Path, settings: Settings, subjects: list[Subject]) -> None:
    """Write everything of the data set that is not one subject's."""
    generated = [{"Name": "volta3d phantom", "Version": __version__, "Description": f"Parameters: {PARAMETERS_FILE}"}]
    description = {
        "Name": "VolTA-3D brain phantoms",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "License": "MNI ICBM152 template: free to use, modify and redistribute with the notice in LICENSE",
        "Authors": ["VolTA-3D"],
        "Acknowledgements": "Template: Fonov et al., NeuroImage 54 (2011), by way of nilearn",
        "GeneratedBy": generated,
        "SourceDatasets": [{"URL": TEMPLATE_URL, "Version": "ICBM152 2009a nonlinear symmetric"}],
    }
    write_json(output / "dataset_description.json", description)
    derived = {
        **description,
        "Name": "Hippocampus label maps of VolTA-3D brain phantoms",
        "DatasetType": "derivative",
        "SourceDatasets": [{"URL": "../.."}],
    }
    write_json(output / LABELS_FOLDER / "dataset_description.json", derived)
    _write_table(
        output / LABELS_FOLDER / "desc-hippocampus_dseg.tsv",
        ("index", "name", "abbreviation"),
        [(0, "background", "BG"), (1, "left hippocampus", "L-HIP"), (2, "right hippocampus", "R-HIP")],
    )
    # Without entities in its name it holds for every label map.
    shared = {"Description": "Left and right hippocampus as the phantom was made", "SpatialReference": "orig"}
    write_json(output / LABELS_FOLDER / "desc-hippocampus_dseg.json", shared)
    participants = {
        "sex": {"Description": "sex of the phantom", "Levels": {"F": "female", "M": "male"}},
        "age": {"Description": "age of the phantom", "Units": "year"},
        "site": {
            "Description": "simulated scanner",
            "Levels": {site: f"site {site}" for site in list(_SITES)[: settings.sites]},
        },
    }
    write_json(output / "participants.json", participants)
    sessions = {
        "age": {"Description": "age of the phantom at the session", "Units": "year"},
        "diagnosis": {
            "Description": "what the phantom's anatomy shows",
            "Levels": {"CN": "cognitively normal", "AD": "Alzheimer's disease: smaller hippocampi, wider ventricles"},
        },
    }
    write_json(output / "sessions.json", sessions)
    rows = [(settings.subject_id(s.number), s.sex, s.age, s.site) for s in subjects]
    _write_table(output / "participants.tsv", ("participant_id", "sex", "age", "site"), rows)
    readme = _README.format(
        count=len(subjects),
        version=__version__,
        sites=settings.sites,
        parameters=PARAMETERS_FILE,
        session=SESSION,
        labels=LABELS_FOLDER,
    )
    labels = _LABELS_README
    texts = (("README.md", readme), (f"{LABELS_FOLDER}/README.md", labels), ("LICENSE", _TEMPLATE_NOTICE))
    for name, text in texts:
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def phantom(
    output: str,
    subjects: int,
    seed: int = 0,
    spacing: int = 1,
    first: int = 1,
    prefix: str = "PH",
    sites: int = 3,
    ad_share: float = 0.5,
    effect_sex: float = Settings.effect_sex,
    effect_age: float = Settings.effect_age,
    effect_hippocampus: float = Settings.effect_hippocampus,
    effect_ventricles: float = Settings.effect_ventricles,
    workers: int | None = None,
) -> None:
    """Grow a BIDS data set of brain phantoms with known sex, age, diagnosis and hippocampi.

    Subject i of a seed is the same whatever --subjects, --first and --workers are. The command can be interrupted and
    started again, and goes on where it was; with more --subjects it extends the cohort.

    Args:
        output: folder of the data set.
        subjects: how many subjects.
        seed: of everything random.
        spacing: voxel size in mm: 1, 2 or 3.
        first: number of the first subject; cohorts of one seed with other numbers share nobody.
        prefix: letters that subject ids begin with: sub-PH0001.
        sites: number of sites, each with its own contrast: 1 to 3.
        ad_share: share of subjects with AD, 0 to 1; the others are CN.
        effect_sex: difference of log linear head size between men and women.
        effect_age: log volume that the ventricles gain in ten years; the hippocampi lose a third of it.
        effect_hippocampus: log volume that the hippocampi lose with AD, on average.
        effect_ventricles: log volume that the ventricles gain with AD, on average.
        workers: processes; by default one for each core.

    Raises:
        InputError: if a value is out of its range, or the folder holds something else.
    """
    settings = Settings(
        seed=seed,
        spacing=spacing,
        sites=sites,
        ad_share=ad_share,
        prefix=str(prefix).removeprefix("sub-"),
        effect_sex=effect_sex,
        effect_age=effect_age,
        effect_hippocampus=effect_hippocampus,
        effect_ventricles=effect_ventricles,
    )
    for name, value in (("subjects", subjects), ("first", first), ("workers", 1 if workers is None else workers)):
        if type(value) is not int or value < 1:
            raise InputError(f"--{name} is {value!r}; give a whole number from 1")
    folder = Path(str(output)).expanduser()
    _claim(folder, settings)
    numbers = range(first, first + subjects)
    missing = [number for number in numbers if not _finished(folder, settings.subject_id(number))]
    subject_folders = {path.parent for n in missing for path in _paths(folder, settings.subject_id(n))}
    remove_partials(folder, folder / LABELS_FOLDER, *subject_folders)
    _run(folder, settings, missing, cores() if workers is None else workers)
    pattern = re.compile(rf"sub-{settings.prefix}(\d{{4,}})")
    there = sorted(int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name)))
    whole = [draw_subject(settings, number) for number in there if _finished(folder, settings.subject_id(number))]
    _describe(folder, settings, whole)
    print(f"{folder}: {len(whole)} phantoms of {spacing} mm ({len(missing)} new)")
