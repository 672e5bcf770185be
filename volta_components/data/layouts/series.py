# SPDX-License-Identifier: Apache-2.0
"""Series of DICOM images: what the files of a folder hold, whether a series is whole, and its conversion to NIfTI.

``pydicom`` reads the headers and ``dcm2niix`` converts. The headers are read here and not by ``dcm2niix``, since that
takes a folder for a unit: a series in two folders, a copy of an image and a gap between slices could not be told.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from volta_components.data.unusable import UnusableVolume, missing_content
from volta_components.data.volumes import NIFTI_SUFFIXES, read_volume
from volta_components.errors import InputError

_SUFFIXES = {".dcm", ".ima", ".dicom", ".dic"}
_WARNINGS = re.compile(r"missing|interslice|gap|inconsisten|not stacked|slice(s)? (order|distance)", re.IGNORECASE)
_FACTS = """
SeriesDescription ProtocolName SequenceName PulseSequenceName ImageType Modality SeriesNumber MRAcquisitionType
SliceThickness SpacingBetweenSlices PixelSpacing ScanningSequence SequenceVariant EchoTime InversionTime
ContrastBolusAgent PatientID PatientName PatientBirthDate PatientSex PatientAge StudyInstanceUID StudyDate
SeriesDate AcquisitionDate AcquisitionDateTime ContentDate
"""
# What is kept of a series' first image.
FACTS = _FACTS.split()
_PLACES = """
SOPClassUID SOPInstanceUID SeriesInstanceUID InstanceNumber ImagePositionPatient ImageOrientationPatient Rows Columns
BitsAllocated SamplesPerPixel NumberOfFrames SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
"""
_MR_IMAGES = {"", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"}
MIN_SLICES = 8


@dataclass(frozen=True)
class Image:
    """One DICOM file.

    Attributes:
        path: the file.
        series, uid: SeriesInstanceUID and SOPInstanceUID.
        patient: PatientID.
        number: InstanceNumber, or None.
        kind: ImageType and echo time: images of one series that differ in it are different volumes.
        direction: normal of the slices, rounded; empty where it is not known.
        places: where its slices lie along the normal, mm.
        size: of the file, bytes.
        pixels: rows, columns and their distances.
    """

    path: Path
    series: str
    uid: str
    patient: str
    number: int | None
    kind: str
    direction: tuple[float, ...]
    places: tuple[float, ...]
    size: int
    pixels: str = ""


@dataclass
class Folder:
    """What the files directly in a folder hold.

    Attributes:
        images: DICOM images, by file name.
        facts: of each series, out of its first image.
        damaged: files that are DICOM, or should be, and cannot be read: name and reason.
        absent: files whose content was not fetched: name and remedy.
    """

    images: list[Image] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def may_be_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its suffix or its magic word."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    if path.name == "DICOMDIR" or path.name.lower().endswith(NIFTI_SUFFIXES):
        return False
    if path.is_symlink() and not path.exists():  # git-annex, not fetched
        return not path.suffix
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_folder(files: Sequence[Path]) -> Folder:
    """Read the headers of DICOM files; whatever is wrong with one is kept beside the others."""
    import pydicom

    folder = Folder()
    for path in sorted(files):
        try:
            if (not path.exists() or path.stat().st_size < 1024) and (why := missing_content(path)):
                folder.absent[path.name] = why[1]
                continue
            with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
                tags = [*FACTS, *_PLACES.split()]
                data = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=tags)
                _add(folder, path, data, stream.tell())
        except OSError as error:
            folder.damaged[path.name] = f"cannot be read ({error.strerror or error})"
        except Exception as error:  # pydicom raises anything at damaged files
            folder.damaged[path.name] = f"not a readable DICOM file ({type(error).__name__})"
    return folder


def _add(folder: Folder, path: Path, data: Any, start: int) -> None:
    """Add a file to what a folder holds, by its header; its pixels begin at byte ``start``."""
    if "SeriesInstanceUID" not in data:
        folder.damaged[path.name] = "no series in its header"
        return
    if "Rows" not in data:
        if str(data.get("SOPClassUID") or "") in _MR_IMAGES:
            folder.damaged[path.name] = "truncated: its header ends early"
        return  # otherwise a report, a presentation state, raw data
    frames = int(data.get("NumberOfFrames") or 1)
    syntax = getattr(data, "file_meta", {}).get("TransferSyntaxUID")
    uncompressed = not getattr(syntax, "is_compressed", True) and not getattr(syntax, "is_deflated", True)
    pixels = frames * int(data.Rows) * int(data.Columns) * int(data.get("BitsAllocated") or 8) // 8
    size = path.stat().st_size
    if not pixels:
        folder.damaged[path.name] = f"no pixels: {data.Rows} rows, {data.get('Columns')} columns"
        return
    if uncompressed and size - start < pixels:
        folder.damaged[path.name] = f"truncated: {max(size - start, 0):,} of {pixels:,} bytes of pixels"
        return
    facts = {name: _plain(data.get(name)) for name in FACTS if data.get(name) not in (None, "")}
    if spacing := _of_frame(data, _frames(data)[0], "PixelMeasuresSequence", "PixelSpacing"):
        facts["PixelSpacing"] = _plain(spacing)
    direction, places = _geometry(data)
    kind = "/".join([*map(str, facts.get("ImageType") or []), str(facts.get("EchoTime", ""))])
    number = None if data.get("InstanceNumber") is None else int(data.InstanceNumber)
    series, uid = str(data.SeriesInstanceUID), str(data.get("SOPInstanceUID") or path)
    patient = str(data.get("PatientID") or "").strip()
    grid = f"{data.Rows}x{data.Columns} of {facts.get('PixelSpacing')}"
    folder.images.append(Image(path, series, uid, patient, number, kind, direction, places, size, grid))
    folder.facts.setdefault(series, facts)


def _plain(value: Any) -> Any:
    """A header's value as JSON has it."""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return [_plain(item) for item in value]
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    return str(value).strip()


def _frames(data: Any) -> Any:
    """The frames of an image of many, or the image itself."""
    return data.get("PerFrameFunctionalGroupsSequence") or [data]


def _of_frame(data: Any, frame: Any, sequence: str, value: str) -> Any:
    """A value of a frame: its own, of a group of its own, or of the group that all share; or None."""
    if value in frame:
        return frame[value].value
    for holder in (frame, (data.get("SharedFunctionalGroupsSequence") or [{}])[0]):
        if sequence in holder and len(holder[sequence].value):
            return holder[sequence].value[0].get(value)
    return None


def _geometry(data: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Normal of the slices and where they lie along it; of an image of many frames, out of each frame's own groups."""
    normals: list[np.ndarray] = []
    places = []
    for frame in _frames(data):
        axes = _of_frame(data, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
        place = _of_frame(data, frame, "PlanePositionSequence", "ImagePositionPatient")
        if axes is None or place is None:
            return (), ()
        first, second = np.asarray(axes, float).reshape(2, 3)
        normal = np.cross(first, second)
        normals.append(normal)
        places.append(float(np.dot(normal, np.asarray(place, float))))
    return (tuple(normals[0].tolist()) if np.allclose(normals, normals[0], atol=0.02) else ()), tuple(places)


def without_copies(images: Sequence[Image]) -> tuple[list[Image], list[Image]]:
    """Images once each, and copies of them: the same SOPInstanceUID and the same content.

    Anonymisers give one UID to several people, so that the UID alone does not make a copy.
    """
    kept: list[Image] = []
    copies = []
    known: dict[str, list[Image]] = {}
    for image in sorted(images, key=lambda image: (image.number or 0, str(image.path))):
        same = known.setdefault(image.uid, [])
        if any(filecmp.cmp(image.path, other.path, shallow=False) for other in same):
            copies.append(image)
        else:
            same.append(image)
            kept.append(image)
    return kept, copies


def magnitude(images: Sequence[Image]) -> list[Image]:
    """Without phase, real and imaginary images, where there are others."""
    parts = {"P", "PHASE", "R", "REAL", "I", "IMAGINARY"}
    return [image for image in images if parts.isdisjoint(image.kind.upper().split("/"))] or list(images)


def slices(images: Sequence[Image]) -> list[float]:
    """Where the slices of a series lie, mm, sorted."""
    return sorted(place for image in images for place in image.places)


def distance(images: Sequence[Image]) -> float | None:
    """Usual distance of a series' slices, mm; None where it is not known."""
    gaps = np.diff(slices(images))
    return float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else None


def why_not_whole(images: Sequence[Image], facts: dict[str, Any]) -> tuple[str, str] | None:
    """Why a series' slices are no volume: missing, uneven, doubled or of several directions; reason and remedy.

    Slices that are missing at an end leave a smaller volume, which is none the worse here. None if the slices are even.
    """
    again = "download the series again"
    places, directions = slices(images), [image.direction for image in images]
    if unknown := sum(not image.places for image in images):
        return f"{unknown} of {len(images)} images do not say where they lie (ImagePositionPatient)", again
    sides = facts.get("PixelSpacing")
    if not isinstance(sides, list) or not all(isinstance(side, float | int) and side > 0 for side in sides):
        return "the size of its pixels is not known (PixelSpacing)", again
    if len(grids := {image.pixels for image in images}) > 1:
        return f"its slices have pixels of {len(grids)} kinds ({' and '.join(sorted(grids)[:2])} mm)", again
    if len(places) < 2:
        return None
    if not all(directions) or not np.allclose(directions, directions[0], atol=0.02):
        return "its slices have several directions", "give one series for each direction"
    gaps = np.diff(places)
    usual = distance(images)
    if usual is None or (doubled := int((gaps <= 1e-3).sum())):
        if len({image.kind for image in images}) > 1:
            reason = f"{len(places)} slices of several kinds at the same places (echoes?)"
            return reason, "export them as series of their own"
        reason = f"{doubled if usual else len(places)} slices lie where others do (doubled instances)"
        return reason, f"{again}, or remove one of each"
    if (np.abs(gaps - usual) > max(0.05, 0.05 * usual)).any():
        at = int(np.argmax(gaps))
        missing = sum(round(gap / usual) - 1 for gap in gaps if gap > 1.5 * usual)
        several = f"about {missing} slices missing" if missing else "uneven distances of slices"
        return f"{several}: {gaps[at]:.2f} mm between two of {len(places)} slices, {usual:.2f} mm as a rule", again
    numbers = sorted(image.number for image in images if image.number is not None)
    steps = Counter(np.diff(numbers).tolist())
    thickness = facts.get("SpacingBetweenSlices") or facts.get("SliceThickness")
    if len(numbers) >= MIN_SLICES and isinstance(thickness, float) and thickness > 0:
        step, count = steps.most_common(1)[0]
        if step > 1 and count == len(numbers) - 1 and usual > 1.5 * thickness:
            return f"only every {step}. slice is there: {usual:.2f} mm apart, {thickness:.2f} mm thick", again
    return None


def run_dcm2niix(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Run dcm2niix on the files directly in a folder; outputs are named by series UID, identity is kept.

    Raises:
        InputError: if the program is not installed.
    """
    try:
        from dcm2niix import bin as program
    except ImportError:
        program = "dcm2niix"
    # -g i: the user's own dcm2niix defaults must not change what comes out
    options = ["-g", "i", "-ba", "n", "-d", "0", "-z", "n", "-f", "%j", "-b", "n"]
    command = [program, *options, "-o", str(output), str(folder)]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise InputError("dcm2niix is not installed; pip install dcm2niix") from error


def convert_series(files: Sequence[Path], output: Path) -> tuple[Path, list[str]]:
    """Convert one series, of files in whatever folders, to NIfTI in an empty folder.

    Returns:
        The NIfTI file; warnings of dcm2niix about missing or uneven slices.

    Raises:
        UnusableVolume: if the series does not become exactly one volume, or one of very few slices.
    """
    folder = files[0].parent
    links, made = output / "dicom", output / "nifti"
    for path in (links, made):
        path.mkdir()
    for number, path in enumerate(files):
        link = links / f"{number:06d}.dcm"
        try:
            link.symlink_to(path.resolve())
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
    done = run_dcm2niix(links, made)
    found = sorted(made.glob("*.nii"))
    found = [path for path in found if not re.search(r"_(ph|ROI|i\d{5}|real|imaginary)", path.stem)] or found
    again = "download the series again"
    if any("_Eq_" in path.stem for path in found):
        raise UnusableVolume(folder, "slices missing, or uneven distances of slices", again)
    if not found:
        raise UnusableVolume(folder, _complaint(done).replace(f"{links}{os.sep}", ""), again)
    if len(found) > 1:
        reason = f"its series becomes {len(found)} volumes (echoes, repeats, or images of several series)"
        raise UnusableVolume(folder, reason, "convert it yourself and use --layout folder")
    try:
        thin = min(read_volume(found[0]).voxels.shape)
    except UnusableVolume as error:  # the user knows the folder, not the file in between
        raise UnusableVolume(folder, error.reason, again) from error
    if thin < MIN_SLICES:
        raise UnusableVolume(folder, f"only {thin} slices: a localiser, or incomplete", again)
    lines = {line.strip() for line in done.stdout.splitlines() if line.startswith("Warning") and _WARNINGS.search(line)}
    return found[0], [f"dcm2niix: {line.removeprefix('Warning:').strip()}"[:200] for line in sorted(lines)]


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
    said = [line for line in lines if line.startswith(("Error", "Warning: File", "FileSize"))] or lines[-1:]
    return f"no volume can be made of it: dcm2niix says {said[0]!r}" if said else "no volume can be made of it"
