# SPDX-License-Identifier: Apache-2.0
"""Splits by patient: who is trained on, who validates, who is scored."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from volta_components.data.fingerprint import near_copies_of
from volta_components.data.identity import canonical_patient_id, grouped, loose_person, same_people, voxel_hashes, who
from volta_components.data.items import item_name
from volta_components.errors import InputError

logger = logging.getLogger(__name__)

Item = dict[str, Any]
# The fold of everybody.
EVERYBODY = "all"


@dataclass(frozen=True)
class Parts:
    """Items of one run; no patient is in two of the lists.

    Attributes:
        training: what the weights are fitted on.
        validation: the inner validation part: thresholds, epochs and learning curves, never the fit.
        scored: the fold that results are about; always whole.
        unused: items of the training part that the fraction leaves out.
    """

    training: list[Item]
    validation: list[Item]
    scored: list[Item]
    unused: list[Item] = field(default_factory=list)

    @property
    def in_use(self) -> dict[str, list[Item]]:
        """The parts that a run goes through, by name."""
        return {"training": self.training, "inner validation": self.validation, "scored": self.scored}


def counted(items: Sequence[Mapping[str, Any]]) -> str:
    """How many scans of how many people: ``12 scans of 10 people``."""
    return f"{len(items)} scans of {len(patients_of(items))} people"


def patients_of(items: Iterable[Mapping[str, Any]]) -> set[str]:
    """Patient ids of items."""
    return {str(item["patient_id"]) for item in items}


def split_items(
    items: Sequence[Item],
    fold: int,
    fraction: float = 1.0,
    validation_fraction: float = 0.2,
    seed: int = 0,
    stratify: str | None = None,
    accept_look_alikes: bool = False,
) -> Parts:
    """Split items into training, inner validation and scored part, by patient.

    The scored part is the stored fold. The patients of the other folds are put in an order that a hash of seed, fold
    and id decides, for each stratum alone; a fraction takes the first ones, so that a smaller fraction is a subset of
    a larger one. Of those taken, evenly spread ones are the inner validation part, so that it is nested as well.

    Args:
        items: those that can be used, with ``patient_id`` and ``fold``; without any, all parts are empty.
        fold: the scored fold.
        fraction: share of the training part that is used, in (0, 1].
        validation_fraction: share of the used ones that is held out for inner validation, in [0, 1).
        seed: of the order.
        stratify: a key of the items; both shares hold in each of its values (rounded, a half up). A patient with
            several scans counts by the largest.
        accept_look_alikes: see ``check_disjoint``.

    Raises:
        InputError: if a share is out of range, the fold has no items, or a patient is in two folds.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction}: expected a share of the training part in (0, 1]")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction {validation_fraction}: expected a share in [0, 1)")
    if not items:
        return Parts([], [], [])
    scored = [item for item in items if item["fold"] == fold]
    rest = [item for item in items if item["fold"] != fold]
    if not scored or not rest:
        known = sorted({int(item["fold"]) for item in items})
        raise InputError(
            f"fold {fold} cannot be scored: the usable items are in fold{'s' * (len(known) != 1)} "
            f"{', '.join(map(str, known)) or '(none)'}; choose another fold, or prepare more subjects"
        )
    check_disjoint({"scored fold": scored, "other folds": rest}, accept_look_alikes)
    person = same_people(rest)
    by_patient = grouped(rest, lambda item: str(person[item["patient_id"]]))
    strata: dict[Any, list[str]] = defaultdict(list)
    for patient, scans in by_patient.items():
        values = [scan.get(stratify) for scan in scans] if stratify else [None]
        strata[max(values, key=lambda value: (value is not None, str(value)))].append(patient)
    place: dict[str, str] = {}
    for patients in strata.values():
        patients.sort(key=lambda patient: hashlib.sha256(f"{seed}:{fold}:{patient}".encode()).hexdigest())
        taken = int(fraction * len(patients) + 0.5)
        for number, patient in enumerate(patients):
            before, after = (int(validation_fraction * count + 0.5) for count in (number, number + 1))
            place[patient] = "unused" if number >= taken else "validation" if after > before else "training"
    parts: dict[str, list[Item]] = {"training": [], "validation": [], "unused": []}
    for item in rest:
        parts[place[str(person[item["patient_id"]])]].append(item)
    return Parts(scored=scored, **parts)


def check_disjoint(parts: Mapping[str, Sequence[Mapping[str, Any]]], accept_look_alikes: bool = False) -> None:
    """Make sure that no patient is in two parts, and no scan under two ids; warn of volumes that are nearly the same.

    Args:
        parts: items by name of the part.
        accept_look_alikes: take ids that look alike for different people.

    Raises:
        InputError: with the ids; both, where they look alike or have the same voxels.
    """
    where: dict[str, dict[str, None]] = defaultdict(dict)
    for name, items in parts.items():
        for patient in patients_of(items):
            where[canonical_patient_id(patient)][name] = None
    rows = [(patient, " and ".join(names)) for patient, names in sorted(where.items()) if len(names) > 1]
    if rows:
        raise InputError.many(
            f"{len(rows)} patients are in two parts of the split",
            rows,
            "Give each patient one fold: prepare the data set again, or volta3d merge --refold.",
        )
    if pairs := _shared(parts, voxel_hashes):
        raise InputError.many(
            f"{len(pairs)} pairs of ids have the same voxels, in two parts of the split",
            pairs,
            "Remove one of each from its source, and prepare it again.",
        )
    pairs = _shared(parts, lambda item: {loose_person(*who(item))})
    if pairs and accept_look_alikes:
        logger.warning("taken for different people: %s", "; ".join(map(" and ".join, pairs)))
    elif pairs:
        raise InputError.many(
            f"{len(pairs)} pairs of ids look alike, and may be one person each, in two parts of the split",
            pairs,
            "Write one person's ids alike and prepare again, or volta3d merge --refold, which gives them one fold; if "
            "they are different people, say --accept_look_alikes True.",
        )
    near = sorted(
        f"{item_name(first[i])} and {item_name(second[j])}"
        for first, second in combinations(parts.values(), 2)
        for i, j in near_copies_of(first, second)
    )
    if near:
        shown = "; ".join(near[:10]) + (" ..." if len(near) > 10 else "")
        warnings.warn(
            f"{len(near)} pairs of volumes in two parts of the split are nearly the same, and may be copies of one "
            f"scan: {shown}",
            stacklevel=2,
        )


def _shared(
    parts: Mapping[str, Sequence[Mapping[str, Any]]], keys: Callable[[Mapping[str, Any]], set[str]]
) -> list[tuple[str, str]]:
    """Pairs of patients in different parts who share a key."""
    holders: dict[str, dict[str, str]] = defaultdict(dict)
    for name, items in parts.items():
        for item in items:
            for key in keys(item):
                holders[key].setdefault(name, str(item["patient_id"]))
    return sorted({(min(pair), max(pair)) for held in holders.values() for pair in combinations(held.values(), 2)})


def check_shares(parts: Mapping[str, Sequence[Any]], processes: int) -> None:
    """Make sure that every process has scans of every part, where a part has any; ``training`` must have some.

    MONAI's evaluators skip a process without scans, and the others would wait for it for ever.

    Raises:
        InputError: naming the parts, their scans, and the number of processes; or if there is nobody to train on.
    """
    if not parts.get("training", True):
        raise InputError("nobody to train on; take a larger fraction, or prepare more subjects")
    rows = [(name, f"{len(items)} scans") for name, items in parts.items() if 0 < len(items) < processes]
    if rows:
        most = min(len(items) for items in parts.values() if items)
        raise InputError.many(
            f"{processes} processes cannot share a part of fewer scans",
            rows,
            f"Start no more than {most} (torchrun --nproc_per_node, crossval --gpus-per-run), or make the part larger: "
            "a larger fraction or validation_fraction, fewer folds (volta3d prepare --folds), more subjects.",
        )


def check_classes(parts: Parts, classes: Sequence[str], fraction: float = 1.0, validation: bool = True) -> None:
    """Make sure that every part has every class, before anything is trained.

    Raises:
        InputError: naming the part, the class, and the subjects that are there.
    """

    def lacking(items: Sequence[Item]) -> list[str]:
        there = {int(item["label"]) for item in items}
        return [name for index, name in enumerate(classes) if index not in there]

    def by_class(items: Sequence[Item]) -> str:
        counts = Counter(classes[int(item["label"])] for item in items)
        return ", ".join(f"{counts[name]} {name}" for name in classes)

    def listed(items: Sequence[Item]) -> list[tuple[str, str]]:
        return [(item_name(item), classes[int(item["label"])]) for item in items]

    if missing := lacking(parts.scored):
        raise InputError.many(
            f"the scored fold has no scan labelled {', '.join(missing)}; it has {by_class(parts.scored)}",
            listed(parts.scored),
            "Prepare the data set with fewer folds (volta3d prepare --folds), or with more subjects.",
        )
    whole = [*parts.training, *parts.validation, *parts.unused]
    if missing := lacking(whole):
        raise InputError.many(
            f"the training part has no scan labelled {', '.join(missing)}; it has {by_class(whole)}",
            listed(whole),
            "Prepare the data set with more folds, or with more subjects.",
        )
    for name, items in (("training", parts.training), ("inner validation", parts.validation)):
        if (name == "training" or validation) and (missing := lacking(items)):
            raise InputError.many(
                f"fraction {fraction:g} is too small: of {len(whole)} scans in the training part ({by_class(whole)}) "
                f"it leaves no scan labelled {', '.join(missing)} for {name}; there are {by_class(items)}",
                listed(items),
                "Take a larger fraction, or prepare more subjects.",
            )


def class_weights(items: Sequence[Mapping[str, Any]], num_classes: int) -> Tensor:
    """Weights ``[num_classes]`` that balance the classes in a cross-entropy: ``n / (num_classes * n_class)``.

    Raises:
        InputError: if a class has no items.
    """
    counts = np.bincount([int(item["label"]) for item in items], minlength=num_classes)
    if counts.min() == 0:
        raise InputError(f"class {int(counts.argmin())} has no items to compute a weight from")
    return torch.tensor(len(items) / (num_classes * counts), dtype=torch.float32)
