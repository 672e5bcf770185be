# SPDX-License-Identifier: Apache-2.0
"""Scanners: how bright each tissue is, and what is done to the picture on the way."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from volta_components.data.phantom.labels import BRAIN, CODES, NAMES, TISSUE
from volta_components.data.phantom.settings import Contrast

SIDED = ("_left", "_right")


@dataclass(frozen=True)
class Scanner:
    """One scanner and protocol; intensities are in units of about white matter's.

    Attributes:
        means, deviations: ``[256]`` of the Gaussian of each code.
        texture: share of a tissue's deviation that varies smoothly instead of from voxel to voxel.
        gamma: exponent of the intensities.
        bias: deviation of the logarithm of the bias field.
        blur: deviation of the point spread, mm.
        noise: deviation of the noise.
        thickness: of slices, mm; 1 or less for isotropic ones.
        slice_axis: axis of the slices: 0, 1 or 2.
        mask: ``head``; ``brain`` without anything outside; ``tissue`` also without the fluid around the brain.
        cut: height above the lower edge of the image, mm, below which nothing is scanned.
    """

    means: NDArray[np.float32]
    deviations: NDArray[np.float32]
    texture: float
    gamma: float
    bias: float
    blur: float
    noise: float
    thickness: float
    slice_axis: int
    mask: Literal["head", "brain", "tissue"]
    cut: float

    @property
    def kept(self) -> NDArray[np.bool_]:
        """``[256]`` which codes stay where something is taken off."""
        return BRAIN if self.mask == "brain" else TISSUE

    @property
    def table(self) -> NDArray[np.float32]:
        """``[256]`` mean of each code, 0 for what is taken off."""
        return self.means if self.mask == "head" else np.where(self.kept, self.means, 0).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """All parameters, as JSON can hold them; means and deviations by tissue."""
        numbers = {name: value for name, value in asdict(self).items() if name not in ("means", "deviations")}
        return {
            **numbers,
            "means": {name: float(self.means[code]) for code, name in enumerate(NAMES)},
            "deviations": {name: float(self.deviations[code]) for code, name in enumerate(NAMES)},
        }


def draw_scanner(
    rng: np.random.Generator, contrast: Contrast = "t1", with_skull: bool = True, variation: float = 1.0
) -> Scanner:
    """Draw a scanner: ``t1``, contrasts as of T1-weighted images, or ``any``, every tissue on its own.

    ``variation`` is how far scanners differ: factor of the spread of noise, blur, bias field and gamma.
    """
    means = _t1_means(rng) if contrast == "t1" else _any_means(rng)
    deviations = np.zeros(256, np.float32)
    for code, name in enumerate(NAMES):
        brain = code <= CODES["optic_chiasm"]
        top = 0.06 if brain else 0.12
        deviations[code] = rng.uniform(0.015, top) if not name.endswith(SIDED[1]) else deviations[code - 1]
    deviations[0] = 0.0
    thickness = 1.0
    if rng.random() < (0.25 if contrast == "t1" else 0.5):
        thickness = float(rng.uniform(1.0, 2.0) if rng.random() < 0.6 else rng.uniform(2.0, 5.0))
    mask: Literal["head", "brain", "tissue"] = "head"
    if not with_skull:
        mask = "brain" if rng.random() < 0.5 else "tissue"
    spread = min(variation, 2.0)
    return Scanner(
        means=means,
        deviations=deviations,
        texture=float(rng.uniform(0.2, 0.8)),
        gamma=float(np.exp(rng.normal(0, 0.12 * spread))),
        bias=float(rng.uniform(0.03, 0.12 * (1 + spread / 2))),
        blur=float(rng.uniform(0.25, 0.4 + 0.25 * spread)),
        noise=float(rng.uniform(0.005, 0.015 + 0.015 * spread)),
        thickness=thickness,
        slice_axis=int(rng.integers(3)),
        mask=mask,
        cut=float(rng.uniform(0, 45)) if rng.random() < 0.25 else 0.0,
    )


def _t1_means(rng: np.random.Generator) -> NDArray[np.float32]:
    """White matter bright, fluid dark, cortex between; fat bright and bone dark."""
    white = rng.uniform(0.8, 1.0)
    grey = white * rng.uniform(0.55, 0.85)
    fluid = grey * rng.uniform(0.1, 0.55)
    between = (grey + white) / 2
    fat = white * rng.uniform(0.8, 1.6)
    muscle = white * rng.uniform(0.4, 0.75)
    tissues = {
        "air": (0.0, 0.0),
        "white_matter": (white, 0.0),
        "cortex": (grey, 0.0),
        "lateral_ventricle": (fluid, 0.01),
        "inferior_horn": (fluid, 0.02),
        "third_ventricle": (fluid, 0.02),
        "fourth_ventricle": (fluid, 0.02),
        "fifth_ventricle": (fluid, 0.02),
        "fluid": (fluid * rng.uniform(0.7, 1.1), 0.01),
        "cerebellum_white": (white, 0.03),
        "cerebellum_cortex": (grey, 0.04),
        "thalamus": (between, 0.05),
        "caudate": (grey * 1.03, 0.03),
        "putamen": (0.7 * grey + 0.3 * white, 0.04),
        "pallidum": (0.2 * grey + 0.8 * white, 0.05),
        "hippocampus": (grey, 0.03),
        "amygdala": (grey, 0.03),
        "accumbens": (grey, 0.04),
        "lesion": (grey, 0.1),
        "ventral_diencephalon": (0.25 * grey + 0.75 * white, 0.05),
        "vessel": (fluid, 0.1),
        "choroid_plexus": ((grey + fluid) / 2, 0.1),
        "brainstem": (0.2 * grey + 0.8 * white, 0.05),
        "hypointensity": (between, 0.05),
        "optic_chiasm": (between, 0.05),
        "other_tissue": (muscle, 0.15),
        "eye": (fluid * 1.1, 0.05),
        "scalp": (0.5 * fat + 0.5 * muscle, 0.1),
        "optic_tissue": (muscle, 0.1),
        "mouth_and_nose": (muscle, 0.12),
        "skin": (muscle, 0.15),
        "spine": (between, 0.1),
        "sinus": (fluid + rng.uniform(0, 0.3), 0.05),
        "skull": (rng.uniform(0.04, 0.2), 0.02),
        "marrow": (fat * rng.uniform(0.6, 1.0), 0.1),
        "fluid_outside": (fluid, 0.03),
    }
    means = np.zeros(256, np.float32)
    for code, name in enumerate(NAMES):
        if name.endswith(SIDED[1]):
            means[code] = means[code - 1] + 0.01 * rng.standard_normal()
            continue
        mean, spread = tissues[name.removesuffix(SIDED[0])]
        means[code] = max(0.0, mean + spread * rng.standard_normal())
    means[0] = 0.0
    return np.maximum(means, 0)


@functools.lru_cache(maxsize=1)
def standard_scanner() -> Scanner:
    """A scanner that shows anatomy and nothing else: mean contrast of many, brain tissue only, no noise and no blur."""
    means = np.stack([_t1_means(np.random.default_rng(number)) for number in range(200)]).mean(axis=0)
    nothing = {"texture": 0.0, "bias": 0.0, "blur": 0.0, "noise": 0.0, "cut": 0.0}
    return Scanner(means, np.zeros(256, np.float32), gamma=1.0, thickness=1.0, slice_axis=0, mask="tissue", **nothing)


def _any_means(rng: np.random.Generator) -> NDArray[np.float32]:
    """Every tissue on its own; both sides alike."""
    means = np.zeros(256, np.float32)
    for code, name in enumerate(NAMES[1:], start=1):
        means[code] = means[code - 1] if name.endswith(SIDED[1]) else rng.uniform(0.02, 1.1)
    return means


@dataclass(frozen=True)
class BiasField:
    """A smooth multiplicative field around 1: the exponential of a random polynomial of third degree.

    Attributes:
        terms: powers of each axis and their factor.
        mean: of the polynomial over the whole image.
        scale: factor that gives it the deviation that was asked for.
    """

    terms: tuple[tuple[tuple[int, int, int], float], ...]
    mean: float
    scale: float

    @classmethod
    def draw(cls, rng: np.random.Generator, deviation: float) -> BiasField:
        """Draw one.

        Args:
            rng: random numbers.
            deviation: of its logarithm over the image.
        """
        powers = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if 0 < i + j + k <= 3]
        terms = tuple((power, float(rng.standard_normal())) for power in powers)
        whole = _polynomial(terms, [np.linspace(-1, 1, 24)] * 3)
        return cls(terms, float(whole.mean()), deviation / float(whole.std()))

    def over(
        self,
        shape: tuple[int, ...],
        low: tuple[float, ...],
        high: tuple[float, ...],
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """The field ``[X, Y, Z]`` over a part of the image, from voxel to voxel; the image's edges are -1 and 1."""
        axes = [np.linspace(a, b, 24) for a, b in zip(low, high, strict=True)]
        field = np.exp((_polynomial(self.terms, axes) - self.mean) * self.scale)
        coarse = torch.from_numpy(field.astype(np.float32)).to(device)[None, None]
        return torch.nn.functional.interpolate(coarse, size=list(shape), mode="trilinear", align_corners=True)[0, 0]


def _polynomial(
    terms: tuple[tuple[tuple[int, int, int], float], ...], axes: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    field = np.zeros(tuple(len(axis) for axis in axes))
    for (i, j, k), factor in terms:
        field += factor * x**i * y**j * z**k
    return field


def normal_numbers(rng: np.random.Generator, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Normal deviates; on another device than the CPU from its own generator, as copying them takes as long."""
    if device.type == "cpu":
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
    return torch.randn(shape, generator=generator, device=device)


def slices(image: torch.Tensor, thickness: float, axis: int, spacing: float) -> torch.Tensor:
    """An image ``[X, Y, Z]`` as it is scanned in slices of a thickness (mm) and interpolated to its spacing."""
    length = image.shape[axis]
    count = max(2, math.floor(length * spacing / thickness))
    if thickness <= spacing * 1.05 or count >= length:
        return image
    moved = image.movedim(axis, -1)
    flat = moved.reshape(1, -1, length)
    thick = torch.nn.functional.interpolate(flat, size=count, mode="area")
    thin = torch.nn.functional.interpolate(thick, size=length, mode="linear", align_corners=False)
    return thin.reshape(moved.shape).movedim(-1, axis)


def blur(image: torch.Tensor, deviation: float) -> torch.Tensor:
    """Gaussian blur of ``[X, Y, Z]``; the deviation is in voxels, edges are repeated."""
    radius = max(1, math.ceil(3 * deviation - 0.5))
    if deviation < 0.15:
        return image
    taps = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * deviation**2))
    taps /= taps.sum()
    # A sum of shifted images takes a fifth of the time of conv3d with one channel.
    for axis, length in enumerate(image.shape):
        ends = [image.narrow(axis, end, 1).expand(*(radius if a == axis else -1 for a in range(3))) for end in (0, -1)]
        padded = torch.cat([ends[0], image, ends[1]], dim=axis)
        image = padded.narrow(axis, radius, length) * taps[radius]
        for step in range(1, radius + 1):
            for place in (radius - step, radius + step):
                image.add_(padded.narrow(axis, place, length), alpha=float(taps[radius + step]))
    return image
