# SPDX-License-Identifier: Apache-2.0
"""``volta3d prepare``: a data set as its users have it, to checked volumes and a datalist.

List the scans of a layout, choose among them, prepare each (:mod:`volta_components.data.worker`), assign folds, and
write ``datalist.json`` and the QC files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from volta_components.data.datalist import load_datalist
from volta_components.data.finish import finish, print_findings
from volta_components.data.identity import canonical_patient_id
from volta_components.data.layouts import LayoutOptions, Listing, Scan, reader
from volta_components.data.overlaps import _check_folds, check_phantom_name
from volta_components.data.preprocess import Settings
from volta_components.data.tables import KNOWN_DIAGNOSES, parse_diagnosis
from volta_components.data.worker import DTYPES, STATE, Task, finished, read_record, run
from volta_components.errors import InputError
from volta_components.files import read_json, write_json


def prepare(
    layout: str,
    source: str,
    output: str,
    name: str | None = None,
    spacing: float | Sequence[float] = 1.0,
    shape: Sequence[int] | None = None,
    dtype: str = "float32",
    sessions: str | Sequence[str] | None = None,
    labels: str | None = None,
    diagnoses: str | Sequence[str] | None = None,
    require: str | Sequence[str] | None = None,
    exclude_patients_of: str | Sequence[str] | None = None,
    table: str | None = None,
    folds: int = 5,
    seed: int = 0,
    workers: int | None = None,
    shard: str | None = None,
    skip_bad: bool = False,
    strict: bool = False,
    assume_orientation: str | None = None,
    patients_from: str | None = None,
) -> int:
    """Turn a data set into volumes that the bundles read, a datalist with folds, and a QC page.

    Every scan is brought to RAS order, one spacing and one window (centred on the head, anchored at its top), and its
    foreground's percentiles 0.5 to 99.5 to [0, 1]. Started again after an interruption, it goes on where it was.
    Exit status: 0 done, 1 done but something was left out, 2 nothing could be done.

    Args:
        layout: bids, ixi, brats, harp, dicom or folder.
        source: root of the data set.
        output: folder of the prepared data set.
        name: of the cohort; by default that of the data set.
        spacing: target spacing in mm, one number or three.
        shape: target shape in voxels, three numbers; 144,192,192 by default, 160,160,160 for harp.
        dtype: float32, uint16 or uint8 (the last two with NIfTI's scale factor).
        sessions: baseline (the first of each patient), all, or names such as ses-M000,ses-M012; brats and harp: all.
        labels: auto (take those there are), require (leave out scans without) or none; harp: require.
        diagnoses: keep only these, such as CN,AD.
        require: leave out scans without these: sex, age, diagnosis or site, or none; ixi: sex.
        exclude_patients_of: datalists (or folders of such) whose patients are left out, whatever form their ids have.
        table: a table of subjects (CSV, TSV or Excel) instead of the layout's own.
        folds: number of folds, by patient, balanced over diagnosis, sex and site.
        seed: of the folds.
        workers: processes, one volume in memory each; the number of cores by default.
        shard: i/n, as 3/8: do only the third of eight parts; the shard that ends last writes the datalist.
        skip_bad: accept what cannot be used: it is listed, and the exit status stays 0.
        strict: leave out volumes that the QC marks.
        assume_orientation: axis codes such as RAS for scans whose header has none; otherwise these are errors.
        patients_from: who a DICOM scan is of: id (its PatientID) or folder (the first below the source). By default
            the id, and the folder where the id says nothing or is of several people, which counts as a problem.
    """
    started = time.monotonic()
    settings = _settings(layout, spacing, shape, dtype, assume_orientation)
    _check_folds(folds)
    index, n_shards = _shard(shard)
    n_workers = _workers(workers)
    root, target = Path(str(source)).expanduser(), Path(str(output)).expanduser()
    find = reader(layout)
    wanted_labels = _choice(
        "labels", labels or ("require" if layout == "harp" else "auto"), ("auto", "require", "none")
    )
    needed = _words(require) if require is not None else ("sex",) if layout == "ixi" else ()
    needed = () if needed == ("none",) else needed
    for word in needed:
        _choice("require", word, ("sex", "age", "diagnosis", "site"))
    wanted_sessions = _words(sessions) or (("all",) if layout in {"brats", "harp"} else ("baseline",))
    if patients_from is not None:
        _choice("patients-from", patients_from, ("id", "folder"))
    excluded_patients = _patients_of(_words(exclude_patients_of))
    _check_apart(layout, root, target)
    _make_folder(target)
    state = target / STATE
    with _lock(state, index, n_shards) as temporary:
        _same_settings(state, layout, settings, wanted_labels)
        listing = find(
            LayoutOptions(
                source=root,
                sessions=wanted_sessions,
                labels=wanted_labels,  # type: ignore[arg-type]
                table=Path(str(table)) if table else None,
                name=str(name) if name else None,
                patients=patients_from,  # type: ignore[arg-type]
                work=state / "dicom",
                temporary=temporary,
                workers=n_workers,
            )
        )
        cohort = str(name) if name else listing.cohort
        check_phantom_name(cohort, "phantom" in listing.cohort.lower())
        scans = _select(listing, wanted_labels, needed, _words(diagnoses), excluded_patients)
        if not scans:
            print_findings(listing.findings)
            reasons = Counter(finding.reason for finding in listing.findings if finding.left_out)
            common = "".join(f"; {count} times: {reason}" for reason, count in reasons.most_common(3))
            raise InputError(
                f"{root}: no scan is left to prepare{common}. See the findings above; other filters (--sessions, "
                "--diagnoses, --require, --labels), or another --layout?"
            )
        _keep_settings(state, temporary, layout, settings, wanted_labels)
        tasks = [Task(scan, settings, wanted_labels != "none", root, target, temporary) for scan in scans]
        mine = [task for i, task in enumerate(tasks) if i % n_shards == index]
        _check_space(target, settings, [task for task in mine if finished(task) is None], wanted_labels)
        run(mine, n_workers)
        records = [record for task in tasks if (record := read_record(task)) is not None]
        if waiting := len(tasks) - len(records):
            print(f"shard {index + 1} of {n_shards} is done; {waiting} volumes are left to others")
            print("The last shard to end writes the datalist (so does the same command without --shard).")
            return 0
        return finish(
            target,
            temporary,
            cohort,
            layout,
            settings,
            scans,
            records,
            listing,
            folds,
            seed,
            skip_bad,
            strict,
            started,
        )


# --- options ---------------------------------------------------------------------------------------------------------


def _words(value: str | Sequence[Any] | None) -> tuple[str, ...]:
    """``a,b`` or a sequence, as a tuple of words."""
    if value is None or value is False:
        return ()
    parts = str(value).split(",") if isinstance(value, str | int | float) else [str(part) for part in value]
    return tuple(part.strip() for part in parts if part.strip())


def _choice(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise InputError(f"--{option} {value}: choose one of {', '.join(allowed)}")
    return value


def _numbers(option: str, value: Any) -> list[float]:
    try:
        return [float(word) for word in (_words(value) if isinstance(value, str) else np.atleast_1d(value))]
    except (TypeError, ValueError):
        raise InputError(f"--{option} {value}: numbers are wanted, such as --{option} 1,1,1") from None


def _settings(layout: str, spacing: Any, shape: Any, dtype: str, assume_orientation: str | None) -> Settings:
    mm = _numbers("spacing", spacing)
    mm = mm * 3 if len(mm) == 1 else mm
    if len(mm) != 3 or not all(0.2 <= s <= 10 for s in mm):
        raise InputError(f"--spacing {spacing}: one number or three, from 0.2 to 10 mm")
    voxels = ([160.0] * 3 if layout == "harp" else [144.0, 192.0, 192.0]) if shape is None else _numbers("shape", shape)
    if len(voxels) != 3 or not all(8 <= n <= 1024 and n == int(n) for n in voxels):
        raise InputError(f"--shape {shape}: three whole numbers from 8 to 1024, such as 144,192,192")
    _choice("dtype", dtype, tuple(DTYPES))
    codes = None
    if assume_orientation is not None:
        codes = str(assume_orientation).upper()
        if len(codes) != 3 or any(len(set(pair) & set(codes)) != 1 for pair in ("LR", "AP", "SI")):
            raise InputError(f"--assume-orientation {assume_orientation}: three axis codes, such as RAS or LPS")
    return Settings(
        spacing=(mm[0], mm[1], mm[2]),
        shape=(int(voxels[0]), int(voxels[1]), int(voxels[2])),
        dtype=dtype,
        assume_orientation=codes,
    )


def _shard(shard: str | None) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    try:
        i, n = (int(part) for part in str(shard).split("/"))
    except ValueError:
        raise InputError(f"--shard {shard}: write it as i/n, such as 3/8") from None
    if not 1 <= i <= n:
        raise InputError(f"--shard {shard}: i runs from 1 to n")
    return i - 1, n


def _workers(workers: int | None) -> int:
    if workers is None:
        return joblib.cpu_count()
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise InputError(f"--workers {workers}: a number of processes, at least 1")
    return workers


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


def _settings_content(layout: str, settings: Settings, labels: str) -> dict[str, Any]:
    return json.loads(json.dumps({"version": 1, "layout": layout, "labels": labels, **asdict(settings)}))


def _same_settings(state: Path, layout: str, settings: Settings, labels: str) -> None:
    """Refuse to mix volumes of different settings in one folder."""
    path = state / "settings.json"
    if not path.exists():
        return
    wanted, found = _settings_content(layout, settings, labels), read_json(path)
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        was = ", ".join(f"{key} {found.get(key)} instead of {wanted[key]}" for key in changed)
        raise InputError(
            f"{state.parent}: holds a data set prepared with {was}; choose another --output, or delete that folder"
        )


def _keep_settings(state: Path, temporary: Path, layout: str, settings: Settings, labels: str) -> None:
    """Write the settings once there is something to prepare with them: a wrong start leaves a folder free."""
    if not (state / "settings.json").exists():
        write_json(temporary / "settings.json", _settings_content(layout, settings, labels))
        (temporary / "settings.json").replace(state / "settings.json")


@contextlib.contextmanager
def _lock(state: Path, index: int, n_shards: int) -> Iterator[Path]:
    """Hold this shard's lock; give its folder for temporary files, empty, and remove it at the end."""
    name = f"{index + 1}-of-{n_shards}"
    temporary = state / f"temporary-{name}"
    with (state / f"lock-{name}").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{state.parent}: another volta3d prepare is at work there; wait for it") from None
        except OSError:  # a file system without locks
            pass
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            (state / f"lock-{name}").unlink(missing_ok=True)


def _check_space(target: Path, settings: Settings, tasks: Sequence[Task], labels: str) -> None:
    per_voxel = DTYPES[settings.dtype].itemsize
    voxels = int(np.prod(settings.shape))
    need = sum(voxels * (per_voxel + (1 if task.scan.labels and labels != "none" else 0)) for task in tasks)
    free = shutil.disk_usage(target).free
    if need > free:
        raise InputError(
            f"{target}: {need / 1e9:.1f} GB are needed for {len(tasks)} volumes, {free / 1e9:.1f} GB are free; "
            "free some, choose another --output, or a smaller --dtype"
        )


# --- which scans -----------------------------------------------------------------------------------------------------


def _patients_of(paths: Sequence[str]) -> dict[str, str]:
    """Canonical patients of datalists, and which datalist each is from."""
    return {
        canonical_patient_id(item["patient_id"]): datalist.name
        for datalist in map(load_datalist, paths)
        for item in datalist.content["training"]
    }


def _select(
    listing: Listing,
    labels: str,
    require: Sequence[str],
    diagnoses: Sequence[str],
    excluded_patients: Mapping[str, str],
) -> list[Scan]:
    kept = []
    wanted_diagnoses = {parse_diagnosis(word) for word in diagnoses}
    some_labels = any(scan.labels for scan in listing.scans)
    for scan in sorted(listing.scans, key=lambda scan: scan.key):
        lacking = [word for word in require if getattr(scan, word) is None]
        if scan.patient_id in excluded_patients:
            other = excluded_patients[scan.patient_id]
            listing.note_scan("choice", scan, f"patient {scan.patient_id} is in {other} (--exclude-patients-of)")
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
