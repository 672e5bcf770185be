# SPDX-License-Identifier: Apache-2.0
"""The commands `volta3d check` and `volta3d merge`: patients and volumes in more than one datalist."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from volta_components.data.datalist import (
    Datalist,
    assign_folds,
    check_content,
    check_volumes,
    load_datalist,
    make_content,
    uneven_skulls,
)
from volta_components.data.identity import canonical_patient_id, is_worldwide
from volta_components.errors import InputError
from volta_components.files import write_json


def find_overlaps(datalists: Sequence[Datalist]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Patients or voxels that datalists share; a single one is searched for the same voxels under two ids.

    Returns:
        Certain overlaps, as rows (what, id, where and where), and uncertain ones: an id like ``sub-0001`` in two
        cohorts of different names, which need not be one person.
    """
    certain: list[tuple[str, ...]] = []
    uncertain: list[tuple[str, ...]] = []
    where: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    voxels: dict[str, dict[tuple[int, str], None]] = defaultdict(dict)
    for i, datalist in enumerate(datalists):
        for item in datalist.content["training"]:
            where[canonical_patient_id(item["patient_id"])][i].add(str(item.get("cohort", datalist.name)))
            for key in ("voxels_sha256", "source_sha256", "sha256"):
                if item.get(key):
                    name = "_".join(str(item[k]) for k in ("subject_id", "session") if item.get(k))
                    voxels[item[key]].setdefault((i, name))
    for patient, places in sorted(where.items()):
        if len(places) < 2:
            continue
        row = ("patient", patient, " and ".join(str(datalists[i].path) for i in sorted(places)))
        cohorts = set.union(*places.values())
        (certain if is_worldwide(patient) or len(cohorts) == 1 else uncertain).append(row)
    rows = set()
    for holders in voxels.values():
        if len(holders) > 1:
            names = sorted({name for _, name in holders})
            rows.add(("voxels", " = ".join(names), " and ".join(sorted({str(datalists[i].path) for i, _ in holders}))))
    return certain + sorted(rows), uncertain


def check(*datalists: Path | str, strict: bool = False, volumes: bool = False, deep: bool = False) -> int:
    """Prove that datalists share no patient and no voxels.

    Patients are compared by canonical id, whatever its form (002_S_0295, sub-ADNI002S0295, file names); volumes by the
    hash of their voxels, so that one scan under two ids is found too, also within one datalist.

    Args:
        datalists: Datalists (datalist.json), or folders that hold one.
        strict: Count an id such as sub-0001 as an overlap even where the cohorts have different names.
        volumes: Check too that every volume is there, whole, and of the datalist's shape and spacing.
        deep: Read every volume too, and compare it with its hash.

    Returns:
        0; 1 if there is an overlap.
    """
    if not datalists:
        raise InputError("no datalist given; write: volta3d check A/datalist.json B/datalist.json")
    loaded = [load_datalist(path) for path in datalists]
    if volumes or deep:
        for datalist in loaded:
            check_volumes(datalist, deep)
    certain, uncertain = find_overlaps(loaded)
    if strict:
        certain, uncertain = certain + uncertain, []
    for datalist in loaded:
        print(f"{datalist.path}: {len(datalist)} scans of {len(datalist.patients)} patients, hash {datalist.hash[:16]}")
    if uncertain:
        ids = ", ".join(row[1] for row in uncertain[:10]) + (" ..." if len(uncertain) > 10 else "")
        print(
            f"{len(uncertain)} ids are in cohorts of different names and were counted as different people "
            f"(--strict counts them): {ids}"
        )
    everyone = [{"cohort": d.name, **item} for d in loaded for item in d.content["training"]]
    if note := uneven_skulls(everyone, ""):
        print(f"warning: {note}")
    if certain:
        print(
            InputError.many(
                f"{len(certain)} overlaps",
                certain,
                "Prepare one of them again without these: volta3d prepare ... --exclude-patients-of OTHER.",
            )
        )
        return 1
    print("no overlap")
    return 0


def merge(
    *datalists: Path | str,
    output: Path | str,
    name: str = "merged",
    refold: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> int:
    """Join prepared data sets into one datalist; the volumes stay where they are.

    Each item keeps its cohort, so that a config can weight cohorts, and its fold.

    Args:
        datalists: Datalists (datalist.json), or folders that hold one.
        output: The datalist to write (datalist.json), or a folder for it.
        name: Name of the merged data set.
        refold: Assign the folds again, over all patients.
        folds: Number of folds, with --refold.
        seed: Seed of the folds, with --refold.

    Returns:
        0.

    Raises:
        InputError: if the data sets do not fit each other or share volumes.
    """
    if len(datalists) < 2:
        raise InputError("give two datalists or more: volta3d merge A B --output C/datalist.json")
    loaded = [load_datalist(path) for path in datalists]
    first = loaded[0]
    for other in loaded[1:]:
        for key in ("spacing", "shape") if refold else ("spacing", "shape", "n_folds"):
            if other.content[key] != first.content[key]:
                raise InputError(
                    f"{other.path}: {key} {other.content[key]} where {first.path} has {first.content[key]}; "
                    + ("prepare both alike" if key != "n_folds" else "add --refold")
                )
    target = Path(output)
    target = target / "datalist.json" if target.suffix != ".json" else target
    inputs = [datalist.path.resolve() for datalist in loaded]
    if target.resolve() in inputs:
        raise InputError(f"--output {target} is one of the datalists to merge; choose another")
    if target.name == "datalist.json" and (target.parent / ".prepare").is_dir():
        raise InputError(
            f"--output {target}: the folder holds a prepared data set, whose own datalist would be lost; choose another"
        )
    certain, uncertain = find_overlaps(loaded)
    doubles = [row for row in certain if row[0] == "voxels"]
    if doubles:
        raise InputError.many(
            f"{len(doubles)} volumes are there twice",
            doubles,
            "Remove one of each from its source and prepare that one again.",
        )
    clashing = {row[1] for row in uncertain}
    shared = {row[1] for row in certain if row[0] == "patient"}
    items, excluded = [], []
    for datalist in loaded:
        base = Path(os.path.relpath(datalist.path.resolve().parent, target.resolve().parent))
        for item in datalist.content["training"]:
            entry = {**item, "cohort": item.get("cohort", datalist.name)}
            for key in ("image", "label"):
                if key in entry:
                    entry[key] = (base / entry[key]).as_posix()
            if canonical_patient_id(item["patient_id"]) in shared:
                entry.pop("visit", None)  # counted in each datalist on its own
            if entry["patient_id"] in clashing:
                for key in ("subject_id", "patient_id"):
                    entry[key] = f"{entry['cohort']}-{entry[key]}"
            items.append(entry)
        excluded += [{**row, "cohort": row.get("cohort", datalist.name)} for row in datalist.excluded]
    placed: dict[str, set[int]] = defaultdict(set)
    for item in items:
        placed[item["patient_id"]].add(item["fold"])
    split = sorted(patient for patient, where in placed.items() if len(where) > 1)
    if split and not refold:
        raise InputError.many(
            f"{len(split)} patients are in different folds of the datalists",
            [(patient,) for patient in split],
            "Add --refold to assign the folds again.",
        )
    n_folds, used_seed = first.n_folds, int(first.content["seed"])
    if refold:
        check_folds(folds)
        n_folds, used_seed = folds, seed
        new = assign_folds(items, folds, seed)
        items = [{**item, "fold": new[item["patient_id"]]} for item in items]
    check_phantom_name(name, all("phantom" in str(item["cohort"]).lower() for item in items))
    content = make_content(name, first.spacing, first.shape, used_seed, n_folds, items, excluded)
    check_content(target, content)
    write_json(target, content)
    counts = Counter(item["cohort"] for item in items)
    print(f"{target}: {len(items)} scans ({', '.join(f'{c} {n}' for c, n in sorted(counts.items()))})")
    parts = [len(datalist.patients) for datalist in loaded]
    people = len({item["patient_id"] for item in items})
    twice = f" - {sum(parts) - people} in more than one" if people < sum(parts) else ""
    print(f"people: {people} = {' + '.join(map(str, parts))}{twice}; {len(excluded)} scans were left out before")
    if note := uneven_skulls(items, name):
        print(f"warning: {note}")
    if clashing:
        print(f"{len(clashing)} ids were in two cohorts; the cohort's name was put in front of them")
    return 0


def check_phantom_name(name: str, is_phantom: bool) -> None:
    """The name of a data set of phantoms says so: by it, runs, reports and packed weights are marked.

    Raises:
        InputError: if it does not.
    """
    if is_phantom and "phantom" not in name.lower():
        raise InputError(f"--name {name}: these are phantoms, and the name has to say so; try phantom_{name}")


def check_folds(folds: int) -> None:
    """Refuse a number of folds that is none.

    Raises:
        InputError: if it is not from 1 to 100.
    """
    if not 1 <= folds <= 100:
        raise InputError(f"--folds {folds}: give a number from 1 to 100")
