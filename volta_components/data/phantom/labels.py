# SPDX-License-Identifier: Apache-2.0
"""Label maps of whole heads in FreeSurfer's numbering, brought to one small set of structures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage

from volta_components.data.resample import resample
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import canonical, conversion, read_volume, volume_stem, volume_suffix, whole_numbers
from volta_components.errors import InputError

# FreeSurfer's number, left and right (the same twice where a structure has no side), of each structure.
STRUCTURES: dict[str, tuple[int, int]] = {
    "white_matter": (2, 41),
    "cortex": (3, 42),
    "lateral_ventricle": (4, 43),
    "inferior_horn": (5, 44),
    "cerebellum_white": (7, 46),
    "cerebellum_cortex": (8, 47),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "lesion": (25, 57),
    "accumbens": (26, 58),
    "ventral_diencephalon": (28, 60),
    "vessel": (30, 62),
    "choroid_plexus": (31, 63),
    "third_ventricle": (14, 14),
    "fourth_ventricle": (15, 15),
    "brainstem": (16, 16),
    "fluid": (24, 24),
    "fifth_ventricle": (72, 72),
    "hypointensity": (77, 77),
    "optic_chiasm": (85, 85),
}

# Other numbers of the same structures: parts of the choroid plexus, hypointensities of a side, parts of the corpus
# callosum, and FreeSurfer's unsegmented white matter. Cortical parcels are folded in by their ranges.
_OTHER_NUMBERS = {
    136: 31, 137: 31, 163: 63, 164: 63, 78: 2, 79: 41, 80: 77, 81: 3, 82: 42, 9: 10, 48: 49, 27: 3, 59: 42,
    **dict.fromkeys(range(251, 256), 2), 5001: 2, 5002: 41, 186: 2, 187: 41, 19: 3, 55: 42, 20: 3, 56: 42,
}  # fmt: skip
_PARCELS = (
    ((1000, 1036), 3),
    ((2000, 2036), 42),
    ((11100, 11176), 3),
    ((12100, 12176), 42),
    ((3000, 3036), 2),
    ((4000, 4036), 41),
)

# Tissues outside the brain, as the training maps of SynthSeg number them, and FreeSurfer's few.
OUTSIDE: dict[int, str] = {
    502: "other_tissue",
    506: "eye",
    507: "scalp",
    508: "optic_tissue",
    509: "mouth_and_nose",
    511: "skin",
    512: "spine",
    514: "sinus",
    515: "skull",
    516: "marrow",
    530: "other_tissue",
    165: "skull",
    258: "scalp",
    259: "skull",
    257: "fluid_outside",
}

# FreeSurfer's number of each structure within the brain, by its name with its side.
_NUMBERS = {
    name if left == right else f"{name}_{side}": number
    for name, (left, right) in STRUCTURES.items()
    for side, number in (("left", left), ("right", right))
}
# Codes that the voxels hold: 0 is air; then each structure, left and right; then the tissues outside.
NAMES: tuple[str, ...] = ("air", *_NUMBERS, *dict.fromkeys(OUTSIDE.values()))
CODES = {name: code for code, name in enumerate(NAMES)}
BRAIN_CODES = tuple(CODES[name] for name in _NUMBERS)
VENTRICLE_CODES = tuple(
    CODES[f"{name}_{side}"]
    for name in ("lateral_ventricle", "inferior_horn", "choroid_plexus")
    for side in ("left", "right")
)


def is_code(*codes: int) -> NDArray[np.bool_]:
    """``[256]`` which codes are among some; index it with voxels."""
    table = np.zeros(256, bool)
    table[list(codes)] = True
    return table


BRAIN = is_code(*BRAIN_CODES)  # the fluid around the brain is among it
TISSUE = is_code(*(code for code in BRAIN_CODES if code != CODES["fluid"]))
VENTRICLES = is_code(*VENTRICLE_CODES)
HIPPOCAMPI = ("hippocampus_left", "hippocampus_right")
_LARGEST = 15_000  # beyond all numbers that are known
_LEAST_HIPPOCAMPUS = 300.0  # mm^3; the smallest atrophied ones have about a thousand


def _translation() -> NDArray[np.uint8]:
    """Code of each FreeSurfer number; 255 where a number is not known."""
    table = np.full(_LARGEST + 1, 255, np.uint8)
    table[0] = 0
    for name, number in _NUMBERS.items():
        table[number] = CODES[name]
    for number, tissue in OUTSIDE.items():
        table[number] = CODES[tissue]
    for number, same in _OTHER_NUMBERS.items():
        table[number] = table[same]
    for (first, stop), same in _PARCELS:
        table[first:stop] = table[same]
    return table


@dataclass(frozen=True)
class LabelMap:
    """One anatomy as it is read from a file.

    Attributes:
        name: of the anatomy: the file's, without its suffix; with its folder's where FreeSurfer names all files alike.
        path: the file.
        codes: ``[X, Y, Z]`` uint8 codes of ``NAMES``, RAS, 1 mm, cropped to the head.
        digest: SHA-256 of the codes, whatever the file's format.
        notes: what was missing, unknown or changed, for the user.
    """

    name: str
    path: Path
    codes: NDArray[np.uint8]
    digest: str
    notes: tuple[str, ...] = field(default=())

    @property
    def patient_id(self) -> str:
        """Who it is, whatever the file's name: an anatomy is a patient for folds, fractions and checks for leaks."""
        return f"ANATOMY{self.digest[:12]}"

    @property
    def has_outside(self) -> bool:
        """Whether there is anything outside the brain."""
        return bool((self.codes > CODES["optic_chiasm"]).any())


def find_label_maps(folder: Path) -> dict[str, Path]:
    """Label maps in a folder and the folders in it, by the name of their anatomy.

    FreeSurfer's ``SUBJECT/mri/aseg.mgz`` is named after the subject. Of several maps in one ``mri`` folder,
    ``aparc+aseg`` comes before ``aseg``; other files there are left alone.

    Raises:
        InputError: if there are none, or two have the same name.
    """
    if not folder.is_dir():
        raise InputError(f"--anatomies {folder}: no such folder; give a folder of label maps (.nii.gz or .mgz)")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if volume_suffix(path) is None or conversion(path) or not path.is_file() or path.name.startswith("."):
            continue
        if path.parent.name == "mri":
            if volume_stem(path) in ("aparc+aseg", "aseg", "aparc.DKTatlas+aseg", "synthseg"):
                found.setdefault(path.parent.parent.name, []).append(path)
            continue
        found.setdefault(_plain_name(volume_stem(path)), []).append(path)
    if not found:
        raise InputError(
            f"--anatomies {folder}: holds no label maps; give a folder with .nii, .nii.gz or .mgz files in "
            "FreeSurfer's numbering (aseg.mgz, aparc+aseg.mgz, SynthSeg's output)"
        )
    doubles = [
        (name, *map(str, paths[:2]))
        for name, paths in found.items()
        if len(paths) > 1 and len({path.parent for path in paths}) > 1
    ]
    if doubles:
        raise InputError.many("label maps of the same name", doubles, "Rename one of each.")
    return {name: paths[0] for name, paths in sorted(found.items())}


def _plain_name(stem: str) -> str:
    """Letters, digits and single dashes, as ids of a table can have."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in stem).split()) or "anatomy"


def read_label_map(name: str, path: Path) -> LabelMap:
    """Read a label map.

    Raises:
        UnusableVolume: if it cannot be used, with reason and remedy.
    """
    volume = read_volume(path)
    values = whole_numbers(path, volume)
    if values.min() < 0:
        raise UnusableVolume(path, "holds negative numbers, so it is not a label map", "give the segmentation")
    table = _translation()
    known = table[np.minimum(values, _LARGEST)]
    notes = []
    unknown = np.unique(values[known == 255])
    if len(unknown):
        shown = ", ".join(map(str, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
        notes.append(f"unknown numbers become the structure around them: {shown}")
        share = float((known == 255).sum() / max(1, (known > 0).sum()))
        if share > 0.2:
            raise UnusableVolume(
                path,
                f"{share:.0%} of its labelled voxels have numbers that FreeSurfer does not use ({shown})",
                "give a label map in FreeSurfer's numbering",
            )
        nearest = ndimage.distance_transform_edt(known == 255, return_distances=False, return_indices=True)
        known = known[tuple(nearest)]
    upright = canonical(replace(volume, voxels=known))
    codes, changed = _to_millimetres(upright.voxels, upright.affine)
    if changed:
        notes.append(changed)
    codes = _crop(codes)
    _check(path, codes)
    missing = [
        name
        for name in _NUMBERS
        if name.rsplit("_", 1)[0] in ("white_matter", "cortex", "lateral_ventricle", "thalamus", "putamen", "caudate")
        and not (codes == CODES[name]).any()
    ]
    if missing:
        notes.append(f"no {', '.join(missing).replace('_', ' ')}")
    digest = hashlib.sha256(f"{codes.shape}".encode() + codes.tobytes()).hexdigest()
    result = LabelMap(name, path, codes, digest, tuple(notes))
    if result.has_outside:
        return result
    return replace(result, notes=(*notes, "nothing outside the brain: its heads are rendered without skull"))


def _to_millimetres(codes: NDArray[np.uint8], affine: NDArray[np.float64]) -> tuple[NDArray[np.uint8], str]:
    """Bring voxels to 1 mm, each to the structure with the largest share; and the messages for the user."""
    spacing = voxel_sizes(affine)
    if np.allclose(spacing, 1, atol=0.02):
        return codes, ""
    shape = tuple(int(n) for n in np.ceil(np.array(codes.shape) * spacing))
    source, target = np.diag([*spacing, 1.0]), from_matvec(np.eye(3), 0.5 - spacing / 2)
    best, result = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    for code in np.unique(codes):
        share = resample((codes == code).astype(np.uint8), source, target, shape, fill=float(code == 0))
        larger = share > best
        result[larger], best[larger] = code, share[larger]
    return result, f"voxels of {'x'.join(f'{side:.2g}' for side in spacing)} mm brought to 1 mm"


def _crop(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    boxes = ndimage.find_objects((codes > 0).view(np.uint8))
    return np.ascontiguousarray(codes[boxes[0]]) if boxes else codes


def _check(path: Path, codes: NDArray[np.uint8]) -> None:
    """Both hippocampi are there, large enough, and each on its own side."""
    counts = {name: int((codes == CODES[name]).sum()) for name in HIPPOCAMPI}
    gone = [name for name, count in counts.items() if not count]
    if gone:
        shown = " and ".join(f"{name.replace('_', ' ')} ({_NUMBERS[name]})" for name in gone)
        raise UnusableVolume(path, f"has no {shown}", "give a label map in FreeSurfer's numbering with both hippocampi")
    small = {name: count for name, count in counts.items() if count < _LEAST_HIPPOCAMPUS}
    if small:
        shown = " and ".join(f"{name.replace('_', ' ')} of {count} mm^3" for name, count in small.items())
        raise UnusableVolume(path, f"has a {shown}", "look at the segmentation; it failed")
    centres = [float(np.argwhere(codes == CODES[name])[:, 0].mean()) for name in HIPPOCAMPI]
    if centres[0] >= centres[1]:
        raise UnusableVolume(
            path, "has its left hippocampus on the right", "left and right are swapped: fix the file's orientation"
        )


def read_label_maps(folder: Path, leave_out: Sequence[str] = ()) -> list[LabelMap]:
    """Read the label maps of a folder, but for those that are left out.

    Raises:
        InputError: if there are none, none are left, one to leave out is not there, or some cannot be used.
    """
    found = find_label_maps(folder)
    if unknown := sorted(set(leave_out) - set(found)):
        raise InputError(f"{folder}: no anatomies {', '.join(unknown)} to leave out; there are {', '.join(found)}")
    chosen = {name: path for name, path in found.items() if name not in leave_out}
    if not chosen:
        raise InputError(f"{folder}: every anatomy is left out; leave out fewer")
    maps: list[LabelMap] = []
    bad: list[tuple[str, str, str]] = []
    for name, path in chosen.items():
        try:
            maps.append(read_label_map(name, path))
        except UnusableVolume as error:
            bad.append((name, error.reason, error.remedy))
    by_digest: dict[str, LabelMap] = {}
    for each in maps:
        if (first := by_digest.setdefault(each.digest, each)) is not each:
            bad.append((each.name, f"is the same as {first.name}", "one anatomy must have one name: remove a copy"))
    if bad:
        raise InputError.many(
            f"{len(bad)} of {len(chosen)} label maps in {folder} cannot be used",
            bad,
            "Mend them, or move them out of the folder.",
        )
    return maps
