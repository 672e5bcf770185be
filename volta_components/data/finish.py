# SPDX-License-Identifier: Apache-2.0
"""The end of ``volta3d prepare``: findings, marks, folds, datalist, QC files and the summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from volta_components.data import quality
from volta_components.data.books import Books, balance, note_look_alikes
from volta_components.data.datalist import assign_folds, make_content
from volta_components.data.identity import grouped
from volta_components.data.layouts import Finding, Listing, Scan
from volta_components.data.nifti import largest_error
from volta_components.data.volumes import read_volume
from volta_components.data.worker import Task
from volta_components.errors import InputError
from volta_components.files import write_json

_by_kind = attrgetter("kind", "subject", "file", "reason")
# What the paper used of each data set (its section II), to be read beside what was found.
PAPER_COUNTS = {
    "adni": "773 scans (CN, SMC, EMCI, LMCI, AD)",
    "brats": "1,229 scans (GLI, MET, PED)",
    "harp": "135 scans with both hippocampi",
    "ixi": "619 scans: 342 male, 277 female",
    "aibl": "420 scans: 347 healthy, 73 AD",
}
SHOWN = 30  # rows of a table of findings


def finish(
    tasks: Sequence[Task],
    records: Sequence[dict[str, Any]],
    listing: Listing,
    layout: str,
    folds: int,
    seed: int,
    skip_bad: bool,
    strict: bool,
    started: float,
) -> int:
    """Findings, marks, folds, datalist, QC files and summary; gives the exit status."""
    target, temporary, settings = tasks[0].output, tasks[0].temporary, tasks[0].settings  # the same for all
    cohort = listing.cohort
    good: list[tuple[Scan, dict[str, Any]]] = []
    for scan, record in zip((task.scan for task in tasks), records, strict=True):
        if "error" in record:
            error = record["error"]
            listing.note_scan("problem", scan, error["reason"], error["remedy"], file=error["file"])
        else:
            good.append((scan, record))
            for file, what in record["quirks"]:
                listing.note_scan("quirk", scan, _with_cross_check(listing, scan, what), file=file)
            if scan.subject_id in listing.swapped and not any("swapped" in what for _, what in record["quirks"]):
                listing.note_scan("quirk", scan, "listed as swapped, but its centroids say otherwise: left alone")
    _note_twins(listing, good)
    note_look_alikes(listing, {scan.patient_id for scan, _ in good})
    marks = quality.find_marks([{**record["quality"], "warnings": record["warnings"]} for _, record in good])
    volumes = [(scan, record, found) for (scan, record), found in zip(good, marks, strict=True)]
    if strict:
        for scan, _, found in volumes:
            if found:
                listing.note_scan("choice", scan, "; ".join(found), "marked by the QC (--strict)")
        volumes = [volume for volume in volumes if not volume[2]]
    if not volumes:
        report_nothing_left(target, listing)
        raise InputError(f"{target}: no volume could be prepared; see the findings above")
    stored = {"dtype": settings.dtype, "max_error": largest_error(settings.dtype)}
    items = [_item(scan, record, cohort, found) | stored for scan, record, found in volumes]
    fold_of = assign_folds(items, folds, seed)
    for item in items:
        item["fold"] = fold_of[item["patient_id"]]
    books = balance(listing, items)
    findings = sorted(listing.findings, key=_by_kind)
    excluded = [
        {"subject_id": f.subject, "source": f.file, "reason": f.reason, "kind": f.kind} for f in findings if f.left_out
    ]
    content = make_content(cohort, settings.spacing, settings.shape, seed, folds, items, excluded)
    problems = sum(f.kind == "problem" for f in findings)
    rows = [
        {**item, **record["quality"], "key": scan.key, "marks": found}
        for item, (scan, record, found) in zip(items, volumes, strict=True)
    ]
    summary = _summary(cohort, layout, listing, items, findings, books)
    qc, fresh = target / "qc", temporary / "qc"
    entries = [(scan.key, qc / "thumbnails" / f"{scan.key}.png", bool(found)) for scan, _, found in volumes]
    for (_, record, _), (_, picture, _) in zip(volumes, entries, strict=True):
        if not picture.exists():  # somebody has removed it
            image = read_volume(target / record["image"]).intensities
            label = read_volume(target / record["label"]).voxels if record["label"] else None
            picture.write_bytes(quality.thumbnail(image, label))
    sheets = quality.write_contact_sheets(fresh, entries)
    quality.write_table(fresh / "quality.csv", rows)
    _write_findings(fresh / "findings.csv", findings)
    quality.write_page(fresh / "index.html", f"{cohort}: prepared volumes", summary, rows, list(map(asdict, findings)))
    write_json(temporary / "datalist.json", content)
    # Whole files are moved to their places one after the other, the datalist last.
    for path in sorted(fresh.iterdir()):
        path.replace(qc / path.name)
    for old in set(qc.glob("contact_sheet*.png")) - {qc / path.name for path in sheets}:
        old.unlink()
    (temporary / "datalist.json").replace(target / "datalist.json")
    print_findings(findings)
    print("\n".join(summary))
    print(f"{target / 'datalist.json'}: {len(items)} volumes, {folds} folds, hash {content['hash'][:16]}")
    print(f"{qc / 'index.html'}: look at it; {time.monotonic() - started:.0f} s")
    if problems and not skip_bad:
        print(
            f"{problems} problems, so the exit status is 1; fix them and run it again, or accept them with --skip-bad"
        )
        return 1
    return 0


def _with_cross_check(listing: Listing, scan: Scan, what: str) -> str:
    """Say whether a swapped pair is one of those that the data set is known for."""
    if "swapped" not in what or not listing.swapped:
        return what
    return what + ("; known of this scan" if scan.subject_id in listing.swapped else "; NOT among the known ones")


def _note_twins(listing: Listing, good: Iterable[tuple[Scan, dict[str, Any]]]) -> None:
    """Report scans that hold the same voxels under two ids."""
    first: dict[str, Scan] = {}
    for scan, record in good:
        other = first.setdefault(record["voxels_sha256"], scan)
        if other is not scan:
            reason = f"the same voxels as {other.subject_id} ({other.source})"
            listing.note_scan("problem", scan, reason, "remove one; both are kept", False)


def _item(scan: Scan, record: Mapping[str, Any], cohort: str, marks: Sequence[str]) -> dict[str, Any]:
    return {
        "image": record["image"],
        **({"label": record["label"]} if record["label"] else {}),
        "subject_id": scan.subject_id,
        "patient_id": scan.patient_id,
        "session": scan.session,
        **({} if scan.visit is None else {"visit": scan.visit}),
        "site": scan.site,
        "cohort": cohort,
        "sex": scan.sex,
        "diagnosis": scan.diagnosis,
        "age": scan.age,
        "stripped": record["quality"]["stripped"],
        **({"marks": "; ".join(marks)} if marks else {}),
        "fold": 0,
        "source": scan.source,
        "source_sha256": record["source_sha256"],
        "sha256": record["sha256"],
        "voxels_sha256": record["voxels_sha256"],
        # Records of earlier versions have none.
        **({"fingerprint": record["fingerprint"]} if "fingerprint" in record else {}),
        **({"label_sha256": record["label_sha256"]} if record.get("label_sha256") else {}),
    }


def _summary(
    cohort: str,
    layout: str,
    listing: Listing,
    items: Sequence[Mapping[str, Any]],
    findings: Sequence[Finding],
    books: Books,
) -> list[str]:
    """Counts beside the paper's, and what became of everybody."""
    patients = len({item["patient_id"] for item in items})
    parts = [f"{len(items)} scans of {patients} patients"]
    for key in ("sex", "diagnosis", "site"):
        counts = Counter(str(item[key]) for item in items if item[key] is not None)
        if counts and len(counts) <= 12:
            parts.append(f"{key} " + ", ".join(f"{value} {n}" for value, n in sorted(counts.items())))
    lines = [f"{cohort}: " + "; ".join(parts)]
    if listing.found:
        lines.append("found: " + ", ".join(f"{what} {n}" for what, n in listing.found.items()))
    if paper := PAPER_COUNTS.get(cohort) or PAPER_COUNTS.get(layout):
        lines.append(f"the paper used: {paper}")
    kinds = Counter(f.kind for f in findings)
    marked = sum("marks" in item for item in items)
    lines.append(
        f"{marked} volumes marked; {kinds['problem']} problems, {kinds['quirk']} quirks handled, "
        f"{kinds['choice']} scans left out by your options, {kinds['skipped']} files skipped"
    )
    lines.append(books.line())
    return lines


def report_nothing_left(target: Path, listing: Listing) -> None:
    """Print what became of everybody, and write ``qc/findings.csv``, where no volume is left."""
    books = balance(listing, [])
    (target / "qc").mkdir(parents=True, exist_ok=True)
    _write_findings(target / "qc" / "findings.csv", sorted(listing.findings, key=_by_kind))
    print_findings(listing.findings)
    print(books.line())


def _write_findings(path: Path, findings: Iterable[Finding]) -> None:
    quality.write_table(path, map(asdict, findings), list(Finding.__dataclass_fields__))


def print_findings(findings: Sequence[Finding]) -> None:
    """Print problems and quirks as a table, one row for what is the same of more than three; the rest is only counted.

    A code of a table that is not known, in hundreds of rows, would hide all else. Every one is in qc/findings.csv.
    """
    for kind in ("problem", "quirk"):
        found = [finding for finding in findings if finding.kind == kind]
        rows = []
        for alike in grouped(found, attrgetter("reason", "remedy")).values():
            more = f" and {len(alike) - 1} more" if len(alike) > 3 else ""
            for f in alike[:1] if more else alike:
                rows.append((f.subject + more, f.file or "(none)", f.reason + (f"; {f.remedy}" if f.remedy else "")))
        if rows:
            where = "qc/findings.csv has all of them" if min(len(rows), SHOWN) < len(found) else ""
            print(str(InputError.many(f"{len(found)} {kind}s", rows, where, limit=SHOWN)).rstrip())
