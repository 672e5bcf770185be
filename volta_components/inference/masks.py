# SPDX-License-Identifier: Apache-2.0
"""Masks in a scan's own space, and the table of their volumes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import PathLike
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import MapTransform

from volta_components.data.labels import SIDES
from volta_components.data.load import meta_tensor
from volta_components.data.nifti import write_nifti
from volta_components.inference.own_space import grids_of, restore_mask
from volta_components.inference.plausibility import odd_about_masks
from volta_components.inference.tables import ResultTable, marks_of

COLUMNS = ("subject_id", "session", "file", "left_mm3", "right_mm3", "both_mm3", "marks")


class RestoreMaskd(MapTransform):
    """Turns logits on the prepared grid into a label map on the scan's own: its orientation, spacing and shape.

    The inverse of ``LoadScand``, which MONAI's ``Invertd`` would need a trace of invertible transforms for.

    Args:
        keys: of the logits, ``[3, D, H, W]``; ``image`` is the volume that they were computed from, as ``LoadScand``
            gave it.

    Shapes:
        becomes ``MetaTensor`` ``[1, X, Y, Z]``, uint8, with the scan's affine: 0 background, 1 left, 2 right.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore each mask."""
        result = dict(data)
        image = data["image"]
        affine, own, shape = grids_of(image)
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


class ScanSpaceWriter(NibabelWriter):
    """Writes a mask with the qform, sform and codes of the scan that it belongs to.

    MONAI's writer sets both from one affine, so that a mask would lie beside its scan in viewers that prefer the other.
    For ``SaveImaged``.
    """

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, resample: bool = True, **options: Any) -> None:
        """Remember the scan's file."""
        super().set_metadata(meta_dict, resample, **options)
        self.scan = (meta_dict or {}).get("filename_or_obj")

    def write(self, filename: PathLike, verbose: bool = False, **options: Any) -> None:
        """Write the file, atomically."""
        voxels = np.asarray(self.data_obj, dtype=self.output_dtype)
        write_nifti(filename, voxels, np.asarray(self.affine, float), like=self.scan)


def marks_of_result(image: Any, mask: MetaTensor) -> str:
    """What is odd about a scan and about the mask that was drawn of it, in one text; empty for most.

    Args:
        image: the prepared volume ``[1, D, H, W]``, as ``LoadScand`` gave it.
        mask: ``[X, Y, Z]``, on the scan's own grid.
    """
    marks = [marks_of(image)]
    if isinstance(image, MetaTensor):
        affines = [np.asarray(volume.affine.cpu(), float) for volume in (mask, image)]
        marks += odd_about_masks(mask.cpu().numpy(), affines[0], image[0].cpu().numpy(), affines[1])
    return "; ".join(filter(None, marks))


class VolumeTable(ResultTable):
    """Writes a CSV of the volumes of both hippocampi, in mm^3 of the scan's own voxels, and what is odd about them."""

    def result(self, item: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[list[Any], str, list[Path]]:
        """Ids, file and volumes; the mask's file was made."""
        mask = output["pred"]
        file = str(mask.meta["filename_or_obj"])
        voxel = abs(float(np.linalg.det(np.asarray(mask.affine.cpu())[:3, :3])))
        volumes = [int((mask == value).sum()) * voxel for value in SIDES.values()]
        marks = marks_of_result(item["image"], mask[0])
        numbers = [f"{volume:.1f}" for volume in (*volumes, sum(volumes))]
        made = [Path(mask.meta["saved_to"])] if "saved_to" in mask.meta else []
        return [item.get("subject_id"), item.get("session"), file, *numbers, marks], file, made

    def write_table(self) -> None:
        """Write the table."""
        self.write_rows(COLUMNS, "masks; volumes")
