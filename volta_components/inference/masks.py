# SPDX-License-Identifier: Apache-2.0
"""Masks in a scan's own space."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from volta_components.data.labels import SIDES
from volta_components.data.load import meta_tensor
from volta_components.files import write_csv
from volta_components.inference.journal import Journal

logger = logging.getLogger(__name__)


def restore_mask(
    probabilities: np.ndarray, affine: np.ndarray, target_affine: np.ndarray, target_shape: Sequence[int]
) -> np.ndarray:
    """Label map on a scan's own grid from probabilities on the prepared grid.

    Probabilities are interpolated linearly, and the class with the highest one is taken afterwards, so that edges are
    as smooth as the scan's grid allows; an interpolated label map would be frayed. On equal grids nothing changes.

    Args:
        probabilities: ``[C, D, H, W]``, background first.
        affine: ``[4, 4]`` of the prepared grid.
        target_affine: ``[4, 4]`` of the scan.
        target_shape: of the scan, voxels.

    Returns:
        ``target_shape``, uint8; background outside the prepared grid.
    """
    shape = tuple(int(side) for side in target_shape)
    result = np.zeros(shape, np.uint8)
    places = np.argwhere(probabilities.argmax(axis=0) > 0)
    if not len(places):
        return result
    to_prepared = np.linalg.inv(affine) @ target_affine
    snapped = np.round(to_prepared)
    if np.abs(to_prepared - snapped).max() * max(shape) < 1e-3:
        to_prepared = snapped
    # A voxel that becomes foreground lies less than one prepared voxel from one that is.
    low, high = places.min(axis=0) - 1.0, places.max(axis=0) + 1.0
    corners = np.array([[(low, high)[bit][axis] for axis, bit in enumerate(bits)] for bits in np.ndindex(2, 2, 2)])
    box = nib.affines.apply_affine(np.linalg.inv(to_prepared), corners)
    first = np.maximum(np.floor(box.min(axis=0)), 0).astype(int)
    last = np.minimum(np.ceil(box.max(axis=0)) + 1, shape).astype(int)
    if (last <= first).any():
        return result
    matrix, offset = to_prepared[:3, :3], to_prepared[:3, 3]
    part = np.stack(
        [
            ndimage.affine_transform(
                channel,
                matrix,
                offset=offset + matrix @ first,
                output_shape=tuple(last - first),
                output=np.float32,
                order=1,
                mode="constant",
                cval=float(index == 0),
            )
            for index, channel in enumerate(probabilities)
        ]
    )
    result[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = part.argmax(axis=0)
    return result


class RestoreMaskd(MapTransform):
    """Turns logits on the prepared grid into a label map on the scan's own: its orientation, spacing and shape.

    The inverse of ``LoadScand``, which MONAI's ``Invertd`` would need a trace of invertible transforms for.

    Args:
        keys: of the logits, ``[3, D, H, W]``.
        image_key: of the volume they were computed from, as ``LoadScand`` gave it.

    Shapes:
        becomes ``MetaTensor`` ``[1, X, Y, Z]``, uint8, with the scan's affine: 0 background, 1 left, 2 right.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore each mask."""
        result = dict(data)
        image = data[self.image_key]
        affine, own = (
            np.asarray(torch.as_tensor(a).cpu(), float) for a in (image.affine, image.meta["original_affine"])
        )
        shape = [int(side) for side in torch.as_tensor(image.meta["spatial_shape"])]
        for key in self.key_iterator(data):
            logits = torch.as_tensor(data[key])
            probabilities = logits.float().softmax(dim=0).cpu().numpy()
            mask = restore_mask(probabilities, affine, own, shape)
            meta = {
                "filename_or_obj": image.meta["filename_or_obj"],
                "original_affine": own,
                "spatial_shape": np.array(shape),
                "original_channel_dim": float("nan"),
            }
            result[key] = meta_tensor(mask, own, meta)
        return result


class VolumeTable:
    """Writes a CSV of the volumes of both hippocampi, in mm^3 of the scan's own voxels.

    Args:
        path: the table.
        journal: keeps rows as they are made; the table has its rows then, of this start and earlier ones.
    """

    def __init__(self, path: str | os.PathLike[str], journal: Journal | None = None) -> None:
        self.path = Path(path)
        self.journal = journal
        self.rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def _started(self) -> None:
        self.rows.clear()

    def _iteration_completed(self, engine: Any) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            mask = output["pred"]
            voxel = abs(float(np.linalg.det(np.asarray(mask.affine.cpu())[:3, :3])))
            volumes = [int((mask == value).sum()) * voxel for value in SIDES.values()]
            names = [item.get("subject_id") or "", item.get("session") or "", mask.meta["filename_or_obj"]]
            self.rows.append([*names, *(f"{volume:.1f}" for volume in (*volumes, sum(volumes)))])
            if self.journal is not None and self.journal.has_begun:
                self.journal.add(names[-1], self.rows[-1], [mask.meta["saved_to"]])
            if not all(volumes):
                logger.warning("%s: no voxels of a hippocampus were found", names[-1])

    def write(self) -> None:
        """Write the table."""
        rows = self.journal.rows() if self.journal is not None and self.journal.has_begun else self.rows
        write_csv(self.path, ["subject_id", "session", "file", "left_mm3", "right_mm3", "both_mm3"], rows)
        print(f"{len(rows)} masks; volumes in {self.path}")
