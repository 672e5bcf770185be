# SPDX-License-Identifier: Apache-2.0
"""``volta3d prepare``: a data set as its users have it, to checked volumes and a datalist.

List the scans of a layout, choose among them, prepare each (:mod:`volta_components.data.worker`), assign folds, and
write ``datalist.json`` and the QC files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import joblib

from volta_components.data.datalist import load_datalist
from volta_components.data.finish import finish, report_nothing_left
from volta_components.data.geometry import axis_codes
from volta_components.data.identity import loose, loose_person, unfit_id, who
from volta_components.data.layouts import Layout, LayoutOptions, Listing, Scan, reader
from volta_components.data.layouts.common import relative
from volta_components.data.nifti import DTYPES
from volta_components.data.overlaps import check_folds, check_phantom_name
from volta_components.data.preprocess import Settings
from volta_components.data.skull import attach_masks
from volta_components.data.tables import KNOWN_DIAGNOSES, parse_diagnosis
from volta_components.data.worker import STATE, Task, finished, run, settled, volume_record
from volta_components.errors import InputError
from volta_components.files import FolderLock, free_bytes, read_json, write_json


def prepare(
    layout: Layout,
    source: Path | str,
    output: Path | str,
    name: str | None = None,
    spacing: float | Sequence[float] = 1.0,
    shape: Sequence[int] | None = None,
    dtype: Literal["float32", "uint16", "uint8"] = "float32",
    sessions: Sequence[str] = (),
    labels: Literal["auto", "require", "none"] | None = None,
    diagnoses: Sequence[str] = (),
    require: Sequence[Literal["sex", "age", "diagnosis", "site", "none"]] | None = None,
    exclude_patients_of: Sequence[Path | str] = (),
    table: Path | str | None = None,
    folds: int = 5,
    seed: int = 0,
    workers: int | None = None,
    shard: str | None = None,
    skip_bad: bool = False,
    strict: bool = False,
    assume_orientation: str | None = None,
    patients_from: Literal["id", "folder"] | None = None,
    mask: Path | str | None = None,
    follow_links: bool = False,
) -> int:
    """Turn a data set into volumes that the bundles read, a datalist with folds, and a QC page.

    Every scan is brought to RAS order, to one spacing and to one window (centred on the head, anchored at its top). The
    percentiles 0.5 to 99.5 of its foreground become [0, 1]. An interrupted command, started again, prepares only what
    is missing.

    Args:
        layout: How the data set is organised; "folder" is any folder of NIfTI files. See docs/data.
        source: Root of the data set.
        output: Folder of the prepared data set.
        name: Name of the cohort; by default that of the data set.
        spacing: Voxel size in mm, one number or three.
        shape: Size in voxels, three numbers; 144,192,192 by default, 160,160,160 for harp.
        dtype: Type of the voxels on disk; the integers have NIfTI's scale factor. uint8 takes a quarter of float32's
            space, with errors of up to 0.002.
        sessions: "baseline" (the first of each patient), "all", or names such as ses-M000,ses-M012. All for brats and
            harp, otherwise baseline.
        labels: "auto" takes label maps where there are some, "require" leaves out scans that have none, "none" ignores
            them. require for harp, otherwise auto.
        diagnoses: Keep only these diagnoses, such as CN,AD.
        require: Leave out scans without these values. sex for ixi, otherwise none.
        exclude_patients_of: Leave out patients of these datalists (files, or folders that hold one), whatever form
            their ids have.
        table: Table of the subjects (CSV, TSV or Excel), instead of the one of the layout.
        folds: Number of folds, split by patient, balanced over diagnosis, sex and site.
        seed: Seed of the folds.
        workers: Number of processes, each with one volume in memory; one for each core by default.
        shard: Prepare one part only: 3/8 is the third of eight. The shard that ends last writes the datalist.
        skip_bad: Accept scans that cannot be used: they are listed, and the exit status stays 0.
        strict: Leave out volumes that the QC marks.
        assume_orientation: Axis codes, such as RAS, for scans whose header has none. Without it these are errors.
        patients_from: What names a DICOM scan's patient: "id" (its PatientID) or "folder" (the first below the source).
            By default the id, or the folder where the id says nothing or several people have it, which counts as a
            problem.
        mask: Apply brain masks that exist already: "bids" for those among the derivatives of a BIDS data set, or a
            folder of masks, named after their scans as SynthStrip, HD-BET, FreeSurfer and BIDS do. "none" is the
            default.
        follow_links: Also take scans by links that leave the source. Without it these are errors; links of git-annex
            and DataLad into their data set are always followed.

    Returns:
        0; 1 if something was left out.

    Raises:
        InputError: if nothing could be prepared.
    """
    started = time.monotonic()
    masks = None if mask is None or str(mask) == "none" else str(mask)
    if masks not in (None, "bids") and not Path(str(masks)).is_dir():
        raise InputError(f"--mask {masks}: give none, bids or a folder of masks")
    settings = replace(_settings(layout, spacing, shape, dtype, assume_orientation), masked=masks is not None)
    check_folds(folds, seed)
    index, n_shards = _shard(shard)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: give a number of processes from 1")
    n_workers = workers or joblib.cpu_count()
    root, target = Path(source), Path(output)
    find = reader(layout)
    wanted_labels = labels or ("require" if layout == "harp" else "auto")
    needed = [word for word in (require or (("sex",) if layout == "ixi" and require is None else ())) if word != "none"]
    wanted_sessions = tuple(sessions) or (("all",) if layout in {"brats", "harp"} else ("baseline",))
    excluded_patients = _patients_of(exclude_patients_of)
    _check_apart(layout, root, target)
    _make_folder(target)
    state = target / STATE
    with _lock(state, index, n_shards) as temporary:
        # As JSON gives it back.
        kept = json.loads(json.dumps({"version": 1, "layout": layout, "labels": wanted_labels, **asdict(settings)}))
        _same_settings(state, kept)
        listing = find(
            LayoutOptions(
                source=root,
                sessions=wanted_sessions,
                labels=wanted_labels,
                table=Path(table) if table else None,
                name=name,
                patients=patients_from,
                work=state / "dicom",
                workers=n_workers,
                follow_links=follow_links,
            )
        )
        is_phantom = "phantom" in listing.cohort.lower()
        listing.cohort = name or listing.cohort
        _leave_out_unfit(listing)
        _note_unusual_diagnoses(listing)
        check_phantom_name(listing.cohort, is_phantom)
        scans = _select(listing, wanted_labels, needed, diagnoses, excluded_patients)
        if masks is not None:
            scans = attach_masks(listing, scans, masks, root)
        if not scans:
            report_nothing_left(target, listing)
            reasons = Counter(finding.reason for finding in listing.findings if finding.left_out)
            common = "".join(f"; {count} times: {reason}" for reason, count in reasons.most_common(3))
            raise InputError(
                f"{root}: no scan is left to prepare{common}. See the findings above; other filters (--sessions, "
                "--diagnoses, --require, --labels), or another --layout?"
            )
        tasks = [Task(scan, settings, wanted_labels != "none", root, target, temporary) for scan in scans]
        place = relative(root.resolve(), target.resolve())
        if (state / "settings.json").exists():
            _same_source(target, tasks, place)
        else:  # not earlier: a wrong start leaves a folder free
            write_json(temporary / "settings.json", {**kept, "source": place})
            (temporary / "settings.json").replace(state / "settings.json")
        mine = [task for i, task in enumerate(tasks) if i % n_shards == index]
        _check_space(target, settings, [task for task in mine if finished(task) is None])
        run(mine, n_workers)
        # Of other shards, what was made of files that have changed since is not done.
        done = ((volume_record if i % n_shards == index else settled)(task) for i, task in enumerate(tasks))
        records = [record for record in done if record is not None]
        if waiting := len(tasks) - len(records):
            print(f"shard {index + 1} of {n_shards} is done; {waiting} volumes are left to others")
            print("The last shard to end writes the datalist (so does the same command without --shard).")
            return 0
        return finish(tasks, records, listing, layout, folds, seed, skip_bad, strict, started)


# --- options ---------------------------------------------------------------------------------------------------------


def _settings(
    layout: str,
    spacing: float | Sequence[float],
    shape: Sequence[int] | None,
    dtype: str,
    assume_orientation: str | None,
) -> Settings:
    mm = [spacing] * 3 if isinstance(spacing, int | float) else list(spacing)
    if len(mm) != 3 or not all(0.2 <= s <= 10 for s in mm):
        raise InputError(f"--spacing {_joined(mm)}: one number or three, from 0.2 to 10 mm")
    voxels = shape or ([160] * 3 if layout == "harp" else [144, 192, 192])
    if len(voxels) != 3 or not all(8 <= n <= 1024 for n in voxels):
        raise InputError(f"--shape {_joined(voxels)}: three whole numbers from 8 to 1024, such as 144,192,192")
    return Settings(
        spacing=(float(mm[0]), float(mm[1]), float(mm[2])),
        shape=(voxels[0], voxels[1], voxels[2]),
        dtype=dtype,
        assume_orientation=axis_codes(assume_orientation),
    )


def _joined(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _shard(shard: str | None) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    try:
        i, n = (int(part) for part in shard.split("/"))
    except ValueError:
        raise InputError(f"--shard {shard}: write it as i/n, such as 3/8") from None
    if not 1 <= i <= n:
        raise InputError(f"--shard {shard}: i runs from 1 to n")
    return i - 1, n


def _check_apart(layout: str, source: Path, target: Path) -> None:
    """Refuse an output among the scans, where the next run would take it for scans; BIDS has derivatives/ for that."""
    inside = source.resolve() in (target.resolve(), *target.resolve().parents)
    if inside and (layout != "bids" or source.resolve() == target.resolve()):
        raise InputError(f"--output {target} lies in --source {source}; choose a folder outside of it")


def _make_folder(target: Path) -> None:
    try:
        for name in ("images", f"{STATE}/records", "qc/thumbnails"):
            (target / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target}: cannot write there ({error.strerror}); choose another --output") from error


def _same_settings(state: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to mix volumes of different settings in one folder."""
    path = state / "settings.json"
    if not path.exists():
        return
    found = {"masked": False, **read_json(path)}
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        was = ", ".join(f"{key} {found.get(key)} instead of {wanted[key]}" for key in changed)
        raise InputError(
            f"{state.parent}: holds a data set prepared with {was}; choose another --output, or delete that folder"
        )


def _same_source(target: Path, tasks: Sequence[Task], source: str) -> None:
    """Refuse another source, whose people would replace those of the first in the datalist.

    A source that was moved, or copied with its files' times, passes: what was prepared of it is kept. ``source`` is the
    way to it from the output, which settings keep in place of a path that names people and machines.
    """
    known = read_json(target / STATE / "settings.json").get("source")
    if known == source or not any((target / "images").iterdir()) or any(map(settled, tasks)):
        return
    was = "another source" if known is None else os.path.normpath(target / known)
    raise InputError(
        f"{target}: holds scans of {was}, and none of those in {tasks[0].source} now; choose another --output, "
        f"and join both with volta3d merge. If they are the same scans with other times, delete {target}: all of them "
        "would be prepared again in any case"
    )


@contextlib.contextmanager
def _lock(state: Path, index: int, n_shards: int) -> Iterator[Path]:
    """Hold this shard's lock; give its folder for temporary files, empty, and remove it at the end."""
    name = f"{index + 1}-of-{n_shards}"
    temporary = state / f"temporary-{name}"
    lock = FolderLock(state / f"lock-{name}")
    lock.take("another volta3d prepare is at work there; wait for it")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()


def _check_space(target: Path, settings: Settings, tasks: Sequence[Task]) -> None:
    per_voxel = DTYPES[settings.dtype].itemsize
    need = math.prod(settings.shape) * sum(per_voxel + bool(task.labels and task.scan.labels) for task in tasks)
    free = free_bytes(target)
    if need > free:
        raise InputError(
            f"{target}: {need / 1e9:.1f} GB are needed for {len(tasks)} volumes, {free / 1e9:.1f} GB are free; "
            "free some, choose another --output, or a smaller --dtype"
        )


# --- which scans -----------------------------------------------------------------------------------------------------


def _patients_of(paths: Sequence[Path | str]) -> dict[str, str]:
    """Patients of datalists, in any spelling, and which datalist each is from."""
    return {
        key: datalist.name
        for datalist in map(load_datalist, paths)
        for item in datalist.content["training"]
        for key in _spellings(*who(item))
    }


def _spellings(patient: str, cohort: str) -> tuple[str, str]:
    """What all spellings of an id have in common: in whatever cohort, and in this one."""
    return loose(patient), loose_person(patient, cohort)


def _leave_out_unfit(listing: Listing) -> None:
    """Leave out scans with ids that would garble tables, or that MONAI would run; each is a problem."""
    for scan in list(listing.scans):
        if unfit := unfit_id((scan.subject_id, scan.session, scan.patient_id, scan.site)):
            listing.note_scan("problem", scan, unfit, "rename it")
            listing.scans.remove(scan)


def _note_unusual_diagnoses(listing: Listing) -> None:
    """Say which diagnoses are taken as they are spelled: they count for folds, and no class may have them."""
    diagnoses = {scan.diagnosis for scan in listing.scans if scan.diagnosis is not None}
    if unusual := sorted(diagnoses - KNOWN_DIAGNOSES):
        reason = f"diagnoses that are taken as they are spelled: {', '.join(map(repr, unusual[:8]))}"
        listing.note("quirk", "(all)", listing.table.file, reason, "write them as CN, MCI, AD, ... if they mean that")


def _select(
    listing: Listing,
    labels: str,
    require: Sequence[str],
    diagnoses: Sequence[str],
    excluded_patients: Mapping[str, str],
) -> list[Scan]:
    kept = []
    wanted_diagnoses = {parse_diagnosis(word) for word in diagnoses}
    for absent in sorted(filter(None, wanted_diagnoses - {scan.diagnosis for scan in listing.scans})):
        listing.note("problem", "(all)", "", f"nobody has the diagnosis {absent}", "name one that there is", False)
    some_labels = any(scan.labels for scan in listing.scans)
    for scan in sorted(listing.scans, key=lambda scan: scan.key):
        lacking = [word for word in require if getattr(scan, word) is None]
        same = _spellings(scan.patient_id, listing.cohort)
        other = next((excluded_patients[key] for key in same if key in excluded_patients), None)
        if other is not None:
            listing.note_scan("choice", scan, f"the patient is in {other} (--exclude-patients-of)")
        elif wanted_diagnoses and scan.diagnosis not in wanted_diagnoses:
            asked = f"--diagnoses {','.join(diagnoses)}"
            if scan.diagnosis is None:
                listing.note_scan("problem", scan, f"has no diagnosis, so not taken by {asked}", "complete the table")
            elif scan.diagnosis in KNOWN_DIAGNOSES:
                listing.note_scan("choice", scan, f"diagnosis {scan.diagnosis} is not asked for", asked)
            else:
                reason = f"diagnosis {scan.diagnosis!r} is not understood, so not taken by {asked}"
                listing.note_scan("problem", scan, reason, "write it as CN, MCI, AD, ... in the table, or ask for it")
        elif lacking:
            remedy = "complete the table, or take it with --require none"
            listing.note_scan("problem", scan, f"has no {' and no '.join(lacking)}", remedy)
        elif labels == "require" and not scan.labels:
            listing.note_scan("problem", scan, "image without label", "fetch its label, or choose --labels auto")
        else:
            if labels == "auto" and some_labels and not scan.labels:
                listing.note_scan("problem", scan, "image without label", "kept unlabelled", False)
            kept.append(scan)
    return kept
