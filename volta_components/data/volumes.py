# SPDX-License-Identifier: Apache-2.0
"""Reading a volume file without trusting it: every defect is named, and voxels stay in their stored type.

NiBabel reads all the formats; NIfTI is opened here by hand (with NiBabel's header classes) for three reasons. NiBabel
repairs negative and zero voxel sizes while it reads, so that the defect could not be reported. It does not read a gzip
stream to its end, so that a wrong checksum goes unseen. And it holds the bytes of a compressed file twice, as well as a
float64 copy when the header has a scale factor; a large scan then takes ten times its own size.
"""

from __future__ import annotations

import gzip
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import axcodes2ornt

from volta_components.errors import InputError

MAX_VOXELS = 2**30
SPACING_RANGE = (0.05, 20.0)
NIFTI_SUFFIXES = (".nii", ".nii.gz")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".mnc", ".mgz", ".mgh", ".img", ".img.gz")


class UnusableVolume(InputError):
    """One volume file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it, with figures.
        remedy: what the user can do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path, self.reason, self.remedy = str(path), reason, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.remedy)


@dataclass(frozen=True)
class VolumeHeader:
    """What a NIfTI file says of itself.

    Attributes:
        shape: voxels per axis, three axes (a fourth of length 1 is dropped).
        spacing: length of the affine's columns, mm.
        affine: ``[4, 4]``, voxel index to world mm (RAS+).
        dtype: of the stored voxels, with its byte order.
        offset: bytes before the first voxel.
        slope, intercept: world intensity = stored * slope + intercept.
        code: NIfTI's sform or qform code of the affine (1 scanner ... 4 MNI).
        compressed: whether the file is gzip.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: np.ndarray
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    code: int
    compressed: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file, uncompressed."""
        return self.offset + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


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


def volume_suffix(path: Path) -> str | None:
    """The volume format's suffix that a file name ends in (``.nii.gz`` is one), or None."""
    name = path.name.lower()
    return max((suffix for suffix in VOLUME_SUFFIXES if name.endswith(suffix)), key=len, default=None)


def volume_stem(path: Path) -> str:
    """A file's name without its volume format's suffix: ``sub-1_T1w`` of ``sub-1_T1w.nii.gz``."""
    return path.name[: len(path.name) - len(volume_suffix(path) or "")]


def volumes_below(folder: Path) -> list[Path]:
    """All volume files below a folder, sorted; hidden ones and those in hidden folders are left alone."""
    found = []
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".") and volume_suffix(Path(name))]
    return sorted(found)


def _megabytes(n: float) -> str:
    return f"{n / 1e6:.1f}" if n >= 1e5 else f"{n / 1e6:.4f}"


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn the errors of opening and reading a file into an UnusableVolume that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UnusableVolume(path, "no such file", "fetch it again or mend the link") from error
    except PermissionError as error:
        raise UnusableVolume(path, "permission denied", "make it readable (chmod u+r)") from error
    except IsADirectoryError as error:
        raise UnusableVolume(path, "a folder, not a file", "give the volume file itself") from error
    except EOFError as error:
        raise UnusableVolume(path, "truncated: the gzip stream ends early", "fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnusableVolume(path, f"damaged gzip stream ({error})", "fetch it again") from error
    except MemoryError as error:
        raise UnusableVolume(
            path, "does not fit in memory", "use fewer workers, or check the file's dimensions"
        ) from error


def _check_geometry(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> tuple[int, int, int]:
    """Check the dimensions and the affine of a volume of any format; give its three dimensions."""
    if len(shape) > 3 and all(n == 1 for n in shape[3:]):
        shape = shape[:3]
    if len(shape) != 3:
        kind = "x".join(map(str, shape)) or "no dimensions"
        remedy = (
            "give one 3-D volume (split it, or take the mean or the first)" if len(shape) > 3 else "give a 3-D volume"
        )
        raise UnusableVolume(path, f"{len(shape)}-D ({kind}) where a 3-D volume is wanted", remedy)
    if min(shape) < 2:
        raise UnusableVolume(path, f"not a volume: {'x'.join(map(str, shape))} voxels", "give a 3-D volume")
    voxels = int(np.prod(shape, dtype=np.int64))
    if voxels > MAX_VOXELS:
        raise UnusableVolume(
            path,
            f"huge: {'x'.join(map(str, shape))} voxels, more than {MAX_VOXELS:,}",
            "the header is probably damaged; fetch it again, or downsample the volume first",
        )
    if not np.isfinite(affine).all():
        raise UnusableVolume(path, "affine with NaN or Inf", "convert it from its source again")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing == 0).any() or abs(np.linalg.det(affine[:3, :3] / np.where(spacing == 0, 1, spacing))) < 1e-3:
        raise UnusableVolume(
            path, "singular affine: its axes do not span the space", "convert it from its source again"
        )
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        raise UnusableVolume(
            path,
            f"implausible spacing {' x '.join(f'{s:.4g}' for s in spacing)} mm",
            f"from {SPACING_RANGE[0]:g} to {SPACING_RANGE[1]:g} mm is accepted; the header's units may not be mm",
        )
    return shape[0], shape[1], shape[2]


def _check_dtype(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.fields is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnusableVolume(
            path, f"voxels of type {dtype} (colour, complex or extended)", "give a grey-scale volume of a plain type"
        )


def _assumed_affine(codes: str, shape: tuple[int, ...], spacing: np.ndarray) -> np.ndarray:
    """Affine of a volume whose axes run towards ``codes`` (such as ``"RAS"``), with its centre at the origin."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(axcodes2ornt(tuple(codes.upper()))):
        affine[int(world), axis] = sign * spacing[axis]
        affine[int(world), 3] = -sign * spacing[axis] * (shape[axis] - 1) / 2
    return affine


def read_header(path: str | os.PathLike[str], assume_orientation: str | None = None) -> VolumeHeader:
    """Read and check the header of a ``.nii`` or ``.nii.gz`` file, and its size; the voxels are left alone.

    Args:
        path: the file.
        assume_orientation: axis codes such as ``"RAS"`` to assume where the header has no orientation.

    Raises:
        UnusableVolume: if the file is missing, unreadable, empty, no NIfTI, truncated, not 3-D, huge, or has
            impossible spacing, a singular affine or no orientation at all.
    """
    path = Path(path)
    with _named_errors(path):
        size = path.stat().st_size
        if size == 0:
            raise UnusableVolume(path, "empty file (0 bytes)", "fetch it again")
        with path.open("rb") as stream:
            compressed = stream.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as stream:
            block = stream.read(540)
    if len(block) < 348:
        raise UnusableVolume(path, f"truncated: {len(block)} bytes, less than a NIfTI header", "fetch it again")
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    kind = kinds.get(int.from_bytes(block[:4], "little")) or kinds.get(int.from_bytes(block[:4], "big"))
    if kind is None:
        raise UnusableVolume(path, "not a NIfTI file (wrong magic number)", "check what was downloaded; fetch it again")
    header = kind(block[: kind.template_dtype.itemsize], check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise UnusableVolume(path, "not a NIfTI file (wrong magic number)", "check what was downloaded; fetch it again")

    n_axes = int(header["dim"][0])
    if not 1 <= n_axes <= 7 or (header["dim"][1 : n_axes + 1] < 1).any():
        raise UnusableVolume(
            path, f"impossible dimensions {header['dim'].tolist()}", "fetch it again, or convert it again"
        )
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if not np.isfinite(pixdim).all() or (pixdim[: min(n_axes, 3)] <= 0).any():
        bad = "negative" if (pixdim < 0).any() else "zero" if (pixdim == 0).any() else "not finite"
        raise UnusableVolume(
            path,
            f"{bad} spacing {' x '.join(f'{s:.4g}' for s in pixdim)} mm in the header",
            "convert it from its source again, or correct pixdim",
        )
    try:
        dtype = header.get_data_dtype()
    except Exception as error:
        raise UnusableVolume(path, f"unknown voxel type {int(header['datatype'])}", "convert it again") from error
    _check_dtype(path, dtype)
    full_shape = tuple(int(n) for n in header["dim"][1 : n_axes + 1])
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        if assume_orientation is None:
            raise UnusableVolume(
                path,
                "no orientation: neither sform nor qform is set, so left and right cannot be told",
                "convert it from its source again, or say what it is to volta3d prepare: --assume-orientation RAS",
            )
        affine = _assumed_affine(assume_orientation, ((*full_shape, 1, 1, 1))[:3], pixdim)
        code = 1
    else:
        affine = header.get_best_affine()
        code = int(header["sform_code"]) if header["sform_code"] > 0 else int(header["qform_code"])
    shape = _check_geometry(path, full_shape, affine)
    slope, intercept = header.get_slope_inter()
    result = VolumeHeader(
        shape=shape,
        spacing=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
        affine=affine,
        dtype=dtype,
        offset=int(header.get_data_offset()),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        code=code,
        compressed=compressed,
    )
    if not compressed and size < result.n_bytes:
        raise UnusableVolume(
            path, f"truncated: {_megabytes(size)} of {_megabytes(result.n_bytes)} MB", "fetch it again"
        )
    return result


def _read_nifti(path: Path, assume_orientation: str | None) -> Volume:
    header = read_header(path, assume_orientation)
    count = int(np.prod(header.shape, dtype=np.int64))
    with _named_errors(path):
        if header.compressed:
            flat = np.empty(count, header.dtype)
            wanted = flat.view(np.uint8).data
            with gzip.open(path) as stream:
                stream.seek(header.offset)
                done = 0
                while done < len(wanted):
                    n = stream.readinto(wanted[done : done + 2**22])
                    if n == 0:
                        raise UnusableVolume(
                            path,
                            f"truncated: {_megabytes(done + header.offset)} of {_megabytes(header.n_bytes)} MB",
                            "fetch it again",
                        )
                    done += n
                while stream.read(2**20):  # the checksum is compared only at the stream's end
                    pass
        else:
            with path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            flat = np.frombuffer(mapped, header.dtype, count, header.offset)
    if not flat.dtype.isnative:
        flat = flat.astype(flat.dtype.newbyteorder("="))
    return Volume(flat.reshape(header.shape, order="F"), header.affine, header.slope, header.intercept, header.code)


def _read_other(path: Path) -> Volume:
    with _named_errors(path):
        if path.stat().st_size == 0:
            raise UnusableVolume(path, "empty file (0 bytes)", "fetch it again")
        with path.open("rb"):
            pass
        try:
            image = nib.load(path)
        except ImportError as error:
            raise UnusableVolume(
                path, f"its format needs another package ({error})", "pip install h5py for MINC 2"
            ) from error
        except ImageFileError as error:
            raise UnusableVolume(path, f"not a volume file ({error})", "check what was downloaded") from error
        except (PermissionError, FileNotFoundError):
            raise
        except Exception as error:  # NiBabel's readers of other formats raise anything at a damaged header
            raise UnusableVolume(path, f"damaged header ({error})", "fetch it again") from error
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise UnusableVolume(path, f"not a volume file ({type(image).__name__})", "give a volume")
        _check_dtype(path, image.get_data_dtype())
        if image.affine is None:
            raise UnusableVolume(path, "no orientation in the header", "convert it from its source again")
        shape = _check_geometry(path, image.shape, image.affine)
        try:
            # MINC scales each slice on its own, so stored values alone mean nothing: float32 of the real ones.
            voxels = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)
        except (EOFError, PermissionError, MemoryError):
            raise
        except Exception as error:
            raise UnusableVolume(path, f"truncated or damaged ({error})", "fetch it again") from error
    return Volume(voxels, np.asarray(image.affine, dtype=float), 1.0, 0.0, 1)


def read_volume(path: str | os.PathLike[str], assume_orientation: str | None = None) -> Volume:
    """Read a 3-D volume of any format that NiBabel knows, keeping its stored voxel type where it can.

    Args:
        path: the file.
        assume_orientation: axis codes such as ``"RAS"`` to assume where a NIfTI header has no orientation.

    Raises:
        UnusableVolume: if anything about the file is wrong; voxels that are NaN, infinite or all equal are found by
            :func:`volta_components.data.preprocess.survey`, which goes over them anyway.
    """
    path = Path(path)
    return _read_nifti(path, assume_orientation) if volume_suffix(path) in NIFTI_SUFFIXES else _read_other(path)
