# SPDX-License-Identifier: Apache-2.0
"""The one datalist format: written by ``volta3d prepare``, read by every bundle, checked and merged here.

It is MONAI's Decathlon-style JSON (``monai.data.load_decathlon_datalist`` reads it as it is), with what that lacks: who
each volume is of, in which fold, where it came from, and hashes of all of it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volta_components.data.identity import grouped, same_people, unfit_id
from volta_components.data.items import PackedItems, Packer
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_json

FORMAT = 1
# Shares of scans without skull in two cohorts that differ by more than this are uneven.
_UNEVEN = 0.2


@dataclass(frozen=True)
class Datalist:
    """A prepared data set.

    Attributes:
        path: the JSON file; the paths in it are relative to its folder.
        content: the file's content, paths still relative.
        hash: SHA-256 of the content (without the hash itself) as canonical JSON; the same on every machine.
    """

    path: Path
    content: Mapping[str, Any]
    hash: str

    @property
    def name(self) -> str:
        """Name of the data set."""
        return str(self.content["name"])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Of every volume, mm."""
        return tuple(self.content["spacing"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every volume, voxels."""
        return tuple(self.content["shape"])

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return int(self.content["n_folds"])

    @property
    def excluded(self) -> list[dict[str, Any]]:
        """What was left out, and why."""
        return list(self.content.get("excluded", []))

    @property
    def items(self) -> PackedItems:
        """All items with absolute paths, ready for ``monai.data.Dataset``; sorted by subject and session."""
        items = self.content["training"]
        packed = items if isinstance(items, PackedItems) else PackedItems(items)
        return packed.below(self.path.resolve().parent)

    @property
    def patients(self) -> set[str]:
        """Canonical ids."""
        return {item["patient_id"] for item in self.content["training"]}

    def split(self, fold: int) -> tuple[PackedItems, PackedItems]:
        """Items of all other folds, and items of ``fold``; none of a datalist that is not there.

        Raises:
            InputError: if there is no such fold, or it has no items, or all of them.
        """
        if not len(self):
            return PackedItems(), PackedItems()
        if not 0 <= fold < self.n_folds:
            raise InputError(f"{self.path}: no fold {fold}; it has folds 0 to {self.n_folds - 1}")
        items = self.items
        is_held_out = np.array([item["fold"] == fold for item in items])
        others, held_out = (items.take(np.flatnonzero(is_held_out == side)) for side in (False, True))
        if not others or not held_out:
            raise InputError(
                f"{self.path}: fold {fold} has {len(held_out)} of {len(items)} items, so one side has no scan; "
                "choose another fold, or prepare the data set with --folds 2 or more"
            )
        return others, held_out

    def __len__(self) -> int:
        return len(self.content["training"])


def datalist_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 over canonical JSON of the items, their folds and grid: what was left out changes no result."""
    return sha256_json({key: value for key, value in content.items() if key not in {"hash", "excluded"}}, "training")


def load_datalist(
    path: str | os.PathLike[str],
    shape: Sequence[int] | None = None,
    spacing: float | Sequence[float] | None = None,
    required: bool = True,
) -> Datalist:
    """Read a datalist and check its form; the volumes are checked by ``volta_components.data.checks``.

    Args:
        path: of ``datalist.json``, or of the folder that holds it.
        shape: that the volumes must have; None accepts any.
        spacing: that the volumes must have, mm, one number or three; None accepts any.
        required: false gives an empty datalist where there is no file, so that a config can be read without its data;
            ``check_volumes`` refuses it.

    Raises:
        InputError: if it is missing, empty, of another format, contradicts itself (a patient in two folds, an item
            twice), or does not have the wanted shape and spacing.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "datalist.json"
    if not path.exists():
        if required:
            raise no_datalist(path)
        empty = make_content("none", [], [], 0, 1, [], [])
        return Datalist(path, empty, empty["hash"])
    packer = Packer()
    content = read_json(path, packer.hook)
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise InputError(f"{path}: not a datalist (no list named 'training'); make one with volta3d prepare")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: datalist format {content.get('format')!r} instead of {FORMAT}; prepare the data set again"
        )
    if not content["training"]:
        raise InputError(f"{path}: the datalist is empty; see its 'excluded' for the reasons, and prepare it again")
    content["excluded"] = list(map(packer.plain, content.get("excluded", [])))
    content["training"] = PackedItems(content["training"], packer)
    packer.data.clear()  # it is in a circle with its encoder, so that Python would keep it for a while
    check_content(path, content)
    for name, wanted in (("shape", shape), ("spacing", spacing)):
        if wanted is None:
            continue
        three = np.broadcast_to(np.asarray(wanted, dtype=float), 3)
        if not np.allclose(content[name], three, rtol=0, atol=1e-6):
            found, expected = ([f"{n:g}" for n in numbers] for numbers in (content[name], three))
            raise InputError(
                f"{path}: volumes of {name} {'x'.join(found)}, but {'x'.join(expected)} is expected; prepare it with "
                f"--{name} {','.join(expected)}, or change the config"
            )
    actual = datalist_hash(content)
    if content.get("hash") != actual:
        warnings.warn(f"{path} was changed since it was written; its hash is now {actual}", stacklevel=2)
    return Datalist(path, content, actual)


def no_datalist(path: Path) -> InputError:
    """The error of a datalist that is not there."""
    return InputError(
        f"{path}: no such datalist; make one with: volta3d prepare --layout LAYOUT --source FOLDER "
        f"--output {path.parent}"
    )


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a datalist whose content is incomplete or inconsistent."""
    missing = [key for key in ("name", "spacing", "shape", "n_folds", "seed") if key not in content]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; prepare the data set again")
    for key in ("spacing", "shape"):
        value = content[key]
        is_three = isinstance(value, list) and len(value) == 3
        if not is_three or not all(isinstance(n, int | float) and n > 0 for n in value):
            raise InputError(f"{path}: {key} is {value!r} instead of three positive numbers; prepare it again")
    if not is_count(content["n_folds"]) or content["n_folds"] < 1 or not is_count(content["seed"]):
        raise InputError(
            f"{path}: n_folds {content['n_folds']!r}, seed {content['seed']!r}: whole numbers without quotes are needed"
        )
    rows: list[tuple[str, str]] = []
    folds: dict[str, int] = {}
    seen: set[tuple[str, Any]] = set()
    owners: dict[str, str] = {}
    for i, item in enumerate(content["training"]):
        name = f"item {i}"
        if not isinstance(item, dict):
            rows.append((name, f"is {type(item).__name__}, not an object"))
            continue
        name = str(item.get("subject_id", name))
        needed = ("image", "subject_id", "patient_id", "fold")
        if lacking := [key for key in needed if not isinstance(item.get(key), str | int)]:
            rows.append((name, f"lacks {', '.join(lacking)}"))
            continue
        if wrong := _wrong_types(item):
            rows.append((name, "; ".join(wrong)))
            continue
        if not 0 <= item["fold"] < content["n_folds"]:
            rows.append((name, f"fold {item['fold']} where folds 0 to {content['n_folds'] - 1} exist"))
        if (first := folds.setdefault(item["patient_id"], item["fold"])) != item["fold"]:
            rows.append((name, f"patient {item['patient_id']} is in folds {first} and {item['fold']}"))
        if unfit := unfit_id(item.get(key) for key in ("subject_id", "session", "patient_id", "site", "cohort")):
            rows.append((repr(name), unfit))
        if (owner := owners.setdefault(item["image"], item["patient_id"])) != item["patient_id"]:
            rows.append((name, f"image {item['image']} is also that of patient {owner}"))
        scan = (item["subject_id"], session := item.get("session"))
        if scan in seen:
            rows.append((name, f"session {session} is there twice" if session else "is there twice, without a session"))
        seen.add(scan)
    if rows:
        raise InputError.many(
            f"{path}: {len(rows)} of {len(content['training'])} items are wrong", rows, "Prepare the data set again."
        )


def is_count(value: object) -> bool:
    """Whether a value of JSON is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong_types(item: Mapping[str, Any]) -> list[str]:
    """What of an item that was written by hand is of another type than ``volta3d prepare`` writes."""
    wrong = [] if is_count(item["fold"]) else [f"fold is {item['fold']!r}, not a whole number without quotes"]
    for key in ("image", "subject_id", "patient_id"):
        if not isinstance(item[key], str) or not item[key].strip():
            wrong.append(f"{key} is {item[key]!r}, not a text in quotes")
    if "label" in item and item["label"] is None:  # a number may be the class, for a bundle of the user's own
        wrong.append("label is null; leave it out where there is none")
    for key in ("session", "site", "cohort"):
        if not isinstance(item.get(key), str | None):
            wrong.append(f"{key} is {item[key]!r}, not a text in quotes or null")
    age, visit = item.get("age"), item.get("visit")
    if not (age is None or (isinstance(age, int | float) and not isinstance(age, bool) and 0 <= age <= 130)):
        wrong.append(f"age is {age!r}, not a number of years without quotes or null")
    if not (visit is None or is_count(visit)):
        wrong.append(f"visit is {visit!r}, not a whole number from 0 without quotes or null")
    return wrong


def make_content(
    name: str,
    spacing: Sequence[float],
    shape: Sequence[int],
    seed: int,
    n_folds: int,
    items: Iterable[Mapping[str, Any]],
    excluded: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Content of a datalist, sorted and with its hash."""

    def order(item: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(item.get(key) or "") for key in ("subject_id", "session", "source", "reason"))

    content: dict[str, Any] = {
        "name": name,
        "format": FORMAT,
        "spacing": [float(s) for s in spacing],
        "shape": [int(n) for n in shape],
        "seed": int(seed),
        "n_folds": int(n_folds),
        "training": [dict(item) for item in sorted(items, key=order)],
        "excluded": [dict(item) for item in sorted(excluded, key=order)],
    }
    return {**content, "hash": datalist_hash(content)}


def assign_folds(items: Iterable[Mapping[str, Any]], n_folds: int, seed: int) -> dict[str, int]:
    """Give each patient a fold, balanced over diagnosis, sex, site and cohort.

    Patients are gone through stratum by stratum, in an order that a hash of seed and id decides; each goes to the fold
    that has the fewest of its stratum, then of its diagnosis, its sex, its site, its cohort, then of scans. So the
    folds depend on nothing but the patients and the seed: not on the machine, the order of files, or a library's
    version. Ids that may be one person's (``same_people``) share a fold. scikit-learn's ``StratifiedGroupKFold``
    balances one label only and hangs on NumPy's shuffling.
    """
    items = sorted(items, key=lambda item: (str(item["patient_id"]), str(item.get("session") or "")))
    person = same_people(items)
    scans = grouped(items, lambda item: person[item["patient_id"]])

    def known(patient: str, fact: str) -> str:
        """The first that is known of a fact, in the order of sessions."""
        return str(next((item[fact] for item in scans[patient] if item.get(fact) is not None), None) or "")

    def stratum(patient: str) -> tuple[str, ...]:
        return tuple(known(patient, fact) for fact in ("cohort", "diagnosis", "sex", "site"))

    def lot(patient: str) -> str:
        return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()

    counts: list[Counter[tuple[str, str]]] = [Counter() for _ in range(n_folds)]
    folds: dict[str, int] = {}
    for patient in sorted(scans, key=lambda patient: (stratum(patient), lot(patient))):
        cohort, diagnosis, sex, site = stratum(patient)
        keys = [
            ("stratum", "\0".join((cohort, diagnosis, sex, site))),
            ("class", "\0".join((cohort, diagnosis))),
            ("diagnosis", diagnosis),
            ("sex", sex),
            ("site", site),
            ("cohort", cohort),
        ]
        fold = min(
            range(n_folds),
            key=lambda fold: (
                *(counts[fold][key] for key in keys),
                counts[fold][("scans", "")],
                hashlib.sha256(f"{seed}:{patient}:{fold}".encode()).hexdigest(),
            ),
        )
        folds[patient] = fold
        counts[fold].update(keys)
        counts[fold][("scans", "")] += len(scans[patient])
    return {patient: folds[first] for patient, first in person.items()}


def uneven_skulls(items: Iterable[Mapping[str, Any]], name: str) -> str | None:
    """What to say of a mixture in which some cohorts have skulls and others have none; None where all are alike.

    Items without ``stripped`` do not count; ``name`` is the cohort of those that name none.
    """
    counts: dict[str, Counter[bool]] = defaultdict(Counter)
    for item in items:
        if isinstance(item.get("stripped"), bool):
            counts[str(item.get("cohort") or name)][item["stripped"]] += 1
    shares = {cohort: count[True] / count.total() for cohort, count in sorted(counts.items())}
    if len(shares) < 2 or max(shares.values()) - min(shares.values()) <= _UNEVEN:
        return None
    shown = ", ".join(f"{cohort} {100 * share:.0f} %" for cohort, share in shares.items())
    return (
        f"scans without skull: {shown}. A network can tell these cohorts by their skulls; bring them to one form with "
        "volta3d prepare --mask"
    )


def cohort_weights(datalist: Datalist, items: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> list[float]:
    """Sampling weight of each item so that the cohorts are drawn in the given proportion, whatever their sizes.

    Args:
        datalist: usually a merged one.
        items: those of it that are drawn from, such as the training part of a fold.
        weights: share of each cohort, any positive scale; 0 leaves a cohort out. All cohorts must be named.

    Returns:
        One weight an item, in the order of ``items``; they sum to 1.

    Raises:
        InputError: if a cohort is missing or unknown, or a weight is negative, or all are 0.
    """
    cohorts = [str(item.get("cohort") or datalist.name) for item in items]
    sizes = Counter(cohorts)
    unknown, missing = sorted(set(weights) - set(sizes)), sorted(set(sizes) - set(weights))
    if unknown or missing:
        wrong = [f"{what}: {', '.join(c)}" for what, c in (("unknown", unknown), ("missing", missing)) if c]
        raise InputError(
            f"{datalist.path}: cohort weights must name its cohorts ({', '.join(sorted(sizes))}); {'; '.join(wrong)}"
        )
    if any(not np.isfinite(w) or w < 0 for w in weights.values()) or sum(weights.values()) <= 0:
        raise InputError(f"cohort weights must be positive numbers, or 0 to leave a cohort out; got {dict(weights)}")
    total = sum(weights.values())
    return [weights[cohort] / total / sizes[cohort] for cohort in cohorts]
