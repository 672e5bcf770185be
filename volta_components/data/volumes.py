# SPDX-License-Identifier: Apache-2.0
"""Reading a volume file without trusting it: every defect is named, and voxels stay in their stored type.

NiBabel reads all the formats. :mod:`volta_components.data.headers` reads the headers of NIfTI files and pairs, and this
module their voxels, for two reasons. NiBabel does not read a gzip stream to its end, so a wrong checksum goes unseen.
And it holds the bytes of a compressed file twice, as well as a float64 copy when the header has a scale factor; a
large scan then takes ten times its own size.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from volta_components.data.geometry import assumed_affine, by, check_dtype, check_geometry
from volta_components.data.headers import (
    NO_ORIENTATION,
    PAIR_SUFFIXES,
    VolumeHeader,
    is_gzip,
    open_volume,
    read_header,
    too_short,
)
from volta_components.data.unusable import UnusableVolume, named_errors, one_line

NIFTI_SUFFIXES = (".nii", ".nii.gz")
MGH_SUFFIXES = (".mgz", ".mgh")
# Formats of volumes that are not read, and what to do with such a file.
_CONVERSIONS = {
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), "convert it (Convert3D: c3d {name} -o {stem}.nii.gz)"),
    **dict.fromkeys((".mif", ".mif.gz"), "convert it (MRtrix3: mrconvert {name} {stem}.nii.gz)"),
    **dict.fromkeys((".brik", ".brik.gz"), "convert it (AFNI: 3dAFNItoNIFTI {name})"),
    **dict.fromkeys((".nii.gz.gz", ".mnc.gz"), "unpack it (gunzip {name})"),
    ".mgh.gz": "name it {stem}.mgz",
}
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".mnc", *MGH_SUFFIXES, ".img", ".img.gz", *_CONVERSIONS)


@dataclass(frozen=True)
class Volume:
    """A volume's voxels as stored, and where they lie.

    Attributes:
        voxels: ``[X, Y, Z]``, in the stored type; a read-only view of the file where it is not compressed.
        affine: ``[4, 4]``, voxel index to world mm (RAS+).
        slope, intercept: world intensity = voxels * slope + intercept.
        code: NIfTI's code of the affine; 1 where the format has none.
        warnings: what was odd but harmless.
    """

    voxels: np.ndarray
    affine: np.ndarray
    slope: float
    intercept: float
    code: int
    warnings: tuple[str, ...] = ()

    @property
    def intensities(self) -> np.ndarray:
        """World intensities, float32."""
        return self.voxels.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)


def canonical(volume: Volume) -> Volume:
    """The same volume, viewed in the axis order and directions nearest to RAS."""
    orientation = io_orientation(volume.affine)
    affine = volume.affine @ inv_ornt_aff(orientation, volume.voxels.shape)
    return replace(volume, voxels=apply_orientation(volume.voxels, orientation), affine=affine)


def whole_numbers(path: Path, volume: Volume) -> np.ndarray:
    """Voxels of a label map as integers, scaled.

    Raises:
        UnusableVolume: if they are none.
    """
    voxels = volume.voxels
    if volume.slope != 1 or volume.intercept != 0:
        voxels = voxels * volume.slope + volume.intercept
    if voxels.dtype.kind == "f":
        if not np.isfinite(voxels).all():
            raise UnusableVolume(path, "label contains NaN or Inf", "fetch it again")
        rounded = np.round(voxels)
        if np.abs(voxels - rounded).max() > 1e-3:
            raise UnusableVolume(path, "label values are no integers", "give a label map, no image or probabilities")
        voxels = rounded.astype(np.int64)
    return voxels


def volume_suffix(path: Path) -> str | None:
    """The volume format's suffix that a file name ends in (``.nii.gz`` is one), or None."""
    name = path.name.lower()
    return max((suffix for suffix in VOLUME_SUFFIXES if name.endswith(suffix)), key=len, default=None)


def volume_stem(path: Path) -> str:
    """A file's name without its volume format's suffix: ``sub-1_T1w`` of ``sub-1_T1w.nii.gz``."""
    return path.name[: len(path.name) - len(volume_suffix(path) or "")]


def conversion(path: Path) -> str | None:
    """What to do with a volume of a format that is not read; None for any other file."""
    remedy = _CONVERSIONS.get(volume_suffix(path) or "")
    return remedy and remedy.format(name=path.name, stem=volume_stem(path))


def _read_nifti(path: Path, assume_orientation: str | None) -> Volume:
    header = read_header(path, assume_orientation)
    with named_errors(header.data):
        if header.compressed:
            flat, extra = _unpack(header)
            if extra:
                # The header is looked at again with the file's true length: it may have told a wrong place.
                told, header = header.offset, read_header(path, assume_orientation, thorough=True)
                if header.offset != told:
                    flat, _ = _unpack(header)
        else:
            with header.data.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            flat = np.frombuffer(mapped, header.dtype, header.n_voxels, header.offset)
    if not flat.dtype.isnative:
        flat = flat.astype(flat.dtype.newbyteorder("="))
    voxels = flat.reshape(header.shape, order="F")
    return Volume(voxels, header.affine, header.slope, header.intercept, header.code, header.warnings)


def _unpack(header: VolumeHeader) -> tuple[np.ndarray, int]:
    """Voxels of a gzip file, ``[X * Y * Z]``, and how many bytes follow them."""
    flat = np.empty(header.n_voxels, header.dtype)
    wanted = flat.view(np.uint8).data
    with open_volume(header.data) as stream:
        stream.seek(header.offset)
        done = 0
        while done < len(wanted):
            n = stream.readinto(wanted[done : done + 2**22])
            if n == 0:
                raise too_short(header.data, done + header.offset, header.n_bytes, header.offset)
            done += n
        extra = 0
        while part := stream.read(2**20):  # the checksum is compared only at the stream's end
            extra += len(part)
    return flat, extra


def _read_other(path: Path, assume_orientation: str | None) -> Volume:
    with named_errors(path):
        if path.stat().st_size == 0:
            raise UnusableVolume(path, "empty file (0 bytes)", "fetch it again")
        if volume_suffix(path) in MGH_SUFFIXES:
            with open_volume(path) as stream:
                start = stream.read(90)
                while stream.read(2**22):  # a wrong checksum shows at the stream's end
                    pass
                stream.seek(0)
                _check_mgh(path, start)
                return _converted(path, nib.MGHImage.from_stream(stream), assume_orientation, not any(start[28:30]))
        if is_gzip(path):
            raise UnusableVolume(path, "packed with gzip, although its name does not say so", "unpack it with gunzip")
        try:
            image = nib.load(path)
        except ImportError as error:
            reason = f"its format needs another package ({error})"
            raise UnusableVolume(path, reason, "install that package, or convert the file") from error
        except ImageFileError as error:
            raise UnusableVolume(path, f"not a volume file ({error})", "check what was downloaded") from error
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise UnusableVolume(path, f"not a volume file ({type(image).__name__})", "give a volume")
        return _converted(path, image, assume_orientation, image.affine is None)


def _check_mgh(path: Path, start: bytes) -> None:
    """Refuse an MGH header that NiBabel would take as it is: a negative voxel size would be a flip."""
    if len(start) < 90:
        raise UnusableVolume(path, f"truncated: {len(start)} bytes, less than an MGH header", "fetch it again")
    shape = np.frombuffer(start, ">i4", 3, 4)
    sizes, axes = np.frombuffer(start, ">f4", 3, 30), np.frombuffer(start, ">f4", 9, 42).reshape(3, 3)
    if shape.min() < 1:
        raise UnusableVolume(path, f"impossible dimensions {shape.tolist()}", "fetch it again, or convert it again")
    if not any(start[28:30]):  # sizes and axes do not count
        return
    if not (np.isfinite(sizes).all() and sizes.min() > 0):
        raise UnusableVolume(path, f"impossible spacing {by(sizes, ' x ')} mm", "convert it from its source again")
    lengths = np.linalg.norm(axes.astype(float), axis=1)
    if not (np.abs(lengths - 1) < 0.01).all():
        reason = f"damaged header: its axes have the lengths {by(lengths, ', ')} instead of 1"
        raise UnusableVolume(path, reason, "convert it from its source again")


def _converted(path: Path, image: Any, assume_orientation: str | None, is_lost: bool) -> Volume:
    """A volume of NiBabel's; ``is_lost`` says that its header has no orientation."""
    check_dtype(path, image.get_data_dtype())
    affine = np.eye(4) if image.affine is None else np.asarray(image.affine, dtype=float)
    if is_lost:
        if assume_orientation is None:
            raise UnusableVolume(path, "no orientation in the header (FreeSurfer would take it as LIA)", NO_ORIENTATION)
        affine = assumed_affine(assume_orientation, image.shape[:3], voxel_sizes(affine))
    shape = check_geometry(path, image.shape, affine)
    try:
        # MINC scales each slice on its own, so stored values alone mean nothing: float32 of the real ones.
        voxels = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)
    except (EOFError, PermissionError, MemoryError):
        raise
    except Exception as error:
        raise UnusableVolume(path, f"truncated or damaged ({one_line(error)})", "fetch it again") from error
    return Volume(voxels, affine, 1.0, 0.0, 1)


def read_volume(path: str | os.PathLike[str], assume_orientation: str | None = None) -> Volume:
    """Read a 3-D volume of any format that NiBabel knows, keeping its stored voxel type where it can.

    Args:
        path: the file.
        assume_orientation: axis codes such as ``"RAS"`` to assume where the header has no orientation.

    Raises:
        UnusableVolume: if anything about the file is wrong; voxels that are NaN, infinite or all equal are found by
            :func:`volta_components.data.survey.survey`, which goes over them anyway.
    """
    path = Path(path)
    if remedy := conversion(path):
        raise UnusableVolume(path, f"{volume_suffix(path)} files are not read", remedy)
    is_nifti = path.name.lower().endswith((*NIFTI_SUFFIXES, *PAIR_SUFFIXES))
    return _read_nifti(path, assume_orientation) if is_nifti else _read_other(path, assume_orientation)
