# SPDX-License-Identifier: Apache-2.0
"""Scans that a user gives the commands: patterns are expanded, DICOM series converted, bad scans named or left out."""

from __future__ import annotations

import filecmp
import glob
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import joblib
from tqdm import tqdm

from volta_components.data.checks import check_volumes
from volta_components.data.datalist import load_datalist
from volta_components.data.layouts.common import Finding, LayoutOptions
from volta_components.data.layouts.dicom import read as read_dicom
from volta_components.data.layouts.series import convert_series, may_be_dicom
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import volume_suffix
from volta_components.errors import InputError
from volta_components.files import partial_prefix, read_json, remove_partials, write_json
from volta_components.inference.scans import (
    Row,
    bad_scans,
    check_outside,
    is_datalist,
    look_through,
    unusable_scans,
    who_and_when,
)

CONVERTED = "converted"


def expand_source(source: Sequence[Path | str], target: Path) -> list[Path]:
    """What the user gave, patterns expanded; all of it is there, and the output is not among it."""
    parts: list[Path] = []
    missing: list[tuple[str]] = []
    for given in map(Path, source):
        is_there = given.exists() or given.is_symlink()
        found = [given] if is_there else [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]  # noqa: PTH207
        parts += [path.absolute() for path in found]
        if not found:
            missing.append((str(given),))
    if missing or not parts:
        raise InputError.many(
            f"{len(missing)} of the given sources are not there",
            missing or [("(none)",)],
            "Give a folder, a scan, a datalist.json, or a pattern in quotes, with --source.",
        )
    for part in parts:
        if part.is_dir():
            check_outside(part, target, "--output")
    return list(dict.fromkeys(parts))


def choose_scans(
    parts: Sequence[Path],
    target: Path,
    skip_bad: bool,
    assume_orientation: str | None = None,
    follow_links: bool = False,
) -> list[Path]:
    """Datalists as they are, and every scan that can be used; DICOM series are converted into ``target``.

    Raises:
        InputError: listing all scans that cannot be used; if no scan is left; if a datalist's volume is bad.
    """
    datalists = [part for part in parts if is_datalist(part)]
    found = [_scans_of(part, target, follow_links) for part in parts if part not in datalists]
    # The same file under the same name, by whatever links, is one scan. Of links in a circle, Path.resolve raises.
    files = list({(f.name, os.path.realpath(f)): f for scans, _ in reversed(found) for f in reversed(scans)}.values())
    files.reverse()
    rows = [row for _, bad in found for row in bad]
    count = len(files) + len(rows)
    for datalist in datalists:
        check_volumes(load_datalist(datalist), deep=True)
    rows += unusable_scans(files, assume_orientation)
    if rows and not skip_bad:
        raise bad_scans(rows, count)
    if rows:
        print(InputError.many(f"{len(rows)} of {count} scans are left out", rows, ""), file=sys.stderr)
    bad_files = {row[0] for row in rows}
    usable = [path for path in files if str(path) not in bad_files]
    if not datalists and not usable:
        raise InputError("no scan is left; see the list above")
    _tell_guesses(who_and_when(usable)[1])
    return [*datalists, *usable]


def _tell_guesses(guesses: Sequence[Finding]) -> None:
    if guesses:
        told = [(finding.subject, finding.file, finding.reason) for finding in guesses]
        headline = "who these scans are of is a guess (subject_id in the results' table)"
        print(str(InputError.many(headline, told, "")).rstrip(), file=sys.stderr)


def _scans_of(part: Path, target: Path, follow_links: bool) -> tuple[list[Path], list[Row]]:
    """The scans of a file or folder, and what is no scan or cannot be converted to one."""
    if not part.is_dir():
        if volume_suffix(part) is None:
            remedy = "give .nii, .nii.gz, .mgz, ...; of a pair, its .img; of DICOM, the folder"
            return [], [(str(part), "not a volume", remedy)]
        return [part], []
    tree, volumes, others, rows = look_through(part, follow_links)
    if others:
        print(f"{part}: {len(others)} volumes that are no T1w scans are left out, such as {others[0]}")
    has_dicom = any(map(may_be_dicom, tree.files))
    if not volumes and not has_dicom and not rows:
        raise InputError(f"{part}: no scans in it: no volumes (.nii, .nii.gz, .mgz, ...), no DICOM files")
    converted, bad = _convert_dicom(part, target, follow_links) if has_dicom else ([], [])
    known = {row[0] for row in rows}
    return [*converted, *volumes], [*rows, *(row for row in bad if row[0] not in known)]


def _convert_dicom(root: Path, target: Path, follow_links: bool) -> tuple[list[Path], list[Row]]:
    """Convert the T1 series below a folder to NIfTI in ``target/converted``, as ``volta3d prepare`` chooses them.

    A JSON beside each names the folder of its series: another folder's, under the same PatientID and date, is bad.
    """
    files: list[Path] = []
    remove_partials(target)
    with tempfile.TemporaryDirectory(prefix=partial_prefix(), dir=target) as name:
        temporary = Path(name)
        options = LayoutOptions(root, ("all",), "none", workers=joblib.cpu_count(), follow_links=follow_links)
        listing = read_dicom(options)
        # Volumes beside the DICOM files are no problem here.
        findings = [f for f in listing.findings if volume_suffix(Path(f.file)) is None]
        bad = [f for f in findings if f.kind == "problem" and f.left_out]
        rows = [(str(root / f.file), f"{f.subject}: {f.reason}", f.remedy) for f in bad]
        _tell_guesses([f for f in findings if f.kind == "problem" and not f.left_out])
        skipped = [f for f in findings if f.kind == "skipped"]
        for scan in tqdm(sorted(listing.scans, key=lambda scan: scan.key), unit="series", desc="converting DICOM"):
            folder = temporary / scan.key
            folder.mkdir(exist_ok=True)
            try:
                path, warnings = convert_series(scan.series, folder)
            except UnusableVolume as error:
                rows.append((str(scan.image), error.reason, error.remedy))
                continue
            for warning in warnings:
                tqdm.write(f"{scan.key}: {warning}", file=sys.stderr)
            place = target / CONVERTED / f"{scan.key}.nii"
            place.parent.mkdir(exist_ok=True)
            # The same volume as before stays, and with it what was made of it.
            if not place.is_file() or not filecmp.cmp(path, place, shallow=False):
                origin, folder = place.with_suffix(".json"), str(scan.image.absolute())
                other = read_json(origin)["source"] if place.is_file() and origin.is_file() else folder
                if other != folder:
                    reason = f"{scan.key}: another scan of this name is in {other}"
                    rows.append((folder, reason, f"give each an --output of its own, or remove {place}"))
                    continue
                write_json(origin, {"source": folder})
                path.replace(place)
            files.append(place)
    print(f"{root}: {len(files)} T1 series converted to {target / CONVERTED}, {len(skipped)} other series skipped")
    for finding in skipped[:20]:
        print(f"  {finding.subject}  {finding.reason}")
    return files, rows
