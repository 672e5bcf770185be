# SPDX-License-Identifier: Apache-2.0
"""The leak guard on random cohorts, whose maker knows who is who: no leak passes, and no innocent pair is refused."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from volta_components.data.datalist import Datalist, assign_folds, make_content
from volta_components.data.overlaps import find_overlaps
from volta_components.downstream.leaks import check_model, find_overlap
from volta_components.downstream.splits import split_items
from volta_components.errors import InputError
from volta_components.training.people import facts_of, sealed

Item = dict[str, Any]
SUBJECT = ("", "sub-", "SUB-", "sub_", "Sub-", "subject ", "subj-", "sub")
SEPARATORS = ("", "-", "_", " ")


def ixi(rng: random.Random, n: int) -> str:
    number = f"{n:0{rng.choice((1, 3, 3, 4))}d}"
    end = rng.choice(("", "", "-Guys-0828-T1", "_T1"))
    return rng.choice(("", "sub-", "SUB-")) + rng.choice(("IXI", "ixi", "Ixi")) + rng.choice(SEPARATORS) + number + end


def aibl(rng: random.Random, n: int) -> str:
    number = f"{n:0{rng.choice((1, 3, 4))}d}"
    return rng.choice(("", "sub-", "sub_")) + rng.choice(("AIBL", "aibl")) + rng.choice(SEPARATORS[:3]) + number


def adni(rng: random.Random, n: int) -> str:
    separator = rng.choice(SEPARATORS[:3])
    number = f"{n % 7:03d}{separator}{rng.choice('Ss')}{separator}{n:04d}"
    return rng.choice(("", "sub-ADNI", "adni_", "ADNI_")) + number


def brats(task: str) -> Callable[[random.Random, int], str]:
    def write(rng: random.Random, n: int) -> str:
        if rng.random() < 0.1:
            return f"sub-BraTS{task}{n:05d}{rng.randrange(3):03d}"
        separator = rng.choice("-_")
        time = rng.choice(("", "", f"{separator}000", f"{separator}101"))
        name = separator.join((rng.choice(("BraTS", "brats", "BRATS")), rng.choice((task, task.lower()))))
        return rng.choice(("", "sub-")) + f"{name}{separator}{n:05d}{time}"

    return write


def oasis(rng: random.Random, n: int) -> str:
    return rng.choice((f"OAS1_{n:04d}_MR{rng.randint(1, 3)}", f"sub-OASIS1{n:04d}", f"oas1-{n:04d}", f"OAS1_{n:04d}"))


def numbered(rng: random.Random, n: int) -> str:
    return rng.choice(SUBJECT) + f"{n:0{rng.choice((1, 2, 4))}d}"


def lettered(letter: str) -> Callable[[random.Random, int], str]:
    def write(rng: random.Random, n: int) -> str:
        word = rng.choice((letter, letter.lower()))
        return rng.choice(SUBJECT[:5]) + word + rng.choice(SEPARATORS) + f"{n:0{rng.choice((1, 2, 3))}d}"

    return write


def bare_or(write: Callable[[random.Random, int], str]) -> Callable[[random.Random, int], str]:
    """Within a public cohort, its people may also be written as numbers alone."""
    return lambda rng, n: numbered(rng, n) if rng.random() < 0.25 else write(rng, n)


# Who somebody is: a group of people and a number. How the group's people and its cohort may be written.
GROUPS: dict[str, tuple[Callable[[random.Random, int], str], tuple[str, ...]]] = {
    "ixi": (bare_or(ixi), ("ixi", "IXI")),
    "ixi elsewhere": (ixi, ("healthy", "mixture")),
    "aibl": (bare_or(aibl), ("aibl",)),
    "adni": (adni, ("adni", "harp")),
    "gli": (brats("GLI"), ("brats", "brats_2024")),
    "met": (brats("MET"), ("brats", "tumours")),
    "oasis": (oasis, ("oasis", "local_oasis")),
    "clinic": (numbered, ("clinic", "Clinic")),
    "other clinic": (numbered, ("clinic_b", "Clinic-B", "clinic b")),
    "patients": (lettered("P"), ("ward",)),
    "controls": (lettered("K"), ("ward", "WARD")),
    "named after the cohort": (lettered("ward"), ("ward",)),
}
SAME_PEOPLE = {"ixi elsewhere": "ixi"}


class World:
    """Data sets of people who are drawn from a few groups, with sessions, copies of scans and changing spellings."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.owner: dict[str, tuple[str, int]] = {}
        self.scans = 0
        self.is_tidy = self.rng.random() < 0.4
        self.most = self.rng.choice((12, 40, 900))  # few numbers: many of the same number in other groups

    def dataset(self) -> list[Item]:
        items: list[Item] = []
        for group in self.rng.sample(sorted(GROUPS), self.rng.randint(1, 5)):
            write, cohorts = GROUPS[group]
            cohort = self.rng.choice(cohorts)
            for number in self.rng.sample(range(1, self.most + 1), self.rng.randint(4, 10)):
                person = (SAME_PEOPLE.get(group, group), number)
                spelled = write(self.rng, number)
                for _ in range(self.rng.choice((1, 1, 2, 3))):
                    spelled = spelled if self.is_tidy else write(self.rng, number)
                    # volta3d merge keeps apart what is written alike and is not the same.
                    if self.owner.setdefault(spelled, person) == person:
                        items.append(self.item(spelled, cohort, person))
        return items

    def item(self, patient: str, cohort: str, person: tuple[str, int], scan: int | None = None) -> Item:
        self.scans += scan is None
        scan = self.scans if scan is None else scan
        names = {"subject_id": f"{patient}#{self.rng.random()}", "patient_id": patient, "session": None}
        key = self.rng.choice(("voxels_sha256", "source_sha256", "sha256"))
        digest = hashlib.sha256(str(scan).encode()).hexdigest()
        hashes = {"source_sha256": digest, key: digest}
        return {**names, "image": "x", "cohort": cohort, "fold": 0, **hashes, "person": person, "scan": scan}

    def copy(self, item: Item) -> Item:
        """A scan under the id of somebody who is nobody else's."""
        name = f"copy{''.join(self.rng.choices('abcdefghij', k=12))}"
        return self.item(name, self.rng.choice(("elsewhere", item["cohort"])), (name, 0), item["scan"])


def shared(first: Sequence[Item], second: Sequence[Item]) -> set[str]:
    """Ids in ``first`` of people or scans that are in ``second``."""
    people, scans = {item["person"] for item in second}, {item["scan"] for item in second}
    return {item["patient_id"] for item in first if item["person"] in people or item["scan"] in scans}


def check_world(seed: int) -> tuple[bool, bool]:
    """Check one world; whether it has a leak, and whether it had one that folds had to prevent."""
    world = World(seed)
    rng = world.rng
    pretraining, task = world.dataset(), world.dataset()
    while not task or not pretraining:
        pretraining, task = world.dataset(), world.dataset()
    if rng.random() < 0.3:
        pretraining.append(world.copy(rng.choice(task)))
    if rng.random() < 0.3:
        task.append(world.copy(rng.choice(task)))

    folds = assign_folds(task, 4, seed)
    task = [{**item, "fold": folds[item["patient_id"]]} for item in task]
    where: dict[Any, set[int]] = defaultdict(set)
    spellings: dict[Any, set[str]] = defaultdict(set)
    for item in task:
        for who in (item["person"], item["scan"]):
            where[who].add(item["fold"])
            spellings[who].add(item["patient_id"])
    assert all(len(found) == 1 for found in where.values())
    prevented = any(len(found) > 1 for found in spellings.values())

    # Folds that keep nobody together are refused, and only these.
    careless = [{**item, "fold": rng.randrange(2)} for item in task]
    sides = [[item for item in careless if item["fold"] == fold] for fold in (0, 1)]
    if all(sides):
        try:
            split_items(careless, 0)
            refused = False
        except InputError:
            refused = True
        assert refused == bool(shared(*sides))

    used = sorted(set(folds.values()))
    fold = rng.choice(used)
    scored = [item for item in task if item["fold"] == fold]
    if len(used) > 1:
        parts = split_items(task, fold, seed=seed)
        assert not shared(parts.scored, parts.training + parts.validation)
        assert not shared(parts.validation, parts.training)
    else:
        scored = task
    leaked = shared(scored, pretraining)
    record = facts_of(pretraining)
    if rng.random() < 0.3:
        record = sealed(record, b"s" * 64)
    found = find_overlap(scored, record)
    assert {*found.known, *found.look_alikes} == leaked
    model = {"provenance": record, "pretraining": None}
    if leaked:
        with pytest.raises(InputError):
            check_model(model, scored)
    else:
        assert check_model(model, scored) == "none"

    lists = [_datalist(items, name) for items, name in ((pretraining, "a"), (task, "b"))]
    overlaps = find_overlaps(lists)
    inside = any(
        len(names) > 1 for items in (pretraining, task) for names in _holders(items).values()
    )  # one scan twice in a data set
    assert bool(overlaps.certain or overlaps.look_alikes) == bool(shared(task, pretraining) or inside or _apart(lists))
    return bool(leaked), prevented


def _holders(items: Sequence[Item]) -> dict[int, set[str]]:
    holders: dict[int, set[str]] = defaultdict(set)
    for item in items:
        holders[item["scan"]].add(item["subject_id"])
    return holders


def _apart(lists: Sequence[Datalist]) -> bool:
    """Whether somebody is in two folds of one datalist."""
    for datalist in lists:
        where: dict[Any, set[int]] = defaultdict(set)
        for item in datalist.content["training"]:
            where[item["person"]].add(item["fold"])
        if any(len(folds) > 1 for folds in where.values()):
            return True
    return False


def _datalist(items: Sequence[Item], name: str) -> Datalist:
    content = make_content(name, [1.0] * 3, [8] * 3, 0, 4, items, [])
    return Datalist(Path(name), content, content["hash"])


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 64)
    monkeypatch.setenv("VOLTA3D_SECRET", str(tmp_path / "secret"))


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 1200), marks=pytest.mark.slow)], ids=["200", "1000"]
)
def test_no_leak_passes_and_no_innocent_pair_is_refused(seeds: range, secret: None) -> None:
    found = [check_world(seed) for seed in seeds]
    # The worlds are of all kinds.
    for leaked in zip(*found, strict=True):
        assert 0.1 < sum(leaked) / len(found) < 0.95
