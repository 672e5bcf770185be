# SPDX-License-Identifier: Apache-2.0
"""Headers of NIfTI files and of pairs (.hdr and .img), read without trusting them.

What the standard defines is repaired and noted; what contradicts itself is noted; what cannot be read right is refused.
NiBabel's header classes hold the fields. Its own checks are not used: they repair some defects without a word (negative
voxel sizes), raise for others that the standard defines (``pixdim[0]`` of 0), and miss a wrong ``vox_offset``.

Source: the comments of ``nifti1.h`` and the reference code ``nifti1_io.c`` (https://nifti.nimh.nih.gov).
"""

from __future__ import annotations

import functools
import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from volta_components.data.geometry import (
    assumed_affine,
    by,
    check_dtype,
    check_geometry,
    describe_difference,
    plausible,
    same_size,
    unusable_axes,
)
from volta_components.data.unusable import UnusableVolume, named_errors

PAIR_SUFFIXES = (".img", ".img.gz", ".hdr", ".hdr.gz")
# Millimetres in one unit of NIfTI's xyzt_units; a unit that is not known counts as mm.
_MM = {1: 1000.0, 3: 0.001}
_UNITS = {1: "metres", 3: "micrometres"}
# Bytes before the voxels of a NIfTI-1 and a NIfTI-2 file without extensions, and of a pair's image.
_USUAL_OFFSETS = (0, 352, 544)
AGAIN = "convert it from its source again"
NO_ORIENTATION = (
    "convert it from its source again, or say which way its axes run, such as --assume-orientation RAS (volta3d "
    "prepare, segment and embed)"
)


@dataclass(frozen=True)
class VolumeHeader:
    """What a NIfTI file or an Analyze pair says of itself.

    Attributes:
        shape: voxels per axis, three axes (a fourth of length 1 is dropped).
        spacing: length of the affine's columns, mm.
        affine: ``[4, 4]``, voxel index to world mm (RAS+).
        dtype: of the stored voxels, with its byte order.
        offset: bytes before the first voxel.
        slope, intercept: world intensity = stored * slope + intercept.
        code: NIfTI's sform or qform code of the affine (1 scanner ... 5 another template).
        compressed: whether the file of the voxels is gzip, whatever its name.
        data: the file of the voxels, another than the header's in a pair.
        warnings: what was repaired, and what contradicts itself.
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
    data: Path
    warnings: tuple[str, ...] = ()

    @property
    def n_voxels(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file, uncompressed."""
        return self.offset + self.n_voxels * self.dtype.itemsize


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip by its first bytes; names are often wrong."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def open_volume(path: Path) -> Any:
    """Open a volume file to read, unpacked if it is gzip, whatever its name."""
    return gzip.open(path) if is_gzip(path) else path.open("rb")


def megabytes(n: float) -> str:
    """Bytes as MB, with more digits for small files."""
    return f"{n / 1e6:.1f}" if n >= 1e5 else f"{n / 1e6:.4f}"


def too_short(path: Path, size: int, wanted: int, offset: int) -> UnusableVolume:
    """The error of a file that ends early, or that says by ``offset`` that its voxels begin later than they do."""
    if offset not in _USUAL_OFFSETS:
        return UnusableVolume(
            path,
            f"{size - offset:,} of {wanted - offset:,} bytes of voxels after vox_offset, which is {offset}: truncated, "
            "or vox_offset is wrong",
            "fetch it again, or convert it from its source again",
        )
    return UnusableVolume(path, f"truncated: {megabytes(size)} of {megabytes(wanted)} MB", "fetch it again")


def read_header(
    path: str | os.PathLike[str], assume_orientation: str | None = None, thorough: bool = False
) -> VolumeHeader:
    """Read and check the header of a NIfTI file or of a pair, and the file's size; the voxels are left alone.

    Args:
        path: ``.nii``, ``.nii.gz``, or either file of a pair.
        assume_orientation: axis codes such as ``"RAS"`` to assume where the header has no orientation.
        thorough: unpack a gzip file to its end, to compare its length with the header too.

    Raises:
        UnusableVolume: if the file is missing, unreadable, empty, no NIfTI, truncated, not 3-D, huge, or has
            impossible spacing, a singular affine or no orientation at all.
    """
    path = Path(path)
    with named_errors(path):
        return _Reader(path, thorough).read(assume_orientation)


def own_space(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a NIfTI header that say where its voxels lie, as they are; none where a volume is not NIfTI."""
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz", *PAIR_SUFFIXES)) or not path.is_file():
        return {}
    fields = _Reader(path).fields
    if isinstance(fields, nib.Spm2AnalyzeHeader):
        return {}
    pixdim = np.array([*fields["pixdim"][:4], 0, 0, 0, 0], np.float32)
    pixdim[0] = -1 if pixdim[0] < 0 else 1
    vectors = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    names = ("qform_code", "sform_code", *vectors, "srow_x", "srow_y", "srow_z", "xyzt_units")
    return {"pixdim": pixdim, **{name: fields[name] for name in names}}


def _pair(path: Path) -> tuple[Path, Path]:
    """Header and voxels of a pair, given either of them; the case of suffixes, and gzip, may differ."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    if not path.exists():
        raise FileNotFoundError(path)
    is_header = name.lower().endswith(".hdr")
    wanted = ".img" if is_header else ".hdr"
    stem = name[: -len(wanted)]
    for suffix in (wanted, f"{wanted}.gz", wanted.upper(), f"{wanted.upper()}.gz"):
        other = path.with_name(stem + suffix)
        if other.exists():
            return (path, other) if is_header else (other, path)
    raise UnusableVolume(path, f"half of a pair: there is no {stem}{wanted} beside it", f"add {stem}{wanted}")


def volume_files(path: Path) -> list[Path]:
    """The files that a volume is read from: itself; of a pair, also its header, and SPM's ``.mat`` if there is one."""
    if not path.name.lower().endswith(PAIR_SUFFIXES):
        return [path]
    try:
        header, voxels = _pair(path)
    except (UnusableVolume, FileNotFoundError):
        return [path]
    return [voxels, header, *filter(Path.is_file, [_spm_matrix(voxels)])]


def _spm_matrix(voxels: Path) -> Path:
    """The ``.mat`` file that SPM keeps beside an Analyze pair."""
    return voxels.with_name(voxels.name[: voxels.name.lower().rindex(".img")] + ".mat")


class _Reader:
    """One header on its way from bytes to a ``VolumeHeader``, with the notes that are made on the way."""

    def __init__(self, path: Path, thorough: bool = False) -> None:
        self.path = path
        self.is_pair = path.name.lower().endswith(PAIR_SUFFIXES)
        file, self.data = _pair(path) if self.is_pair else (path, path)
        for part in {file, self.data}:
            if part.stat().st_size == 0:
                raise UnusableVolume(part, "empty file (0 bytes)", "fetch it again")
        self.compressed = is_gzip(self.data)
        self.trusts_length = self.compressed and not thorough
        self.notes: list[str] = []
        with open_volume(file) as stream:
            self.fields = self._parse(stream.read(540))
        self.is_analyze = isinstance(self.fields, nib.Spm2AnalyzeHeader)

    def read(self, assume_orientation: str | None) -> VolumeHeader:
        fields = self.fields
        full_shape = self._dimensions()
        dtype = self._voxel_type()
        affine, code = self._place(full_shape, assume_orientation)
        shape = check_geometry(self.path, full_shape, affine)
        slope, intercept = self._scale()
        offset = self._offset(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        if not self.is_analyze and (intent := int(fields["intent_code"])) not in (0, 2001):
            self.notes.append(f"its header says that it is no scan but {_intent(fields, intent)}")
        return VolumeHeader(
            shape=shape,
            spacing=tuple(voxel_sizes(affine).tolist()),
            affine=affine,
            dtype=dtype,
            offset=offset,
            slope=slope,
            intercept=intercept,
            code=code,
            compressed=self.compressed,
            data=self.data,
            warnings=tuple(self.notes),
        )

    def _refuse(self, reason: str, remedy: str = AGAIN) -> UnusableVolume:
        return UnusableVolume(self.path, reason, remedy)

    # --- what kind of header ------------------------------------------------------------------------------------------

    def _parse(self, block: bytes) -> Any:
        no_nifti = self._refuse("not a NIfTI file (wrong magic number)", "check what was downloaded; fetch it again")
        is_second = block[4:7] in (b"n+2", b"ni2")
        magic = block[4:7] if is_second else block[344:347]
        kind: Any = nib.Nifti2Header if is_second else nib.Nifti1Header
        size = kind.template_dtype.itemsize
        if len(block) < size:
            raise self._refuse(f"truncated: {len(block)} bytes, less than a NIfTI header", "fetch it again")
        order = next((o for o in ("little", "big") if int.from_bytes(block[:4], o) == size), None)
        if magic not in (b"n+1", b"ni1", b"n+2", b"ni2"):
            if not (self.is_pair and order and magic.strip(b"\0 ") == b""):
                raise no_nifti
            kind = nib.Spm2AnalyzeHeader
        if order is None:
            # nifti1.h: the byte order is the one in which dim[0] is from 1 to 7.
            place, width = (16, 8) if is_second else (40, 2)
            dimensions = block[place : place + width]
            order = next((o for o in ("little", "big") if 1 <= int.from_bytes(dimensions, o) <= 7), None)
            if order is None:
                raise no_nifti
            self.notes.append(f"its header's size (sizeof_hdr) should be {size}")
        if magic.startswith(b"ni") and not self.is_pair:
            raise self._refuse(
                "the header of a pair without its voxels", "name it .hdr, with its .img beside it; or convert it again"
            )
        return kind(block[:size], endianness="<" if order == "little" else ">", check=False)

    def _dimensions(self) -> tuple[int, ...]:
        dim = [int(n) for n in self.fields["dim"]]
        n_axes = dim[0]
        shape = dim[1 : n_axes + 1]
        if not 1 <= n_axes <= 7 or min(shape[:3]) < 1:
            raise self._refuse(f"impossible dimensions {dim}", "fetch it again, or convert it again")
        if n_axes > 3 and min(shape) < 1:
            self.notes.append(f"dimensions {dim}: axes of no length were taken as 1")
            shape = [max(1, n) for n in shape]
        pixdim = np.asarray(self.fields["pixdim"][1:4], dtype=float)
        if not np.isfinite(pixdim).all() or (pixdim[: min(n_axes, 3)] <= 0).any():
            bad = "negative" if (pixdim < 0).any() else "zero" if (pixdim == 0).any() else "not finite"
            raise self._refuse(f"{bad} spacing {by(pixdim, ' x ')} mm in the header", f"{AGAIN}, or correct pixdim")
        return tuple(shape)

    def _voxel_type(self) -> np.dtype[Any]:
        unknown = self._refuse(f"unknown voxel type {int(self.fields['datatype'])}", "convert it again")
        try:
            dtype = self.fields.get_data_dtype()
        except Exception as error:
            raise unknown from error
        if dtype.itemsize == 0 or (dtype.kind == "V" and dtype.fields is None):
            raise unknown
        check_dtype(self.path, dtype)
        return dtype

    def _scale(self) -> tuple[float, float]:
        slope, intercept = (float(self.fields[name]) for name in ("scl_slope", "scl_inter"))
        if slope == 0 or not np.isfinite(slope):  # 0 means no scaling; NaN is how some tools write that
            if np.isinf(slope):
                self.notes.append("scl_slope is infinite: voxels were taken as they are stored")
            return 1.0, 0.0
        if not np.isfinite(intercept):
            self.notes.append(f"scl_inter is {intercept:g}, taken as 0")
            intercept = 0.0
        return slope, 0.0 if self.is_analyze else intercept

    # --- where the voxels begin ---------------------------------------------------------------------------------------

    @functools.cached_property
    def _bytes(self) -> int:
        """Length of the file of the voxels, unpacked; of gzip, it is read to its end for that."""
        if not self.compressed:
            return self.data.stat().st_size
        with open_volume(self.data) as stream:
            return sum(map(len, iter(lambda: stream.read(2**22), b"")))

    def _offset(self, n_bytes: int) -> int:
        """Where the voxels begin: where the header says, unless that cannot be and the length says where."""
        given = float(self.fields["vox_offset"])
        least = 0 if self.is_pair else self.fields.template_dtype.itemsize + 4
        told = int(given) if np.isfinite(given) and given >= least and given == int(given) else None
        width = int(self.fields["bitpix"])
        if width != self.fields.get_data_dtype().itemsize * 8:
            kind = self.fields.get_data_dtype().newbyteorder("=")
            if told is None or self._bytes != told + n_bytes:
                raise self._refuse(f"contradictory voxel type: {kind} of {width} bits (bitpix)")
            self.notes.append(f"bitpix is {width}, but voxels are {kind}")
        if told is not None:
            if self.trusts_length or self._bytes == told + n_bytes:
                return told
            if self._bytes > told + n_bytes:
                return self._after_extensions(told, n_bytes)
            if not self.is_pair:
                raise too_short(self.path, self._bytes, told + n_bytes, told)
        # The header's own place is impossible: the voxels fill the file's end, right after header and extensions.
        start = self._bytes - n_bytes
        places = [0] if self.is_pair else [least, least - 4, self._extensions_end()]
        if start in places:
            self.notes.append(f"vox_offset is {given:g}: voxels were read from byte {start}, which the length fits")
            return start
        if told is not None:
            raise too_short(self.data, self._bytes, told + n_bytes, told)
        raise self._refuse(
            f"vox_offset is {given:g}, before the end of the header, and {start} bytes precede {n_bytes} of voxels"
        )

    def _after_extensions(self, told: int, n_bytes: int) -> int:
        """The offset in the header, for a file that is longer than it says."""
        end = self._extensions_end()
        extra = self._bytes - told - n_bytes
        if end == told + extra:
            self.notes.append(f"vox_offset is {told}, within an extension: voxels were read from byte {end}")
            return end
        repeats = int(np.prod([max(1, int(n)) for n in self.fields["dim"][int(self.fields["dim"][0]) + 1 :]]))
        if extra == n_bytes * (repeats - 1):
            raise self._refuse(
                f"{repeats} volumes in one file, although dim[0] says {int(self.fields['dim'][0])}-D",
                "give one 3-D volume (split it, or take the mean or the first)",
            )
        self.notes.append(f"the file has {extra:,} bytes more than its header says: the dimensions may be wrong")
        return told

    def _extensions_end(self) -> int:
        """Where the extensions of a single file end, by their own sizes."""
        place = self.fields.template_dtype.itemsize + 4
        order: Literal["little", "big"] = "little" if self.fields.endianness == "<" else "big"
        with open_volume(self.data) as stream:
            stream.seek(place - 4)
            if self.is_pair or stream.read(1) in (b"", b"\0"):
                return place
            for _ in range(1000):
                stream.seek(place)
                size = int.from_bytes(stream.read(4), order)
                if size < 16 or size % 16 or place + size > self._bytes:
                    break
                place += size
        return place

    # --- where the volume lies ----------------------------------------------------------------------------------------

    def _place(self, shape: tuple[int, ...], assume_orientation: str | None) -> tuple[np.ndarray, int]:
        """Affine in mm, and its code."""
        shape = (*shape, 1, 1, 1)[:3]
        pixdim = np.asarray(self.fields["pixdim"][1:4], dtype=float)
        codes = {}
        for name in ("sform_code", "qform_code"):
            codes[name] = 0 if self.is_analyze else int(self.fields[name])
            if not 0 <= codes[name] <= 5:
                taken = "no such transform" if codes[name] < 0 else "a transform of unknown meaning"
                self.notes.append(f"{name} is {codes[name]}, taken as {taken}")
                codes[name] = 0 if codes[name] < 0 else 2
        if codes["sform_code"] == codes["qform_code"] == 0:
            if self.is_analyze and (affine := self._spm_affine()) is not None:
                return affine, 2
            if assume_orientation is None:
                raise self._refuse(
                    "no orientation: it is Analyze 7.5, which knows no left and right"
                    if self.is_analyze
                    else "no orientation: neither sform nor qform is set, so left and right are not known",
                    NO_ORIENTATION,
                )
            scale = self._to_mm(pixdim)
            return assumed_affine(assume_orientation, shape, pixdim * scale), 1
        sform = self.fields.get_sform() if codes["sform_code"] else None
        qform, problem = self._qform() if codes["qform_code"] else (None, None)
        if sform is None:
            if qform is None:
                raise self._refuse(str(problem))
            affine, code = qform, codes["qform_code"]
        else:
            affine, code = np.asarray(sform, dtype=float), codes["sform_code"]
            if (reason := unusable_axes(affine)) is not None and qform is not None and unusable_axes(qform) is None:
                raise self._refuse(reason, f"{AGAIN}; or, since its qform is sound, set its sform_code to 0")
            if problem:
                self.notes.append(f"{problem}; the sform was taken")
        scale = self._to_mm(voxel_sizes(affine))
        to_mm = np.diag([scale, scale, scale, 1.0])
        with np.errstate(invalid="ignore", over="ignore"):  # what is no number is refused by its name
            affine = to_mm @ affine
        if unusable_axes(affine) is None:
            self._compare(
                affine, None if sform is None or qform is None else to_mm @ qform, pixdim * scale, shape, codes
            )
        return affine, code

    def _to_mm(self, spacing: np.ndarray) -> float:
        """Factor from the header's unit to mm; where the unit cannot be true, 1."""
        unit = 0 if self.is_analyze else int(self.fields["xyzt_units"]) & 7
        factor = _MM.get(unit, 1.0)
        if factor == 1.0 or not np.isfinite(spacing).all():
            return 1.0
        if plausible(spacing * factor):
            self.notes.append(f"its unit is {_UNITS[unit]} (xyzt_units): turned into mm")
            return factor
        self.notes.append(f"its unit is {_UNITS[unit]} by xyzt_units, which cannot be right: read as mm")
        return 1.0

    def _qform(self) -> tuple[np.ndarray | None, str | None]:
        """The qform as nifti1_io.c computes it, or why there is none."""
        factor = float(self.fields["pixdim"][0])
        if factor not in (-1.0, 1.0):
            taken = -1.0 if factor < 0 else 1.0
            self.notes.append(f"pixdim[0] (qfac) is {factor:g}, taken as {taken:g}")
            factor = taken
        vector = np.array([float(self.fields[f"quatern_{axis}"]) for axis in "bcd"])
        offset = np.array([float(self.fields[f"qoffset_{axis}"]) for axis in "xyz"])
        if not np.isfinite(vector).all() or not np.isfinite(offset).all():
            return None, "qform with NaN or Inf"
        rest = 1.0 - float(vector @ vector)
        if rest < -0.01:
            return None, f"qform without a rotation (its quaternion has the length {np.sqrt(1 - rest):.3g})"
        if rest < 1e-7:
            vector = vector / np.linalg.norm(vector)
            rest = 0.0
        affine = np.eye(4)
        rotation = nib.quaternions.quat2mat([np.sqrt(rest), *vector])
        affine[:3, :3] = rotation * (np.asarray(self.fields["pixdim"][1:4], dtype=float) * [1, 1, factor])
        affine[:3, 3] = offset
        return affine, None

    def _compare(
        self,
        affine: np.ndarray,
        qform: np.ndarray | None,
        pixdim: np.ndarray,
        shape: tuple[int, ...],
        codes: dict[str, int],
    ) -> None:
        """Note where qform, sform and voxel size contradict each other."""
        if qform is not None and (difference := describe_difference(qform, affine, shape)):
            self.notes.append(
                f"qform (code {codes['qform_code']}) and sform (code {codes['sform_code']}) disagree: {difference}; "
                "the sform was taken"
            )
        elif qform is None and codes["sform_code"]:
            spacing = voxel_sizes(affine)
            if not same_size(spacing, pixdim):
                self.notes.append(
                    f"pixdim says voxels of {by(pixdim)} mm, the sform {by(spacing)} mm; the sform was taken"
                )
        if np.array_equal(affine[:3, :3], np.diag(np.diag(affine[:3, :3]))) and not affine[:3, 3].any():
            self.notes.append("its affine is voxel sizes without a position: the orientation may be made up")

    def _spm_affine(self) -> np.ndarray | None:
        """The affine of the .mat file that SPM keeps beside an Analyze pair; None where there is none."""
        if not _spm_matrix(self.data).is_file():
            return None
        self.notes.append("orientation from SPM's .mat file")
        affine = nib.Spm2AnalyzeImage.from_filename(self.data).affine
        return None if affine is None else np.asarray(affine, dtype=float)


def _intent(fields: Any, code: int) -> str:
    try:
        return str(fields.get_intent()[0])
    except Exception:
        return f"of intent {code}"
