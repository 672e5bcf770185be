# SPDX-License-Identifier: Apache-2.0
"""What MLflow holds of finished runs: the only source of the report."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pandas as pd

from volta_components.crossval.store import mlflow_client, search_runs
from volta_components.data.identity import grouped
from volta_components.downstream.inits import BASE_INIT
from volta_components.downstream.tracking import PLAN_TAG, RECIPE_TAG
from volta_components.errors import InputError
from volta_components.files import plain_cell
from volta_components.report.paper import TASKS, Task, in_order
from volta_components.training.stores import check_store, store_file

# Parameters and tags that differ between the runs of one cross-validation by design.
# MONAI logs the last two; the epochs that a config says count as ``epochs``, or in the recipe's hash.
VARYING = {"fold", "fraction", "seed", "run_name", "epoch_length", "max_epochs"}
TABLES = {"classification": "predictions/predictions.csv", "segmentation": "predictions/scores.csv"}
TEXTS = ("subject_id", "patient_id", "session", "site", "sex")
NEEDED = {
    "classification": ["subject_id", "patient_id", "label", "score", "prediction"],
    "segmentation": ["subject_id", "patient_id", "dice", "hd95"],
}


@dataclass
class FinishedRun:
    """A finished run.

    Attributes:
        run_id: MLflow's.
        name: MLflow's run name.
        variant: the overlay that crossval took for the init; of a run started by hand, what its settings say.
        fold: the scored fold.
        fraction: share of the training part.
        seed: of the run.
        tags: all of them.
        params: all of them.
        metrics: the last value of each: ``auroc``, ``optimistic_epoch``, ``train/loss``.
        table: a row for each scored subject.
        started: milliseconds since 1970.
        ended: the same; after an interruption, of the last part.
    """

    run_id: str
    name: str
    variant: str
    fold: int
    fraction: float
    seed: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    started: int
    ended: int = 0
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def cell(self) -> tuple[str, float, int, int]:
        """Init, fraction, fold and seed: only one run of a cell counts."""
        return self.variant, self.fraction, self.fold, self.seed

    @property
    def by_hand(self) -> bool:
        """Whether it was started without crossval."""
        return "variant" not in self.tags


@dataclass(frozen=True)
class Alarm:
    """What casts doubt on a table: a title in a word or two, and whole sentences."""

    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.title}: {self.text}"


@dataclass
class Study:
    """The finished runs of one bundle on one data set.

    Attributes:
        bundle: its name.
        kind: ``classification`` or ``segmentation``.
        runs: one for each cell.
        notes: what a reader must know: what was left out, what is missing, what differs.
        alarms: what casts doubt on the numbers, to be shown with them: leaks, rows of runs that do not belong together.
        incomplete: whether a combination of init, fraction and fold, of those that have a run or that crossval was
            started for, has no run.
    """

    bundle: str
    kind: str
    runs: list[FinishedRun]
    notes: list[str] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    incomplete: bool = False

    @property
    def task(self) -> Task:
        """What the paper says of it: title, classes and numbers."""
        return TASKS.get(self.bundle, Task("", self.bundle))

    @property
    def phantom(self) -> bool:
        """Whether any run is of phantoms."""
        return any(run.tags.get("phantom") == "true" for run in self.runs)

    @property
    def variants(self) -> list[str]:
        """The inits, in the order of tables."""
        return in_order({run.variant for run in self.runs})

    @property
    def variants_at_largest(self) -> list[str]:
        """The inits with a run at the largest fraction, as most tables and figures need one."""
        return [variant for variant in self.variants if self.select(variant)]

    @property
    def fractions(self) -> list[float]:
        """Shares of the training part, rising."""
        return sorted({run.fraction for run in self.runs})

    def runs_of(self, variant: str) -> list[FinishedRun]:
        """All runs of an init."""
        return [run for run in self.runs if run.variant == variant]

    def select(self, variant: str, fraction: float | None = None) -> list[FinishedRun]:
        """Runs of an init, by fold; of the largest fraction unless told otherwise."""
        wanted = self.fractions[-1] if fraction is None else fraction
        found = [run for run in self.runs_of(variant) if run.fraction == wanted]
        return sorted(found, key=lambda run: (run.fold, run.seed))

    def select_one_seed(self, variant: str) -> list[FinishedRun]:
        """As ``select``, of each fold only the run with the lowest seed."""
        return list({run.fold: run for run in reversed(self.select(variant))}.values())[::-1]

    @property
    def several_seeds(self) -> bool:
        """Whether some fold was trained with more than one seed, all else equal."""
        return max(Counter(run.cell[:3] for run in self.runs).values()) > 1

    @property
    def reference(self) -> str:
        """The init that the others are compared with."""
        return self.variants_at_largest[0]


class Store:
    """An MLflow store, read only.

    Args:
        tracking_uri: its address.
        relocate: where the artifacts are now, if they were moved: the folder with a folder for each run id.

    Raises:
        InputError: if it is not there or is not MLflow's.
    """

    def __init__(self, tracking_uri: str, relocate: Path | None = None) -> None:
        from mlflow.exceptions import MlflowException

        # MLflow would create a missing database, retry a file that is no database, and wait minutes for an absent
        # server.
        check_store(tracking_uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.tracking_uri, self.relocate = tracking_uri, relocate
        try:
            self.client = mlflow_client(tracking_uri)
            self.experiments = {item.experiment_id: item.name for item in self.client.search_experiments()}
        except (MlflowException, ValueError) as error:
            raise InputError(f"{tracking_uri}: MLflow cannot read it ({error}); see --tracking-uri") from error
        except Exception as error:
            raise InputError(f"{tracking_uri}: not an MLflow store ({type(error).__name__}: {error})") from error
        self._folder = tempfile.TemporaryDirectory(prefix="volta3d-report-")
        self._copies: dict[tuple[str, str], Path | None] = {}

    def search(self, query: str) -> Iterator[Any]:
        """All runs that match a query, newest first."""
        return search_runs(self.client, self.experiments, query)

    def places(self, run_id: str) -> list[Path]:
        """Folders on this machine where a run's artifacts may be, the likeliest first; none of a remote store.

        MLflow keeps absolute paths, which are wrong once a folder was moved.
        """
        address = self.client.get_run(run_id).info.artifact_uri
        if not address.startswith(("file:", "/")):
            return []
        beside = [self.relocate] if self.relocate else []
        if database := store_file(self.tracking_uri):
            beside.append(database.parent / "mlruns")
        logged = Path(url2pathname(urlsplit(address).path))
        return list(dict.fromkeys([logged, *(folder / run_id / "artifacts" for folder in beside)]))

    def artifact(self, run_id: str, path: str) -> Path | None:
        """An artifact, or a copy of it on this machine; None if the run has none."""
        if (run_id, path) not in self._copies:
            places = self.places(run_id)
            self._copies[run_id, path] = next((item for place in places if (item := place / path).exists()), None)
            if not places:
                folder = Path(self._folder.name) / run_id / str(len(self._copies))
                folder.mkdir(parents=True)
                try:
                    self._copies[run_id, path] = Path(self.client.download_artifacts(run_id, path, str(folder)))
                except Exception:  # each kind of artifact store has its own way to say that there is no such file
                    self._copies[run_id, path] = None
        return self._copies[run_id, path]

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Steps and values of a metric; of a step that a resumed run has logged again, the last value."""
        found = sorted(self.client.get_metric_history(run_id, metric), key=attrgetter("timestamp"))
        return sorted({item.step: item.value for item in found}.items())


def read_studies(store: Store, experiments: list[str] | None = None) -> list[Study]:
    """The finished runs (of some experiments), by bundle, in the order of the paper's tables.

    Raises:
        InputError: if there are none, or a finished run lacks its table.
    """
    if experiments:
        unknown = sorted({*experiments} - {*store.experiments.values()})
        if unknown:
            known = ", ".join(sorted(store.experiments.values()))
            raise InputError(f"{store.tracking_uri}: no experiment {', '.join(unknown)}; it has {known}")
        store.experiments = {key: name for key, name in store.experiments.items() if name in experiments}
    finished: dict[str, list[FinishedRun]] = defaultdict(list)
    newest: dict[tuple[str, str], int] = {}
    unreadable: dict[str, list[str]] = defaultdict(list)
    for item in store.search("tags.finished = 'true'"):
        tags, place = item.data.tags, (item.info.experiment_id, item.info.run_name)
        if {"bundle", "fold"} <= tags.keys() and tags["bundle"] != "pretrain":
            try:
                finished[tags["bundle"]].append(_finished_run(item))
            except (KeyError, ValueError) as error:
                unreadable[tags["bundle"]].append(f"{item.info.run_name} ({item.info.run_id}: {error})")
                continue
            newest[place] = max(newest.get(place, 0), int(item.info.start_time))
    if not finished:
        tags_of = "; ".join(name for names in unreadable.values() for name in names)
        raise InputError(
            f"{store.tracking_uri}: no finished run in {', '.join(sorted(store.experiments.values()))}"
            f"{f' with tags that can be read, but {tags_of}' if tags_of else ''}; "
            "run volta3d crossval, or name another store or experiment (--tracking-uri, --experiments)"
        )
    studies = [_study(store, bundle, finished[bundle]) for bundle in in_order(finished, TASKS)]
    unfinished = Counter(
        item.data.tags["bundle"]
        for item in store.search("attributes.status != 'FINISHED'")
        if "bundle" in item.data.tags
        and item.data.tags.get("finished") != "true"
        # What was begun again since, with other settings, and has ended, is not missing.
        and newest.get((item.info.experiment_id, item.info.run_name), 0) < int(item.info.start_time)
    )
    for study in studies:
        if names := unreadable[study.bundle]:
            text = f"Not counted: {_runs(len(names))} with tags that cannot be read: {'; '.join(sorted(names))}."
            study.notes.append(text)
        if unfinished[study.bundle]:
            study.notes.append(f"Not counted: {_runs(unfinished[study.bundle], '')} that did not finish.")
    return studies


def _finished_run(item: Any) -> FinishedRun:
    tags = item.data.tags
    return FinishedRun(
        run_id=item.info.run_id,
        name=item.info.run_name,
        variant=_variant(tags, item.data.params),
        fold=int(tags["fold"]),
        fraction=float(tags.get("fraction", 1.0)),
        seed=int(tags.get("seed", 0)),
        tags=dict(tags),
        params=dict(item.data.params),
        # Of the scored fold as the bundles call them; training curves keep MLflow's names.
        metrics={
            name.removeprefix("score/").replace("optimistic/", "optimistic_"): value
            for name, value in item.data.metrics.items()
        },
        started=int(item.info.start_time),
        ended=int(item.info.end_time or item.info.start_time),
    )


def _variant(tags: Mapping[str, str], params: Mapping[str, str]) -> str:
    """The init's name in tables; without crossval's tag, the overlay that the logged settings are those of."""
    init = tags["init"]
    if "variant" in tags or init != BASE_INIT:
        return tags.get("variant", init)
    full = "full" if float(params.get("encoder_rate", 1)) == 1 else "gentle"
    return {"0": "frozen", params.get("num_layers"): full}.get(params.get("unfrozen_blocks", ""), init)


def _study(store: Store, bundle: str, runs: list[FinishedRun]) -> Study:
    notes: list[str] = []
    # Newest first; what was started by hand comes last, so that it decides nothing where crossval was at work.
    runs = sorted(runs, key=lambda run: (run.by_hand, -run.started))
    datalists = Counter(run.tags.get("datalist_hash", "") for run in runs)
    datalist, *others = datalists
    for other in others:
        notes.append(f"Not counted: {_runs(datalists[other])} of another datalist ({other[:12] or 'unnamed'}).")
    runs = [run for run in runs if run.tags.get("datalist_hash", "") == datalist]
    planned = {run.variant for run in runs if not run.by_hand}
    extra = [run for run in runs if run.by_hand and run.variant in planned]
    if extra:
        names = ", ".join(sorted(run.name for run in extra))
        notes.append(
            f"Not counted: {_runs(len(extra))} started by hand, of an init that volta3d crossval was run for: {names}."
        )
    runs = [run for run in runs if run not in extra]
    cells: dict[tuple[str, float, int, int], FinishedRun] = {}
    for run in runs:
        cells.setdefault(run.cell, run)
    if repeated := len(runs) - len(cells):
        notes.append(f"Not counted: {_runs(repeated)} of an init, fraction, fold and seed that has a newer one.")
    kept = list(cells.values())
    kind = _read_tables(store, kept)
    study = Study(bundle, kind, kept, notes)
    _note_missing(study)
    leaks = sorted(run.name for run in kept if run.tags.get("leak", "none") != "none")
    if leaks:
        text = (
            f"Leak allowed in {len(leaks)} of {len(kept)} runs: patients of the scored part were, or may have been, in "
            f"the pretraining set. Their results are too good: {', '.join(leaks)}."
        )
        study.alarms.append(Alarm("Leak", text))
    _find_mixed_rows(study)
    _find_unequal_training(study)
    _find_runs_by_hand(study)
    return study


def _read_tables(store: Store, runs: list[FinishedRun]) -> str:
    kind = ""
    for run in runs:
        found = {kind: file for kind, path in TABLES.items() if (file := store.artifact(run.run_id, path))}
        if not found:
            tried = " nor in ".join(map(str, store.places(run.run_id))) or store.tracking_uri
            raise InputError(
                f"run {run.name} ({run.run_id}) is marked finished, but neither {' nor '.join(TABLES.values())} is in "
                f"{tried}. If the artifacts were moved, name the folder that now holds {run.run_id}: "
                "--relocate FOLDER. If they are lost, the run's own folder has the table as well; put it back there"
            )
        kind_here, file = next(iter(found.items()))
        kind = kind or kind_here
        table = pd.read_csv(file)
        texts = pd.read_csv(file, dtype=str, keep_default_na=False, na_values=[""])  # somebody may be called NA
        table = table.assign(**{name: texts[name] for name in TEXTS if name in texts})
        table = table.map(plain_cell)
        absent = [column for column in NEEDED[kind_here] if column not in table]
        if absent or kind_here != kind:
            raise InputError(
                f"run {run.name} ({run.run_id}): {TABLES[kind_here]} has no column {', '.join(absent) or NEEDED[kind]}"
            )
        if kind == "classification":
            wrong = table.loc[~table["label"].isin([0, 1]) | ~table["score"].between(0, 1), "subject_id"].tolist()
            if wrong:
                raise InputError(
                    f"run {run.name} ({run.run_id}): labels must be 0 or 1 and scores in [0, 1], but are not for "
                    f"{', '.join(wrong[:20])}; score these subjects again"
                )
        run.table = table
    return kind


def _runs(count: int, kind: str = "finished ") -> str:
    return f"{count} {kind}run{'s' * (count != 1)}"


def _note_missing(study: Study) -> None:
    """Note what of the cross-validation has no run: inits, fractions and folds are those planned and those done."""
    plans = [json.loads(text) for text in {run.tags[PLAN_TAG] for run in study.runs if PLAN_TAG in run.tags}]

    def planned(name: str) -> set[Any]:
        return {value for plan in plans for value in plan[name]}

    variants = planned("inits") | {*study.variants}
    fractions = planned("fractions") | {*study.fractions}
    folds = planned("folds") | {run.fold for run in study.runs}
    full = {*itertools.product(variants, fractions, folds)}
    absent = sorted(full - {run.cell[:3] for run in study.runs})
    study.incomplete = bool(absent)
    if absent:
        cells = ", ".join(f"{variant} fold {fold} fraction {fraction:g}" for variant, fraction, fold in absent)
        study.notes.append(f"{len(absent)} of {len(full)} combinations have no finished run: {cells}.")
    study.notes += [
        f"{variant} has no run at the largest fraction ({study.fractions[-1]:.0%}): only tables and figures by "
        "fraction have its numbers."
        for variant in study.variants
        if variant not in study.variants_at_largest
    ]
    study.notes += [f"The paper's {variant} was not run." for variant in study.task.paper if variant not in variants]


def _find_mixed_rows(study: Study) -> None:
    """All runs of a row must have the same settings, but for those that a cross-validation varies."""
    for variant in study.variants:
        runs = study.runs_of(variant)
        settings = [{**run.params, "encoder_sha256": run.tags.get("encoder_sha256", "")} for run in runs]
        keys = {key for known in settings for key in known} - VARYING
        found = {key: {known[key] for known in settings if key in known} for key in sorted(keys)}
        mixed = {key: values for key, values in found.items() if len(values) > 1}
        # Crossval's hash of the whole configuration; older stores do not have it.
        recipes = {run.tags[RECIPE_TAG] for run in runs if RECIPE_TAG in run.tags}
        if not mixed and len(recipes) > 1:
            mixed = {"the merged configuration's hash": {recipe[:8] for recipe in recipes}}
        if mixed:
            text = "; ".join(f"{key} is {' or '.join(sorted(values)[:4])}" for key, values in mixed.items())
            study.alarms.append(
                Alarm(
                    "Mixed settings",
                    f"The runs of {variant} do not all have the same settings, so its row mixes several models: "
                    f"{text}. Start volta3d crossval again to train all of them with the same settings.",
                )
            )
    versions = grouped(study.runs, lambda run: run.tags.get("code_version", "an unknown version"))
    if len(versions) > 1:
        parts = (f"{version} ({_by_variant(study, runs)})" for version, runs in sorted(versions.items()))
        study.notes.append(
            f"Mixed code: not all runs were trained by the same version of the code: {'; '.join(parts)}. Differences "
            "between them may come from the code."
        )


def _by_variant(study: Study, runs: list[FinishedRun]) -> str:
    counts = Counter(run.variant for run in runs)
    return ", ".join(f"{_runs(counts[variant], '')} of {variant}" for variant in study.variants if counts[variant])


def _find_unequal_training(study: Study) -> None:
    """Inits are compared at the same number of epochs and the same batch size, and from the same encoder."""
    for key, what in {"epochs": "epochs", "batch_size": "batch size"}.items():
        budgets = {variant: {run.params.get(key, "?") for run in study.select(variant)} for variant in study.variants}
        if len({frozenset(value) for value in budgets.values() if value}) > 1:
            text = ", ".join(f"{variant} {'/'.join(sorted(value))}" for variant, value in budgets.items() if value)
            study.alarms.append(Alarm("Unequal training", f"The inits do not have the same {what}: {text}."))
    encoders: dict[str, list[str]] = defaultdict(list)
    for variant in study.variants:
        for sha in sorted({run.tags.get("encoder_sha256", "") for run in study.select(variant)} - {""}):
            encoders[sha].append(variant)
    if len(encoders) > 1:
        text = ", ".join(f"{' and '.join(variants)} from {sha[:12]}" for sha, variants in encoders.items())
        study.notes.append(f"Different encoders: pretrained inits did not start from the same one: {text}.")


def _find_runs_by_hand(study: Study) -> None:
    names = {variant: sorted(run.name for run in study.runs_of(variant) if run.by_hand) for variant in study.variants}
    rows = "; ".join(f"the row {variant} ({', '.join(found)})" for variant, found in names.items() if found)
    if not rows:
        return
    text = f"Not started by volta3d crossval: {rows}."
    if all(run.by_hand for run in study.runs):
        study.notes.append(text)
    else:
        text += " Apart from the logged settings, nothing ensures that it was trained like the other rows."
        study.alarms.append(Alarm("Started by hand", text))
