# SPDX-License-Identifier: Apache-2.0
"""Finds, checks and converts the scans that a user gives."""

from __future__ import annotations

import filecmp
import glob
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from tqdm import tqdm

from volta_components.data.datalist import check_volumes, load_datalist
from volta_components.data.layouts.common import LayoutOptions
from volta_components.data.layouts.dicom import _dicom_folders, convert_series
from volta_components.data.layouts.dicom import read as read_dicom
from volta_components.data.preprocess import UnusableVoxels, survey
from volta_components.data.volumes import UnusableVolume, read_volume, volume_suffix
from volta_components.downstream.splits import Item
from volta_components.errors import InputError
from volta_components.files import partial_prefix, remove_partials
from volta_components.inference.bundles import split_words


def find_volumes(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> list[Item]:
    """Volumes to predict: of a folder, a datalist, a single file or a list of files.

    Args:
        source: a folder (its ``datalist.json``, or else every scan below it, see ``scans_below``), a
            ``datalist.json``, a volume, or a list of volumes.
        output: where results go; it must not lie in a folder that is searched for volumes.

    Returns:
        Items with ``image``, ``subject_id`` and ``session``; ids come from the datalist or from file names, as in BIDS.

    Raises:
        InputError: if there is nothing, a file is missing, or the output lies in the source.
    """
    if isinstance(source, (list, tuple)):
        return [item for part in source for item in find_volumes(part, output)]
    assert isinstance(source, (str, os.PathLike))
    path = Path(source)
    if (path / "datalist.json").is_file() or path.suffix == ".json":
        return [
            {key: item.get(key) for key in ("image", "subject_id", "session")} for item in load_datalist(path).items
        ]
    if path.is_dir():
        if output is not None and Path(output).resolve().is_relative_to(path.resolve()):
            raise InputError(
                f"--output_dir {output} lies in --source {path}, where the next start would take results for scans; "
                "choose a folder outside of it"
            )
        files = scans_below(path)[0]
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path}: no such folder, volume or datalist; give one with --source")
    if not files:
        raise InputError(f"{path}: no volumes in it (.nii, .nii.gz, .mgz, ...)")
    items: list[Item] = []
    for file in files:
        suffix = volume_suffix(file)
        if suffix is None:
            raise InputError(f"{file}: not a volume (.nii, .nii.gz, .mgz, ...)")
        words = file.name[: -len(suffix)].split("_")
        session = next((word for word in words if word.startswith("ses-")), None)
        subject = words[0] if words[0].startswith("sub-") else "_".join(words)
        items.append({"image": str(file), "subject_id": subject, "session": session})
    return items


def scans_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Volumes below a folder, and apart from them those that are no T1 scans by the rules of BIDS.

    Set apart are volumes in ``derivatives``, ``sourcedata`` and ``code`` beside folders ``sub-*``, and those whose name
    begins with ``sub-`` and ends in another word than ``T1w`` (``sub-01_dseg.nii.gz``). Any other name is a scan's.

    Args:
        folder: a BIDS data set, a part of one, or a folder of anything else.

    Returns:
        Scans, and the volumes set apart, in order of their paths.
    """
    scans: list[Path] = []
    others: list[Path] = []
    aside = ("derivatives", "sourcedata", "code") if any(folder.glob("sub-*/")) else ()
    for path in sorted(folder.rglob("*")):
        suffix = volume_suffix(path)
        if suffix is None or not path.is_file():
            continue
        words = path.name[: -len(suffix)].split("_")
        is_other = words[0].startswith("sub-") and "-" not in words[-1] and words[-1] != "T1w"
        (others if is_other or path.relative_to(folder).parts[0] in aside else scans).append(path)
    return scans, others


def result_root(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str:
    """Where the folders of results begin (``SaveImaged``'s ``data_root_dir``).

    Results have the names of their scans. Where these are unique the folder does not matter; where they are not, as
    FreeSurfer's ``T1.mgz`` are, results lie in folders like those of the scans.

    Args:
        source: see ``find_volumes``.

    Returns:
        The scans' common folder where names clash, otherwise an empty text; also where there are no scans.

    Raises:
        InputError: if two scans of one folder have the same name up to the suffix.
    """
    try:
        paths = [Path(str(item["image"])).absolute() for item in find_volumes(source)]
    except InputError:
        return ""
    stems = [path.with_name(path.name[: -len(volume_suffix(path) or "")]) for path in paths]
    counts = Counter(stems)
    if twice := sorted(str(path) for path, stem in zip(paths, stems, strict=True) if counts[stem] > 1):
        raise InputError.many(
            "results of these scans would have the same name", [(path,) for path in twice], "Leave out one of each."
        )
    if len({stem.name for stem in stems}) == len(stems):
        return ""
    return os.path.commonpath([path.parent for path in paths])


# File, what is wrong with it, and what to do.
Row = tuple[str, str, str]


CONVERTED = "converted"


REMEDY = "Mend or fetch them again, give a narrower --source (such as 'scans/*_T1w.nii.gz'), or add --skip-bad."


def check_source(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], deep: bool = True) -> None:
    """Check every volume that a config's ``source`` names, before long work starts.

    Args:
        source: see ``volta_components.inference.scans.find_volumes``.
        deep: of a datalist, read voxels and compare hashes; scans without a datalist are always read.

    Raises:
        InputError: listing every bad file with its reason.
    """
    files: list[Path] = []
    for part in [source] if isinstance(source, (str, os.PathLike)) else source:
        if _is_datalist(Path(part)):
            check_volumes(load_datalist(part), deep=deep)
        else:
            files += [Path(str(item["image"])) for item in find_volumes(part)]
    if rows := unusable_scans(files):
        raise _bad_scans(rows, len(files))


def prepared_grid(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    spacing: float | Sequence[float],
    shape: Sequence[int],
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The grid that a network sees volumes on: a datalist's own, otherwise the one that scans are prepared to.

    Args:
        source: see ``volta_components.inference.scans.find_volumes``.
        spacing: of scans that are prepared on the way, mm, one number or three.
        shape: of the same, voxels.

    Returns:
        Spacing and shape, three numbers each.

    Raises:
        InputError: if the parts of the source do not have one grid.
    """
    given = (tuple(np.broadcast_to(np.asarray(spacing, float), 3).tolist()), tuple(int(side) for side in shape))
    grids: dict[Any, str] = {}
    for part in [source] if isinstance(source, (str, os.PathLike)) else source:
        grid: Any = given
        if _is_datalist(Path(part)):
            datalist = load_datalist(part)
            grid = (tuple(map(float, datalist.spacing)), tuple(datalist.shape))
        grids.setdefault(grid, str(part))
    if len(grids) > 1:
        rows = [
            (name, "x".join(f"{mm:g}" for mm in g[0]) + " mm", "x".join(map(str, g[1]))) for g, name in grids.items()
        ]
        raise InputError.many("sources on different grids", rows, "Give them one after the other.")
    return next(iter(grids), given)


def unusable_scans(files: Sequence[Path], workers: int | None = None) -> list[Row]:
    """Read every scan once, with a progress bar.

    Args:
        files: volumes of any format.
        workers: threads, a scan in memory each; the number of cores by default.

    Returns:
        File, reason and remedy of each that cannot be used.
    """

    def examine(path: Path) -> Row | None:
        try:
            if not survey(read_volume(path)).foreground.any():
                return str(path), "nothing stands out from the background", "look at it; it may hold no head"
        except UnusableVolume as error:
            return str(path), error.reason, error.remedy
        except UnusableVoxels as error:
            return str(path), error.reason, error.remedy
        except OSError as error:
            return str(path), error.strerror or str(error), "check the disk and the permissions"
        except MemoryError:
            return str(path), "does not fit in memory", "check the file's dimensions"
        return None

    with ThreadPoolExecutor(workers or joblib.cpu_count()) as pool:
        rows = list(tqdm(pool.map(examine, files), total=len(files), unit="scan", desc="reading", disable=not files))
    return [row for row in rows if row is not None]


def _bad_scans(rows: Sequence[Row], count: int) -> InputError:
    return InputError.many(f"{len(rows)} of {count} scans cannot be used", rows, REMEDY)


def _is_datalist(path: Path) -> bool:
    return path.suffix == ".json" or (path / "datalist.json").is_file()


def expand_source(source: str | Sequence[str], target: Path) -> list[Path]:
    """What the user gave, patterns expanded; all of it is there, and the output is not among it."""
    parts: list[Path] = []
    missing: list[tuple[str]] = []
    for given in [source] if isinstance(source, (str, int, float)) else source:
        text = str(given)
        for word in [text] if Path(text).expanduser().exists() else split_words(text):
            path = Path(word).expanduser()
            found = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            parts += [path.absolute() for path in found]
            if not found:
                missing.append((word,))
    if missing or not parts:
        raise InputError.many(
            f"{len(missing)} of the given sources are not there",
            missing or [("(none)",)],
            "Give a folder, a scan, a datalist.json, or a pattern in quotes, with --source.",
        )
    for part in parts:
        if part.is_dir() and part.resolve() in (target, *target.parents):
            raise InputError(
                f"--output {target} lies in --source {part}, where the next start would take results for scans; choose "
                "a folder outside of it"
            )
    return list(dict.fromkeys(parts))


def choose_scans(parts: Sequence[Path], target: Path, skip_bad: bool) -> list[Path]:
    """Datalists as they are, and every scan that can be used; what cannot be is named in one list."""
    datalists = [part for part in parts if _is_datalist(part)]
    files: list[Path] = []
    rows: list[Row] = []
    for part in parts:
        if part in datalists:
            continue
        if part.is_file():
            files.append(part)
            continue
        volumes, others = scans_below(part)
        if others:
            print(f"{part}: {len(others)} volumes that are no T1w scans are left aside, such as {others[0]}")
        if series := _dicom_folders(part):
            converted, bad = _convert(part, target)
            files += converted
            rows += bad
        if not volumes and not series:
            raise InputError(f"{part}: no scans in it: no volumes (.nii, .nii.gz, .mgz, ...), no DICOM files")
        files += volumes
    files = list(dict.fromkeys(files))
    strange = [path for path in files if volume_suffix(path) is None]
    rows += [(str(path), "not a volume", "give .nii, .nii.gz, .mgz, ...; of DICOM, the folder") for path in strange]
    count = len(files) + len(rows) - len(strange)
    files = [path for path in files if path not in strange]
    for datalist in datalists:
        check_volumes(load_datalist(datalist), deep=True)
    rows += unusable_scans(files)
    if rows and not skip_bad:
        raise _bad_scans(rows, count)
    if rows:
        print(InputError.many(f"{len(rows)} of {count} scans are left out", rows, ""), file=sys.stderr)
    bad_files = {row[0] for row in rows}
    chosen = [*datalists, *(path for path in files if str(path) not in bad_files)]
    if not chosen:
        raise InputError("no scan is left; see the list above")
    return chosen


def _convert(root: Path, target: Path) -> tuple[list[Path], list[Row]]:
    """Convert the T1 series below a folder to NIfTI in ``target/converted``, as ``volta3d prepare`` chooses them."""
    files: list[Path] = []
    remove_partials(target)
    with tempfile.TemporaryDirectory(prefix=partial_prefix(), dir=target) as name:
        temporary = Path(name)
        options = LayoutOptions(root, ("all",), "none", temporary=temporary, workers=joblib.cpu_count())
        listing = read_dicom(options)
        rows = [
            (str(root / f.file), f.reason, f.remedy) for f in listing.findings if f.kind == "problem" and f.left_out
        ]
        skipped = [finding for finding in listing.findings if finding.kind == "choice"]
        for scan in tqdm(sorted(listing.scans, key=lambda scan: scan.key), unit="series", desc="converting DICOM"):
            folder = temporary / scan.key
            folder.mkdir(exist_ok=True)
            try:
                path, warnings = convert_series(scan.image, str(scan.series), folder)
                if min(read_volume(path).voxels.shape) < 8:
                    raise UnusableVolume(scan.image, "fewer than 8 slices", "download the series again")
            except UnusableVolume as error:
                rows.append((str(scan.image), error.reason, error.remedy))
                continue
            for warning in warnings:
                tqdm.write(f"{scan.key}: {warning}", file=sys.stderr)
            place = target / CONVERTED / f"{scan.key}.nii"
            place.parent.mkdir(exist_ok=True)
            # The same volume as before stays, and with it what was made of it.
            if not place.is_file() or not filecmp.cmp(path, place, shallow=False):
                path.replace(place)
            files.append(place)
    print(f"{root}: {len(files)} T1 series converted to {target / CONVERTED}, {len(skipped)} other series skipped")
    for finding in skipped[:20]:
        print(f"  {finding.subject}  {finding.reason}")
    return files, rows


def set_folders(parser: Any, items: Sequence[Mapping[str, Any]]) -> None:
    """Give results the folders of their scans where file names alone would clash, as FreeSurfer's ``T1.mgz`` do."""
    paths = [Path(str(item["image"])).absolute() for item in items]
    stems = [path.name[: -len(volume_suffix(path) or "")] for path in paths]
    twice = {str(path.parent / stem) for path, stem in zip(paths, stems, strict=True)}
    if len(twice) < len(paths):
        counts = Counter(path.parent / stem for path, stem in zip(paths, stems, strict=True))
        rows = [(str(p),) for p, s in zip(paths, stems, strict=True) if counts[p.parent / s] > 1]
        raise InputError.many("results of these scans would have the same name", rows, "Leave out one of each.")
    if len(set(stems)) == len(stems):
        return
    top = os.path.commonpath([path.parent for path in paths])
    for name in ("postprocessing", "handlers"):
        block = parser.get(name, [])
        for part in block.get("transforms", []) if isinstance(block, dict) else block:
            kind = str(part.get("_target_", "")) if isinstance(part, dict) else ""
            if kind.endswith("SaveImaged"):
                part["data_root_dir"] = top
            elif kind.endswith("EmbeddingTable"):
                part["root"] = top
    print(f"file names are not unique: results lie in folders like those of the scans below {top}")
