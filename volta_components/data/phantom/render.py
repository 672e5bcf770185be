# SPDX-License-Identifier: Apache-2.0
"""The image of a phantom."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from volta_components.data.phantom.anatomy import Anatomy, Geometry, Template, geometry
from volta_components.data.phantom.deformation import sample_field
from volta_components.data.phantom.heads import Head, hippocampus_shares, look_up, lookup_codes, sample_tables
from volta_components.data.phantom.labels import CODES, TISSUE, VENTRICLES
from volta_components.data.phantom.scanner import BiasField, Scanner, blur, normal_numbers, slices
from volta_components.data.phantom.subjects import Phantom, Subject, random_stream

_SLAB = 1_600_000  # voxels
_CPU = torch.device("cpu")
STRUCTURES = ("brain", "hippocampus_left", "hippocampus_right", "ventricles")


@dataclass(frozen=True)
class View:
    """A grid that is rendered: the whole image of a subject, or a part of it.

    Attributes:
        affine: ``[4, 4]`` voxel to world, mm; axes along the world's.
        shape: voxels.
        rough: without partial volume, for a first look.
        device: where it is rendered. Another device than the CPU rounds in its own way, and draws another texture,
            bias field and noise from the same scanner; the head and its place are the same.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, ...]
    rough: bool = False
    device: torch.device = _CPU

    @property
    def spacing(self) -> float:
        """Size of the voxels, mm."""
        return float(self.affine[0, 0])

    def within(self, anatomy: Anatomy) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """First and last voxel in units of the whole image, whose edges are -1 and 1."""
        half = np.array(anatomy.field) / 2
        low = (self.affine[:3, 3] - anatomy.middle) / half
        high = low + (np.array(self.shape) - 1) * self.spacing / half
        return tuple(low.tolist()), tuple(high.tolist())


def whole_view(anatomy: Anatomy, spacing: int, rough: bool = False) -> View:
    """The whole image."""
    return View(anatomy.image_affine(spacing), anatomy.image_shape(spacing), rough)


@dataclass(frozen=True)
class Pixels:
    """What a view shows.

    Attributes:
        image: ``[X, Y, Z]`` intensities from 0; white matter has about 1.
        hippocampi: ``[2, X, Y, Z]`` shares of the left and the right hippocampus, by the side of the image.
        volumes: mm^3 of ``STRUCTURES`` within the view.
        inside: ``[X, Y, Z]`` bool, the head, or the brain where the rest is taken off.
    """

    image: torch.Tensor
    hippocampi: torch.Tensor
    volumes: tuple[float, ...]
    inside: torch.Tensor


def render(subject: Subject, anatomy: Anatomy, spacing: int, scanner: Scanner, scan: int = 0) -> Phantom:
    """Make the image and the label map of a subject's scan.

    Raises:
        InputError: if the subject's deformation folds.
    """
    where = geometry(subject, anatomy)
    view = whole_view(anatomy, spacing)
    seen = render_view(subject, anatomy, where, scanner, view, stream=6 + 16 * scan)
    image = np.clip(np.rint(seen.image.numpy() * subject.gain), 0, 32767).astype(np.int16)
    if scanner.mask != "head":
        image = np.where(seen.inside.numpy(), np.maximum(image, 1), 0).astype(np.int16)
    labels = np.zeros(view.shape, np.uint8)
    labels[seen.hippocampi[0].numpy() > 0.5] = 1
    labels[seen.hippocampi[1].numpy() > 0.5] = 2
    truth = {name: value for name, value in asdict(subject).items() if value != "" and value is not False}
    truth["scale"] = [where.fit * factor for factor in subject.scale]
    truth["rotation"] = list(subject.rotation)
    truth["translation"] = where.translation.tolist()
    truth |= {f"volume_{name}": volume for name, volume in zip(STRUCTURES, seen.volumes, strict=True)}
    if isinstance(anatomy, Head):
        truth["scanner"] = scanner.describe()
    truth = {key: _rounded(value) for key, value in truth.items()}
    return Phantom(image, labels, view.affine, truth)


def render_view(
    subject: Subject, anatomy: Anatomy, where: Geometry, scanner: Scanner, view: View, stream: int = 6
) -> Pixels:
    """Make what a view shows of a subject; ``stream`` is that of the random numbers of texture and noise."""
    rng = random_stream(subject.seed, stream, subject.number)
    if isinstance(anatomy, Head):
        clean, hippocampi, counts, inside = _head_tissues(rng, anatomy, where, scanner, view, subject)
    else:
        assert isinstance(anatomy, Template)
        clean, hippocampi, counts, inside = _template_tissues(anatomy, where, scanner, view)
    bias = BiasField.draw(rng, scanner.bias).over(view.shape, *view.within(anatomy), view.device)
    image = clean.clamp_(min=0).pow_(scanner.gamma).mul_(bias)
    image = blur(image, scanner.blur / view.spacing)
    image = slices(image, scanner.thickness, scanner.slice_axis, view.spacing)
    # Magnitude of a complex signal with Gaussian noise in both parts, as in MRI.
    noise = normal_numbers(rng, view.shape, view.device).mul_(scanner.noise)
    # The second part's noise is the first one's of the opposite voxel: half the random numbers, and no two alike here.
    image = torch.hypot(image.add_(noise), noise.flip(0, 1, 2))
    return Pixels(image, hippocampi, tuple(count * view.spacing**3 for count in counts), inside)


Tissues = tuple[torch.Tensor, torch.Tensor, list[float], torch.Tensor]


def _template_tissues(template: Template, where: Geometry, scanner: Scanner, view: View) -> Tissues:
    """Intensities, shares of the hippocampi, voxels of ``STRUCTURES``, and the brain."""
    places = where.between_edges(where.voxels(view.affine, view.shape, view.device))
    sampled = sample_field(template.maps.to(view.device), places)
    shares = sampled[3:]
    grey, fluid = (float(scanner.means[CODES[name]]) for name in ("cortex_left", "fluid"))
    clean = sampled[0] + grey * sampled[1] + fluid * sampled[2]
    return clean, shares[1:3], [float(share.sum(dtype=torch.float64)) for share in shares], shares[0] > 0.5


def _head_tissues(
    rng: np.random.Generator, head: Head, where: Geometry, scanner: Scanner, view: View, subject: Subject
) -> Tissues:
    """As for the template: one Gaussian a label, with partial volume."""
    device = view.device
    width = 1 if view.rough else max(1, round(view.spacing))
    clean, hippocampi = torch.empty(view.shape, device=device), torch.zeros((2, *view.shape), device=device)
    sides = torch.zeros(2, dtype=torch.float64, device=device)
    codes = torch.empty(view.shape, dtype=torch.uint8, device=device)
    # In slabs, whose intermediate results stay in the processor's cache; each begins at an even voxel.
    thick = max(4, _SLAB // (view.shape[1] * view.shape[2]) // 4 * 4)
    for first in range(0, view.shape[0], thick):
        part = slice(first, min(first + thick, view.shape[0]))
        affine = view.affine.copy()
        affine[:3, 3] += first * affine[:3, 0]
        voxels = where.voxels(affine, (part.stop - first, *view.shape[1:]), device)
        codes[part] = lookup_codes(head, voxels)
        if not view.rough:
            clean[part] = sample_tables(head, scanner.table[None], voxels, width)[0]
        sides += hippocampus_shares(head, voxels, width, out=hippocampi[:, part])

    def of_each_code(table: NDArray[Any]) -> torch.Tensor:
        return look_up(torch.from_numpy(table).to(device), codes)

    if view.rough:
        clean = of_each_code(scanner.table)
    texture = _texture(rng, view, scanner.texture)
    clean.add_(texture.mul_(of_each_code(scanner.deviations)))
    if scanner.cut:
        height = float(view.affine[2, 3] - (head.middle[2] - head.field[2] / 2))  # above the whole image's lower edge
        clean[:, :, : max(0, round((scanner.cut - height) / view.spacing))] = 0
    if subject.mirrored:
        hippocampi, sides = hippocampi.flip(0), sides.flip(0)
    inside = of_each_code(scanner.table > 0 if scanner.mask == "head" else scanner.kept)
    if scanner.mask != "head":
        clean.mul_(inside)
    counts = torch.bincount(codes.reshape(-1), minlength=256).cpu().numpy()
    return clean, hippocampi, [float(counts[TISSUE].sum()), *sides.tolist(), float(counts[VENTRICLES].sum())], inside


def _texture(rng: np.random.Generator, view: View, smooth: float) -> torch.Tensor:
    """``[X, Y, Z]`` of deviation 1, a part of which varies over about 5 mm."""
    coarse = tuple(max(2, round(n * view.spacing / 5)) for n in view.shape)
    slow = normal_numbers(rng, coarse, view.device)[None, None]
    texture = torch.nn.functional.interpolate(slow, size=list(view.shape), mode="trilinear", align_corners=False)[0, 0]
    # Linear interpolation between nodes takes away about half of the deviation.
    fine = normal_numbers(rng, view.shape, view.device)
    return texture.mul_(1.8 * smooth).add_(fine, alpha=1 - smooth)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
