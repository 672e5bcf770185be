# SPDX-License-Identifier: Apache-2.0
"""What an inference config's ``source`` names: scans, their ids, their grid, and whether they can be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from tqdm.contrib.concurrent import thread_map

from volta_components.data.checks import check_volumes
from volta_components.data.datalist import load_datalist
from volta_components.data.identity import is_worldwide
from volta_components.data.layouts.brats import time_point
from volta_components.data.layouts.common import Finding, Listing, look
from volta_components.data.layouts.folder import identified, made_by_freesurfer, note_without_volume
from volta_components.data.layouts.series import may_be_dicom
from volta_components.data.names import MASKS, parse_name
from volta_components.data.survey import survey
from volta_components.data.unusable import what_is_wrong
from volta_components.data.volumes import read_volume, volume_stem, volume_suffix
from volta_components.data.walk import Tree, VolumeFile
from volta_components.downstream.splits import Item
from volta_components.errors import InputError
from volta_components.files import readable

PathLike = str | os.PathLike[str]
# A folder, a datalist, a volume, or a list of these.
Source = PathLike | Sequence[PathLike]
# File, what is wrong with it, and what to do.
Row = tuple[str, str, str]


def parts_of(source: Source) -> list[Path]:
    """The folders, datalists and volumes that a source names."""
    return [Path(part) for part in ([source] if isinstance(source, (str, os.PathLike)) else source)]


def is_datalist(path: Path) -> bool:
    """Whether a part of a source is a datalist, or a folder that holds one."""
    return path.suffix == ".json" or (path / "datalist.json").is_file()


def find_volumes(source: Source, output: PathLike | None = None, required: bool = True) -> list[Item]:
    """Volumes to predict.

    Args:
        source: a folder (its ``datalist.json``, or else every scan below it, see ``scans_below``), a
            ``datalist.json``, a volume, or a list of these.
        output: where results go; it must not lie in a folder that is searched for volumes.
        required: false gives nothing for what is not there, so that a config can be read without its data;
            ``check_source`` refuses it.

    Returns:
        Items with ``image``, ``subject_id``, ``session`` and, of a datalist, ``marks``; ids come from the datalist, or
        are those of ``who_and_when``.

    Raises:
        InputError: if there is nothing, a file is missing, somebody below a folder has no scan by the names, or the
            output lies in the source.
    """
    items: list[Item] = []
    plain: list[Item] = []
    for part in parts_of(source):
        if not required and not part.exists():
            continue
        if is_datalist(part):
            everyone = load_datalist(part).items
            keys = ("image", "subject_id", "session", "marks")
            items += [{key: item.get(key) for key in keys} for item in everyone]
            continue
        if part.is_dir():
            check_outside(part, output, "--output_dir")
            tree, files, _, rows = look_through(part)
            if dicom := next(filter(may_be_dicom, tree.files), None):
                rows.append((str(dicom), "DICOM", "convert it"))
            if rows:
                remedy = (
                    "Mend them, or give the scans themselves. volta3d segment and embed convert DICOM, and have "
                    "--follow-links and --skip-bad."
                )
                raise InputError.many(f"{part}: {len(rows)} files or folders in it would be left out", rows, remedy)
        elif part.is_file():
            files = [part]
        else:
            raise InputError(f"{part}: no such folder, volume or datalist; give one with --source")
        if not files:
            raise InputError(f"{part}: no volumes in it (.nii, .nii.gz, .mgz, ...)")
        for file in files:
            if volume_suffix(file) is None:
                raise InputError(f"{file}: not a volume (.nii, .nii.gz, .mgz, ...)")
            plain.append({"image": str(file)})
            items.append(plain[-1])
    names, _ = who_and_when([Path(item["image"]) for item in plain])
    for item, (subject, session) in zip(plain, names, strict=True):
        item |= {"subject_id": subject, "session": session}
    return items


def who_and_when(files: Sequence[Path]) -> tuple[list[tuple[str, str | None]], list[Finding]]:
    """Whom each scan is of, and when, by its name and folders, as ``volta3d prepare --layout folder`` takes them.

    Patients of the public data sets have their ids: ``BraTS-GLI-00005`` and ``100`` of ``BraTS-GLI-00005-100-t1n``.

    Returns:
        Subject and session of each scan; what of this is a guess.
    """
    if not files:
        return [], []
    volumes = [VolumeFile.of(file.absolute()) for file in files]
    listing = Listing("", root=Path(os.path.commonpath([volume.folder for volume in volumes])))
    found = {one.volume.path: one for one in identified(listing, volumes)}
    names = []
    for one in (found[volume.path] for volume in volumes):
        is_public = is_worldwide(one.patient) and not one.name.is_bids
        session = one.session or time_point(one.name.subject)
        names.append((one.patient if is_public else one.subject, session))
    return names, [finding for finding in listing.findings if finding.kind == "problem"]


def check_outside(folder: Path, output: PathLike | None, option: str) -> None:
    """Refuse results, given by an option, in a folder that is searched for scans."""
    if output is not None and Path(output).resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{option} {output} lies in --source {folder}, where the next start would read results as scans; "
            "choose a folder outside of it"
        )


def look_through(folder: Path, follow_links: bool = False) -> tuple[Tree, list[Path], list[Path], list[Row]]:
    """What a folder holds; its scans and other volumes (see ``scans_below``); what is passed over, and the remedy.

    Passed over is what may be a scan and is not read, and everybody of whom nothing would be read.
    """
    listing = Listing("")
    tree = look(listing, folder, follow_links)
    problems = (finding for finding in listing.findings if finding.kind == "problem")
    rows = [(str(folder / finding.file), finding.reason, finding.remedy) for finding in problems]
    scans, others = scans_below(tree)
    return tree, scans, others, rows + _without_t1(tree, scans, others) + _without_volume(tree)


def scans_below(tree: Tree) -> tuple[list[Path], list[Path]]:
    """Volumes below a folder, and apart from them those that are no T1 scans by the rules of BIDS; in order of paths.

    Set apart are volumes in ``derivatives``, ``sourcedata`` and ``code`` beside folders ``sub-*``, those whose name
    begins with ``sub-`` and ends in another word than ``T1w`` (``sub-01_dseg.nii.gz``), and those whose name ends in
    the word for another contrast or a mask (``anna_t2.nii.gz``). Any other name is a scan's.
    """
    scans: list[Path] = []
    others: list[Path] = []
    aside = tree.aside()
    made = made_by_freesurfer(tree.volumes())
    for volume in tree.volumes():
        name, top = parse_name(volume.stem), volume.path.relative_to(tree.root).parts[0]
        (others if top in aside or name.is_other or volume.path in made else scans).append(volume.path)
    return scans, others


def _without_t1(tree: Tree, scans: Sequence[Path], others: Sequence[Path]) -> list[Row]:
    """A volume of everybody below a folder who has no T1 scan by the names, with reason and remedy."""
    aside = tree.aside()
    images = [
        path
        for path in others
        if path.relative_to(tree.root).parts[0] not in aside
        and not {(name := parse_name(VolumeFile.of(path).stem)).contrast.lower(), name.subject.lower()} & MASKS
    ]
    names, _ = who_and_when([*scans, *images])
    known = {subject for subject, _ in names[: len(scans)]}
    lost = {
        subject: path
        for path, (subject, _) in zip(images, names[len(scans) :], strict=True)
        if not {subject, parse_name(subject).subject} & known  # anna_T1_brain is of anna
    }
    remedy = "name it ..._T1w if it is one, or give the file itself"
    return [(str(path), f"{subject} has no T1 scan by the names", remedy) for subject, path in lost.items()]


def _without_volume(tree: Tree) -> list[Row]:
    """Folders of people that hold neither a volume nor DICOM, with reason and remedy; see ``note_without_volume``."""
    listing = Listing("", root=tree.root)
    note_without_volume(listing, tree, identified(Listing("", root=tree.root), tree.volumes()))
    dicom = {path.relative_to(tree.root).parts[0] for path in tree.files if may_be_dicom(path)}
    lost = (f for f in listing.findings if f.kind == "problem" and f.file not in dicom)
    return [(str(tree.root / finding.file), finding.reason, finding.remedy) for finding in lost]


def result_root(source: Source) -> str:
    """Where the folders of results begin (``SaveImaged``'s ``data_root_dir``).

    Results have the names of their scans. Where these are unique the folder does not matter, and the text is empty;
    where they are not, as FreeSurfer's ``T1.mgz`` are, results are written to folders like those of the scans below
    their common one.

    Raises:
        InputError: if two scans of one folder have the same name up to the suffix.
    """
    try:
        paths = [Path(str(item["image"])).absolute() for item in find_volumes(source)]
    except InputError:
        return ""
    stems = [path.with_name(volume_stem(path)) for path in paths]
    counts = Counter(stems)
    if twice := sorted(str(path) for path, stem in zip(paths, stems, strict=True) if counts[stem] > 1):
        raise InputError.many(
            "results of these scans would have the same name", [(path,) for path in twice], "Leave out one of each."
        )
    if len({stem.name for stem in stems}) == len(stems):
        return ""
    return os.path.commonpath([path.parent for path in paths])


def check_source(source: Source, deep: bool = True, assume_orientation: str | None = None) -> None:
    """Check every volume that a config's ``source`` names (see ``find_volumes``), before long work starts.

    Scans without a datalist are read; of a datalist, voxels and hashes only if ``deep``.

    Raises:
        InputError: listing every bad file with its reason.
    """
    files: list[Path] = []
    for part in parts_of(source):
        if is_datalist(part):
            check_volumes(load_datalist(part), deep=deep)
        else:
            files += [Path(item["image"]) for item in find_volumes(part)]
    if rows := unusable_scans(files, assume_orientation):
        raise bad_scans(rows, len(files))


def prepared_grid(
    source: Source, spacing: float | Sequence[float], shape: Sequence[int]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Spacing and shape that a network sees: a datalist's own, otherwise those given, to which scans are prepared.

    Raises:
        InputError: if the parts of the source do not have one grid.
    """
    given = (tuple(np.broadcast_to(np.asarray(spacing, float), 3).tolist()), tuple(int(side) for side in shape))
    grids: dict[Any, str] = {}
    for part in parts_of(source):
        grid: Any = given
        if is_datalist(part):
            datalist = load_datalist(part, required=False)
            if not len(datalist):
                continue
            grid = (tuple(map(float, datalist.spacing)), tuple(datalist.shape))
        grids.setdefault(grid, str(part))
    if len(grids) > 1:
        rows = [
            (name, "x".join(f"{mm:g}" for mm in g[0]) + " mm", "x".join(map(str, g[1]))) for g, name in grids.items()
        ]
        raise InputError.many("sources on different grids", rows, "Give them one after the other.")
    return next(iter(grids), given)


def unusable_scans(files: Sequence[Path], assume_orientation: str | None = None) -> list[Row]:
    """Read every scan once, with a progress bar: file, reason and remedy of each that cannot be used."""

    def examine(path: Path) -> Row | None:
        if readable(str(path)) != str(path):
            return str(path), "its name is not UTF-8", f"rename it, for example to {readable(path.name)}"
        try:
            if not survey(read_volume(path, assume_orientation)).foreground.any():
                return str(path), "nothing stands out from the background", "look at it; it may hold no head"
        except Exception as error:
            return str(path), *what_is_wrong(error)
        return None

    bar = {"unit": "scan", "desc": "reading", "disable": not files}
    return list(filter(None, thread_map(examine, files, max_workers=joblib.cpu_count(), **bar)))


def bad_scans(rows: Sequence[Row], count: int) -> InputError:
    """All scans that cannot be used, in one error."""
    return InputError.many(
        f"{len(rows)} of {count} scans cannot be used",
        rows,
        "Mend or fetch them again, give a narrower --source (such as 'scans/*_T1w.nii.gz'), or add --skip-bad.",
    )
