# SPDX-License-Identifier: Apache-2.0
"""The commands `volta3d check` and `volta3d merge`: patients and volumes in more than one datalist."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from volta_components.data.checks import GONE, check_volumes, unusable_volumes
from volta_components.data.datalist import (
    Datalist,
    assign_folds,
    check_content,
    load_datalist,
    make_content,
    uneven_skulls,
)
from volta_components.data.fingerprint import near_copies_of
from volta_components.data.identity import (
    are_phantoms,
    canonical_patient_id,
    is_worldwide,
    loose_person,
    voxel_hashes,
    who,
)
from volta_components.data.items import PATHS, item_name
from volta_components.data.places import file_of
from volta_components.data.remote import is_remote
from volta_components.errors import InputError
from volta_components.files import write_json


def _with_cohort(item: Mapping[str, Any], datalist: Datalist) -> dict[str, Any]:
    """An item, or a row of who was left out, with its cohort: its own, or else that of its datalist."""
    return {**item, "cohort": item.get("cohort") or datalist.name}


def _who(item: Mapping[str, Any], datalist: Datalist) -> tuple[str, str]:
    """Patient and cohort of an item, without the cohort where the id is unique among all of them."""
    patient, cohort = who(_with_cohort(item, datalist))
    return patient, "" if is_worldwide(patient) else cohort


@dataclass(frozen=True)
class Overlaps:
    """What datalists share, as rows (what, id or ids, where).

    Attributes:
        certain: patients and voxels.
        look_alikes: ids of one cohort that differ only in case, separators, prefixes or zero padding; within one
            datalist, only those in different folds.
        uncertain: an id like ``sub-0001`` in cohorts of different names, which need not be one person.
        near_copies: volumes of different people that are nearly the same.
    """

    certain: list[tuple[str, ...]]
    look_alikes: list[tuple[str, ...]]
    uncertain: list[tuple[str, ...]]
    near_copies: list[tuple[str, ...]]


def find_overlaps(datalists: Sequence[Datalist]) -> Overlaps:
    """Patients or voxels that datalists share.

    Args:
        datalists: at least one; a single one is searched for the same voxels under two ids.
    """
    certain: list[tuple[str, ...]] = []
    uncertain: list[tuple[str, ...]] = []
    where: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    alike: dict[str, dict[tuple[str, str], set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
    voxels: dict[str, dict[tuple[int, str], None]] = defaultdict(dict)
    everybody: list[dict[str, Any]] = []

    def places(indices: Iterable[int]) -> str:
        return " and ".join(str(datalists[i].path) for i in sorted(set(indices)))

    for i, datalist in enumerate(datalists):
        for item in datalist.content["training"]:
            patient, cohort = _who(item, datalist)
            where[patient][cohort].add(i)
            alike[loose_person(patient, cohort)][patient, cohort].add((i, item["fold"]))
            name = item_name(item)
            for key in voxel_hashes(item):
                voxels[key].setdefault((i, name))
            if item.get("fingerprint"):
                everybody.append({**_with_cohort(item, datalist), "datalist": i, "name": name})
    for patient, held in sorted(where.items()):
        certain += [("patient", patient, places(holders)) for holders in held.values() if len(holders) > 1]
        everywhere = set.union(*held.values())
        if len(held) > 1 and len(everywhere) > 1:
            uncertain.append(("patient", patient, places(everywhere)))
    looks = [
        (
            "look alike",
            " = ".join(patient for patient, _ in sorted(forms)),
            places(i for at in forms.values() for i, _ in at),
        )
        for forms in alike.values()
        if len(forms) > 1 and len(set.union(*forms.values())) > 1
    ]
    rows = set()
    for holders in voxels.values():
        if len(holders) > 1:
            names = sorted({name for _, name in holders})
            rows.add(("voxels", " = ".join(names), places(i for i, _ in holders)))
    near: list[tuple[str, ...]] = [
        ("alike", f"{everybody[i]['name']} ~ {everybody[j]['name']}", places(everybody[k]["datalist"] for k in (i, j)))
        for i, j in near_copies_of(everybody)
    ]
    return Overlaps(certain + sorted(rows), sorted(looks), uncertain, near)


def check(
    *datalists: Path | str,
    strict: bool = False,
    accept_look_alikes: bool = False,
    volumes: bool = False,
    deep: bool = False,
) -> int:
    """Look for patients and voxels that are in two datalists, by id and by hash.

    Patients are compared by canonical id, whatever its form (002_S_0295, sub-ADNI002S0295, file names); volumes by the
    hash of their voxels, so that one scan under two ids is found too, also within one datalist. Volumes of different
    people that are nearly the same, such as a scan and its resampled copy, are a warning.

    Args:
        datalists: Datalists (datalist.json), or folders that hold one.
        strict: Count an id such as sub-0001 as an overlap even where the cohorts have different names.
        accept_look_alikes: Take ids that differ only in case, separators, prefixes or zero padding (sub-7 and SUB_07 of
            one cohort) for different people.
        volumes: Make it an error if a volume is not there, not whole, or not of the datalist's shape and spacing;
            without it, that is a warning.
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
    found = find_overlaps(loaded)
    certain, uncertain = found.certain, found.uncertain
    if strict:
        certain, uncertain = certain + uncertain, []
    if not accept_look_alikes:
        certain = certain + found.look_alikes
    for datalist in loaded:
        print(f"{datalist.path}: {len(datalist)} scans of {len(datalist.patients)} patients, hash {datalist.hash[:16]}")
    if uncertain:
        ids = ", ".join(row[1] for row in uncertain[:10]) + (" ..." if len(uncertain) > 10 else "")
        print(
            f"{len(uncertain)} ids are in cohorts of different names and were counted as different people "
            f"(--strict counts them): {ids}"
        )
    for datalist in () if volumes or deep else loaded:
        if not datalist.content.get("rendered") and (bad := unusable_volumes(datalist, datalist.items)):
            said = f"warning: {datalist.path}: {len(bad)} volumes cannot be used"
            print(
                InputError.many(
                    said,
                    bad,
                    "Restore them, or remove and prepare them again; ids were compared all the same.",
                    limit=10,
                )
            )
    _warn_of_unknown_voxels(loaded)
    everyone = [_with_cohort(item, d) for d in loaded for item in d.content["training"]]
    if note := uneven_skulls(everyone, ""):
        print(f"warning: {note}")
    if found.near_copies:
        print(
            InputError.many(
                f"warning: {len(found.near_copies)} pairs of volumes are nearly the same",
                found.near_copies,
                "Look at them: copies of one scan must not be trained on and scored.",
                limit=10,
            )
        )
    if certain:
        kinds = {row[0] for row in certain}
        remedies = []
        if kinds - {"voxels"}:
            remedies.append("Prepare one of them again without these: volta3d prepare ... --exclude-patients-of OTHER.")
        if "voxels" in kinds:
            remedies.append(
                "Of scans with the same voxels, keep one: move the others out of their data set, and prepare it again "
                "into a new folder."
            )
        if found.look_alikes and not accept_look_alikes:
            remedies.append("If ids that look alike are different people: --accept-look-alikes.")
        print(InputError.many(f"{len(certain)} overlaps", certain, " ".join(remedies)))
        return 1
    print("no overlap")
    return 0


def _warn_of_unknown_voxels(datalists: Iterable[Datalist]) -> None:
    for datalist in datalists:
        unknown = sum(not voxel_hashes(item) for item in datalist.content["training"])
        if unknown and not datalist.content.get("rendered"):
            print(
                f"warning: {datalist.path}: {unknown} of {len(datalist)} scans have no hash, so the same scan "
                "under another id is not found; prepare the data set again"
            )


def merge(
    *datalists: Path | str,
    output: Path | str,
    name: str = "merged",
    refold: bool = False,
    folds: int = 5,
    seed: int = 0,
    hold_out: bool = False,
    accept_look_alikes: bool = False,
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
        hold_out: Make the first datalist fold 0 and all others fold 1: people who are only ever scored. A
            cross-validation of fold 0 (volta3d crossval --folds 1) then trains on the others.
        accept_look_alikes: Take ids that differ only in case, separators, prefixes or zero padding for different
            people.

    Returns:
        0.

    Raises:
        InputError: if the data sets do not fit each other or share volumes.
    """
    if len(datalists) < 2:
        raise InputError("give two datalists or more: volta3d merge A B --output C/datalist.json")
    if refold and hold_out:
        raise InputError("--refold and --hold-out both give folds; choose one")
    loaded = [load_datalist(path) for path in datalists]
    first = loaded[0]
    for other in loaded[1:]:
        for key in ("spacing", "shape") if refold or hold_out else ("spacing", "shape", "n_folds"):
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
    if target.name == "datalist.json" and any((target.parent / kind).is_dir() for kind in (".prepare", "shards")):
        raise InputError(
            f"--output {target}: the folder holds a prepared or packed data set, whose own datalist would be lost; "
            "choose another"
        )
    files = [
        (str(item["subject_id"]), str(item[kind]))
        for datalist in loaded
        if not datalist.content.get("rendered")
        for item in datalist.items
        for kind in PATHS
        if kind in item
    ]
    if missing := [row for row in files if not is_remote(row[1]) and not Path(file_of(row[1])).is_file()]:
        raise InputError.many(f"{len(missing)} of {len(files)} volumes are not there", missing, GONE)
    overlaps = find_overlaps(loaded)
    certain, uncertain = overlaps.certain, overlaps.uncertain
    if overlaps.look_alikes and not (refold or accept_look_alikes):
        raise InputError.many(
            f"{len(overlaps.look_alikes)} groups of ids look alike, and are in different folds or datalists",
            overlaps.look_alikes,
            "Add --refold, which gives each group one fold, or --accept-look-alikes if they are different people.",
        )
    _warn_of_unknown_voxels(loaded)
    doubles = [row for row in certain if row[0] == "voxels"]
    if doubles:
        raise InputError.many(
            f"{len(doubles)} volumes are there twice",
            doubles,
            "Remove one of each from its source and prepare that one again.",
        )
    if rows := _contradictions(loaded):
        raise InputError.many(
            f"{len(rows)} patients of one id and one cohort name cannot be one person",
            rows,
            "Prepare one of the data sets again with a name of its own (volta3d prepare --name NAME).",
        )
    clashing = {row[1] for row in uncertain}
    holders: dict[tuple[str, str], set[int]] = defaultdict(set)
    renamed = set()  # by an earlier merge: they keep that name, in every datalist
    for i, datalist in enumerate(loaded):
        for item in datalist.content["training"]:
            person = _who(item, datalist)
            holders[person].add(i)
            if person[0] != canonical_patient_id(item["patient_id"]):
                renamed.add(person)
    items, excluded = [], []
    for datalist in loaded:
        kept = {"fold": int(datalist is not first)} if hold_out else {}
        place = functools.cache(functools.partial(_place, datalist.path.resolve().parent, target.resolve().parent))
        for item in datalist.content["training"]:
            patient, cohort = _who(item, datalist)
            entry = {**_with_cohort(item, datalist), **kept}
            for key in PATHS:
                if key in entry and not is_remote(entry[key]):
                    folder, file = os.path.split(entry[key])
                    entry[key] = Path(place(folder), file).as_posix()
            if len(holders[patient, cohort]) > 1:
                entry.pop("visit", None)  # counted in each datalist on its own
            if patient in clashing or (patient, cohort) in renamed:
                for key in ("subject_id", "patient_id"):
                    entry[key] = f"{cohort}-{entry[key].removeprefix(f'{cohort}-')}"
            items.append(entry)
        excluded += [_with_cohort(row, datalist) for row in datalist.excluded]
    placed: dict[str, set[int]] = defaultdict(set)
    for item in items:
        placed[item["patient_id"]].add(item["fold"])
    split = sorted(patient for patient, where in placed.items() if len(where) > 1)
    if split and not refold:
        raise InputError.many(
            f"{len(split)} patients are in different folds of the datalists",
            [(patient,) for patient in split],
            "Prepare the others without them (volta3d prepare --exclude-patients-of), or do without --hold-out."
            if hold_out
            else "Add --refold to assign the folds again.",
        )
    n_folds, used_seed = 2 if hold_out else first.n_folds, int(first.content["seed"])
    if refold:
        check_folds(folds, seed)
        n_folds, used_seed = folds, seed
        new = assign_folds(items, folds, seed)
        items = [{**item, "fold": new[item["patient_id"]]} for item in items]
    check_phantom_name(name, are_phantoms(items, name))
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


def _place(source: Path, target: Path, folder: str) -> str:
    """A folder of one datalist's volumes as another has to name it, by no folder in between that may be moved away."""
    return folder if folder.startswith("/") else os.path.relpath((source / folder).resolve(), target)


def _contradictions(datalists: Sequence[Datalist]) -> list[tuple[str, str, str]]:
    """Rows (patient, what differs, where) of people whom datalists share by id and cohort, and who are not the same.

    They are of two sexes, or one session of theirs has other voxels. Ids that are unique worldwide are not looked at.
    """
    facts: dict[tuple[str, str], dict[int, dict[str, set[str]]]] = {}
    for i, datalist in enumerate(datalists):
        for item in datalist.content["training"]:
            patient, cohort = _who(item, datalist)
            if is_worldwide(patient):
                continue
            person = facts.setdefault((cohort, patient), {})
            known = person.setdefault(i, defaultdict(set))
            if item.get("sex"):
                known["sex"].add(str(item["sex"]))
            known[f"voxels of session {item.get('session') or '(none)'}"] |= voxel_hashes(item)
    rows = []
    for (_, patient), held in sorted(facts.items()):
        for (i, one), (j, other) in combinations(sorted(held.items()), 2):
            known_of_both = [fact for fact in sorted({*one} & {*other}) if one[fact] and other[fact]]
            if differ := [fact for fact in known_of_both if one[fact].isdisjoint(other[fact])]:
                rows.append((patient, ", ".join(differ), f"{datalists[i].path} and {datalists[j].path}"))
    return rows


def check_phantom_name(name: str, is_phantom: bool) -> None:
    """The name of a data set of phantoms says so: by it, runs, reports and packed weights are marked.

    Raises:
        InputError: if it does not.
    """
    if is_phantom and "phantom" not in name.lower():
        raise InputError(f"--name {name}: these are phantoms, and the name has to say so; try phantom_{name}")


def check_folds(folds: int, seed: int) -> None:
    """Refuse a number of folds, or a seed, that is none.

    Raises:
        InputError: if there are not from 1 to 100 folds, or the seed is negative.
    """
    if not 1 <= folds <= 100:
        raise InputError(f"--folds {folds}: give a number from 1 to 100")
    if seed < 0:
        raise InputError(f"--seed {seed}: give a whole number from 0")
