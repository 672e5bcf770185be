# SPDX-License-Identifier: Apache-2.0
"""Loads scans for a network as they were prepared for training."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader
from monai.transforms import MapTransform

from volta_components.data.labels import read_labels
from volta_components.data.layouts.common import LabelFile
from volta_components.data.places import image_of, place_of
from volta_components.data.preprocess import Settings, on_grid, prepare_volume
from volta_components.data.quality import find_marks
from volta_components.data.unusable import UnusableVolume, UnusableVoxels
from volta_components.data.volumes import Volume, read_volume


class LoadScand(MapTransform):
    """Loads a scan, and its label map if it has one, as the networks are trained on.

    A volume that ``volta3d prepare`` wrote is taken as it is. Any other scan, of any orientation and spacing, goes
    through the very function of ``volta3d prepare`` on the way, which MONAI's ``LoadImaged``, ``Orientationd``,
    ``Spacingd`` and intensity scaling would only approximate: window around the head, percentiles of the foreground.

    Args:
        keys: where items have the scan's path; with a label map, the one that it belongs to.
        spacing: of the prepared volume, mm; one number or three.
        shape: of the prepared volume, voxels.
        label_key: where items may have the label map's path; None to ignore label maps.
        assume_orientation: axis codes such as ``"RAS"`` for scans whose header has no orientation; None refuses these.
        track_meta: whether the result knows its grid and its file; false gives plain tensors.

    Shapes:
        scan: ``MetaTensor`` ``[1, D, H, W]``, float32 in [0, 1], with its own grid in ``original_affine`` and
        ``spatial_shape`` of its ``meta``, and in ``marks`` what ``volta3d prepare`` would mark, or has marked by the
        item's ``marks``; label map: ``MetaTensor`` ``[1, D, H, W]``, uint8.

    Raises:
        InputError: if a file cannot be used, naming it and the remedy.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float | Sequence[float],
        shape: Sequence[int],
        label_key: str | None = None,
        assume_orientation: str | None = None,
        track_meta: bool = True,
    ) -> None:
        super().__init__(keys)
        mm = tuple(np.broadcast_to(np.asarray(spacing, float), 3).tolist())
        self.settings = Settings(spacing=mm, shape=tuple(shape), assume_orientation=assume_orientation)  # type: ignore[arg-type]
        self.label_key = label_key
        self.track_meta = track_meta

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace paths by volumes."""
        # None, of a session that is not known, cannot be collated; without a label map there is no such key.
        result = {
            key: "" if value is None else value
            for key, value in data.items()
            if key != "marks" and (value is not None or key != self.label_key)
        }
        given = None if self.label_key is None else data.get(self.label_key)
        label_path = Path(str(given)) if isinstance(given, (str, os.PathLike)) else None
        for key in self.key_iterator(data):
            image, label = self._load(Path(str(data[key])), label_path)
            # A prepared volume no longer shows what its scan was marked for; its datalist does.
            image.meta["marks"] = _joined(str(data.get("marks") or ""), image.meta["marks"])
            result[key] = image if self.track_meta else image.as_tensor()
            if label is not None:
                result[self.label_key] = label if self.track_meta else label.as_tensor()
        return result

    def _load(self, path: Path, label_path: Path | None) -> tuple[MetaTensor, MetaTensor | None]:
        volume = read_volume(path, self.settings.assume_orientation)
        label: np.ndarray | None = None
        label_affine: np.ndarray | None = None
        if label_path is not None:
            label, label_affine, _ = read_labels(
                [LabelFile(label_path)], volume, path, self.settings.assume_orientation
            )
        affine, marks = volume.affine, list(volume.warnings)
        image = self._already_prepared(volume)
        if image is None:
            try:
                prepared = prepare_volume(volume, self.settings, label, label_affine)
            except UnusableVoxels as error:
                raise UnusableVolume(path, error.reason, error.remedy) from error
            image, label, affine = prepared.image, prepared.label, prepared.affine
            (marks,) = find_marks([{**prepared.quality, "warnings": prepared.warnings}])
        meta = {
            "filename_or_obj": str(path),
            "original_affine": np.array(volume.affine, dtype=float),
            "spatial_shape": np.array(volume.voxels.shape),
            "original_channel_dim": float("nan"),
            "marks": "; ".join(marks),
        }
        label_meta = {**meta, "filename_or_obj": str(label_path)}
        return meta_tensor(image, affine, meta), None if label is None else meta_tensor(label, affine, label_meta)

    def _already_prepared(self, volume: Volume) -> np.ndarray | None:
        """The voxels of a volume that is on such a grid and in [0, 1]; otherwise None."""
        if not on_grid(volume, self.settings):
            return None
        image = volume.intensities
        is_unit = np.isfinite(image).all() and image.min() >= -1e-3 and image.max() <= 1 + 1e-3
        return image if is_unit and image.min() < image.max() else None


def _joined(scan: str, volume: str) -> str:
    """Marks of a scan and those of the volume made from it, without what is the same but for its numbers."""

    def plain(mark: str) -> str:
        return re.sub(r"[\d.]+", "", mark)

    known = scan.split("; ") if scan else []
    told = set(map(plain, known))
    return "; ".join([*known, *(mark for mark in volume.split("; ") if mark and plain(mark) not in told)])


def meta_tensor(voxels: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any]) -> MetaTensor:
    """Voxels ``[D, H, W]`` as MONAI's ``[1, D, H, W]``, uint8 or otherwise float32."""
    array = torch.from_numpy(np.array(voxels, np.uint8 if voxels.dtype == np.uint8 else np.float32, order="C"))
    return MetaTensor(array[None], affine=torch.from_numpy(np.array(affine, float)), meta=dict(meta))


class ShardReader(NibabelReader):
    """MONAI's ``NibabelReader`` that also reads volumes within shards, and scales integers in float32.

    NiBabel scales them in float64, which takes several times as long; the difference is that of float32's rounding.
    """

    def read(self, data: Sequence[Any] | Any, **kwargs: Any) -> Any:
        """Read a volume, or several."""
        names = data if isinstance(data, (list, tuple)) else (data,)
        places = [place_of(name) for name in names]
        if not any(places):
            return super().read(data, **kwargs)
        self.filenames = names
        images = [super(ShardReader, self).read(n) if p is None else image_of(p) for n, p in zip(names, places)]
        return images if len(images) > 1 else images[0]

    def verify_suffix(self, filename: Sequence[Any] | Any) -> bool:
        """Whether a file may be read by this."""
        names = filename if isinstance(filename, (list, tuple)) else (filename,)
        return all(place_of(name) is not None for name in names) or bool(super().verify_suffix(filename))

    def _get_array_data(self, img: Any, *more: Any) -> Any:
        if img.dataobj.slope == 1 and img.dataobj.inter == 0:
            return super()._get_array_data(img, *more)
        voxels = np.asarray(img.dataobj.get_unscaled()).astype(np.float32)
        voxels *= np.float32(img.dataobj.slope)
        voxels += np.float32(img.dataobj.inter)
        return voxels
