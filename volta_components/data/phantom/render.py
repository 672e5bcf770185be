# SPDX-License-Identifier: Apache-2.0
"""The image of a phantom."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from volta_components.data.phantom.anatomy import geometry, image_affine, load_atlas, sample_field
from volta_components.data.phantom.subjects import FIELD_OF_VIEW, Phantom, Subject, random_stream


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
    sampled = sample_field(atlas.maps, where.template_positions(affine, shape))
    shares = sampled[3:]
    contrast = torch.clamp(sampled[0] + subject.grey * sampled[1] + subject.fluid * sampled[2], min=0)

    rng = random_stream(subject.seed, 6, subject.number)
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
