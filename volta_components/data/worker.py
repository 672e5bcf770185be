# SPDX-License-Identifier: Apache-2.0
"""One volume in one worker process, and all of them in parallel.

A volume is finished by the record that is written last (``.prepare/records/KEY.json``): image, label and thumbnail are
whole files by then, since each is written under another name and renamed. After a run is killed at any moment, the same
command resumes with the volumes that have no record, and ends with the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from volta_components.data import quality
from volta_components.data.fingerprint import fingerprint
from volta_components.data.headers import volume_files
from volta_components.data.labels import read_labels
from volta_components.data.layouts import Scan
from volta_components.data.layouts.common import relative
from volta_components.data.layouts.series import convert_series
from volta_components.data.nifti import DTYPES, nifti_header
from volta_components.data.pool import call_with_each
from volta_components.data.preprocess import Prepared, Settings, prepare_volume
from volta_components.data.skull import apply_mask
from volta_components.data.unusable import UnusableVolume, what_is_wrong
from volta_components.data.volumes import Volume, read_volume
from volta_components.data.walk import size_and_time
from volta_components.errors import InputError
from volta_components.files import read_json, readable, sha256_file

STATE = ".prepare"


@dataclass(frozen=True)
class Task:
    """One volume for one worker.

    ``temporary`` is this run's own folder for files that are not whole yet, on the output's file system.
    """

    scan: Scan
    settings: Settings
    labels: bool
    source: Path
    output: Path
    temporary: Path


def _image_files(scan: Scan) -> list[Path]:
    """The files that a scan is made of; for DICOM, those of its series; of a pair, its header too."""
    return list(scan.series) or volume_files(scan.image)


def _stamp(scan: Scan, source: Path) -> list[list[Any]]:
    """Name, size and time of each file that a volume is made from."""
    others = [*(label.path for label in scan.labels), *([scan.mask] if scan.mask else [])]
    files = [*_image_files(scan), *(file for path in others for file in volume_files(path))]
    return [[relative(path, source), *size_and_time(path)] for path in files]


def _record_name(task: Task) -> str:
    return f"{STATE}/records/{task.scan.key}.json"


# How the window of a brain without skull is placed: from 2 on, as with its head. What was prepared otherwise is redone.
PLACING = 2


def volume_record(task: Task) -> dict[str, Any] | None:
    """What is known of a volume, good or bad; None when it was not come to yet."""
    try:
        record: dict[str, Any] = read_json(task.output / _record_name(task))
    except InputError:
        return None
    return record


def finished(task: Task) -> dict[str, Any] | None:
    """The record of a volume that needs no work: prepared, from the same files, and still there."""
    record = settled(task)
    return None if record is None or "error" in record else record


def settled(task: Task) -> dict[str, Any] | None:
    """The record of a volume that needs no work, or that the same files have shown to be bad."""
    record = volume_record(task)
    if record is None or record["stamp"] != _stamp(task.scan, task.source):
        return None
    if "error" in record:
        return record
    if record["quality"]["stripped"] and record.get("placing", 1) < PLACING:
        return None
    is_whole = all(size_and_time(task.output / name)[0] == size for name, size in record["files"].items())
    return record if is_whole else None


def _write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray, code: int, slope: float = 1.0) -> str:
    """Write a NIfTI-1 file from memory, as its voxels lie; give the SHA-256 of its bytes, hashed on the way."""
    header = nifti_header(voxels, affine, code, slope)
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        planes = (np.asfortranarray(voxels[:, :, k]).T for k in range(voxels.shape[2]))
        for part in (header.binaryblock + bytes(4), *planes):
            data = part if isinstance(part, bytes) else np.ascontiguousarray(part).data
            digest.update(data)
            stream.write(data)
    return digest.hexdigest()


def _place(task: Task, name: str, write: Callable[[Path], Any]) -> Any:
    """Write a file under a name of its own in the temporary folder, then rename it to its place."""
    task.temporary.mkdir(parents=True, exist_ok=True)
    temporary = task.temporary / f"{os.getpid()}-{Path(name).name}"
    target = task.output / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _load(task: Task) -> Volume:
    scan = task.scan
    if not scan.series:
        return read_volume(scan.image, task.settings.assume_orientation)
    task.temporary.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=task.temporary) as folder:
        path, warnings = convert_series(scan.series, Path(folder))
        volume = read_volume(path)  # mapped into memory: the file may go while the voxels are in use
    return replace(volume, warnings=tuple(warnings))


def process(task: Task) -> dict[str, Any]:
    """Prepare one volume and record it; a bad one is recorded with its error, and never raises but for a full disk."""
    scan = task.scan
    record: dict[str, Any] = {"key": scan.key, "stamp": _stamp(scan, task.source)}
    try:
        record |= _prepared(task)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        file = readable(str(getattr(error, "filename", None) or scan.source))
        if isinstance(error, UnusableVolume):
            file = relative(Path(error.path), task.source)
        record["error"] = dict(zip(("file", "reason", "remedy"), (file, *what_is_wrong(error)), strict=True))
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    _place(task, _record_name(task), lambda path: path.write_text(text, encoding="utf-8"))
    return record


def _prepared(task: Task) -> dict[str, Any]:
    scan, settings = task.scan, task.settings
    volume = _load(task)
    label, label_affine = None, None
    quirks: list[tuple[str, str]] = []
    if task.labels and scan.labels:
        label, label_affine, quirks = read_labels(scan.labels, volume, scan.image, settings.assume_orientation)
    if scan.mask is not None:
        volume = apply_mask(volume, scan.mask)
    done = prepare_volume(volume, settings, label, label_affine, has_mask=scan.mask is not None)
    del volume, label
    return _write(task, done, quirks)


def _write(task: Task, done: Prepared, quirks: list[tuple[str, str]]) -> dict[str, Any]:
    scan, settings = task.scan, task.settings
    picture = quality.thumbnail(done.image, done.label)
    voxels, slope = done.image, 1.0
    if settings.dtype != "float32":
        dtype = DTYPES[settings.dtype]
        top = 2 ** (8 * dtype.itemsize) - 1
        voxels, slope = np.round(done.image * top).astype(dtype), 1 / top
    names = [f"images/{scan.key}.nii"]
    digest = _place(task, names[0], lambda path: _write_nifti(path, voxels, done.affine, done.code, slope))
    label_digest = None
    if (label := done.label) is not None:
        names.append(f"labels/{scan.key}.nii")
        label_digest = _place(task, names[1], lambda path: _write_nifti(path, label, done.affine, done.code))
    _place(task, f"qc/thumbnails/{scan.key}.png", lambda path: path.write_bytes(picture))
    hashes = [sha256_file(path) for path in _image_files(scan)]
    source_hash = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {
        "image": names[0],
        "label": None if label is None else names[1],
        "sha256": digest,
        "label_sha256": label_digest,
        "source_sha256": source_hash,
        "voxels_sha256": done.digest,
        "fingerprint": fingerprint(done.image, settings.spacing),
        "files": {name: (task.output / name).stat().st_size for name in names},
        "placing": PLACING,
        "quality": done.quality,
        "warnings": done.warnings,
        "quirks": [list(quirk) for quirk in quirks],
    }


def _watch_parent() -> None:
    """End this worker when the process that started it is gone; a killed run must not leave workers behind."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(tasks: Sequence[Task], workers: int) -> None:
    """Prepare all volumes that are not finished yet, in parallel, a few in flight a worker."""
    todo = [task for task in tasks if finished(task) is None]
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(todo), unit="volume", desc="preparing", smoothing=0.1)
    try:
        with bar:
            call_with_each(process, todo, workers, _watch_parent, bar)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker was killed, most likely because memory ran out; use fewer --workers. Started again, the same "
            "command resumes where it stopped"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{tasks[0].output}: disk full ({error.strerror}); free some space and start the same command again: "
            "what is done is kept"
        ) from error
