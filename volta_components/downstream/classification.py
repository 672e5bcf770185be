# SPDX-License-Identifier: Apache-2.0
"""The classification bundles' items, thresholds and results."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from ignite.engine import Engine

from volta_components.data.datalist import Datalist
from volta_components.data.identity import grouped
from volta_components.data.items import item_name
from volta_components.data.sessions import in_order, spelled_alike
from volta_components.distributed import process_rank
from volta_components.downstream.leaks import check_model
from volta_components.downstream.metrics import auroc_interval, sensitivity_specificity, youden_threshold
from volta_components.downstream.pictures import write_classification_picture
from volta_components.downstream.results import PICTURE, PICTURES, FoldResults, ItemRows, Results, with_limits
from volta_components.downstream.splits import EVERYBODY, Item, Parts, counted
from volta_components.errors import InputError
from volta_components.training.cost import training_cost

logger = logging.getLogger(__name__)
POSITIVE = 1
YOUDEN = "youden"
INNER = "inner validation"  # where it was chosen
SESSIONS = ("first", "all")


@dataclass(frozen=True)
class Labelled:
    """Items with ``label``, the index of their class (a label map is left behind), and why others are left out."""

    items: list[Item]
    left_out: list[tuple[str, str]]


def labelled_items(datalist: Datalist, key: str, classes: Sequence[object], sessions: str | int = "first") -> Labelled:
    """The datalist's items that belong to one of the classes.

    Args:
        datalist: the prepared data set; an empty one has none of them.
        key: where items have their class: ``sex``, ``diagnosis``.
        classes: values of ``key``, compared as text: 1 and "1" are the same; the second one is the positive class.
        sessions: which scans of a patient: ``first`` (the baseline, whatever its class), ``all``, or a session's name.

    Raises:
        InputError: if no item has ``key`` or the session at all, or a class has nobody.
    """
    names = [str(name) for name in classes]
    sessions = str(sessions)  # --sessions 1
    items: list[Item] = []
    left_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    there = {str(item.get("session") or "(none)") for item in datalist.items}
    if there and sessions not in SESSIONS and spelled_alike(sessions) not in map(spelled_alike, there):
        raise InputError(
            f"{datalist.path}: no scan has the session {sessions}, but {', '.join(sorted(there)[:10])}; set sessions "
            "to one of these, to first or to all"
        )
    for item in _in_order_of_time(datalist.items):
        first = item["patient_id"] not in seen
        seen.add(item["patient_id"])
        value, session = item.get(key), item.get("session")
        if sessions == "first" and not first:
            left_out.append((item_name(item), "not the patient's first session"))
        elif sessions not in SESSIONS and spelled_alike(session or "") != spelled_alike(sessions):
            left_out.append((item_name(item), f"session {session}"))
        elif str(value) not in names:
            left_out.append((item_name(item), f"{key} is {'not known' if value in (None, '') else value}"))
        else:
            items.append({**item, "label": names.index(str(value))})
    counts = Counter(int(item["label"]) for item in items)
    missing = [name for index, name in enumerate(names) if not counts[index]]
    if missing and len(datalist):
        values = Counter(str(item.get(key)) for item in datalist.items)
        raise InputError.many(
            f"{datalist.path}: no scan with {key} {' or '.join(missing)} among {len(datalist)} items; the values of "
            f"{key} are {', '.join(f'{value} ({count})' for value, count in sorted(values.items()))}",
            left_out or [(item_name(item), f"{key} is {item.get(key)}") for item in items],
            f"This bundle needs {key} {' and '.join(names)}: give participants.tsv (or the sessions' tables) with it "
            "to volta3d prepare, or set label_key and classes in the config.",
            limit=10,
        )
    items.sort(key=lambda item: (str(item["subject_id"]), str(item.get("session") or "")))
    if left_out:
        logger.info("%d of %d items are left out: %s", len(left_out), len(datalist), _reasons(left_out))
    logger.info("%s", ", ".join(f"{counts[index]} {name}" for index, name in enumerate(classes)))
    return Labelled(items, left_out)


def _in_order_of_time(items: Sequence[Item]) -> list[Item]:
    """Items by patient, each one's scans in the order that ``volta3d prepare`` knew, else by their sessions' names."""
    result = []
    for _, scans in sorted(grouped(items, lambda item: str(item["patient_id"])).items()):
        if any(scan.get("visit") is None for scan in scans):
            scans = in_order(scans, lambda scan: scan.get("session"), age=lambda scan: scan.get("age"))[0]
        else:
            scans = sorted(scans, key=lambda scan: int(scan["visit"]))
        result += scans
    return result


def _reasons(rows: Iterable[tuple[str, str]]) -> str:
    return "; ".join(
        f"{reason}: {len(found)} ({', '.join(name for name, _ in found[:5])}{', ...' if len(found) > 5 else ''})"
        for reason, found in sorted(grouped(rows, itemgetter(1)).items())
    )


def score_only(items: Sequence[Item], fold: int | str | None) -> Parts:
    """Items of one fold as the scored part, and nobody to train on.

    ``all`` or None is everybody. On a command line only ``all`` can say so, since ``monai.bundle`` drops ``--fold
    None`` and takes the config's own fold.

    Raises:
        InputError: if there are items, but none in the fold; if the command line says ``--fold None``.
    """
    if fold is not None and "--fold None" in " ".join(sys.argv).replace("--fold=", "--fold "):
        raise InputError(f"--fold None says nothing, and fold {fold} would be scored: say --fold all for everybody")
    scored = [item for item in items if fold in (None, EVERYBODY) or item["fold"] == fold]
    if items and not scored:
        raise InputError(f"fold {fold} has none of the {len(items)} items; choose another, or --fold all for everybody")
    others = [item for item in items if fold not in (None, EVERYBODY) and item["fold"] != fold]
    return Parts(training=[], validation=[], scored=scored, unused=others)


class ScoreTable(ItemRows):
    """Collects the probabilities that an evaluator predicts, by item, over all processes.

    MONAI's ``ClassificationSaver`` writes file names and raw outputs, which could not be joined with the datalist.
    """

    def batch_rows(self, output: Mapping[str, Any], items: Sequence[Item]) -> list[list[float]]:
        """Probability of each class."""
        return output["pred"].detach().float().softmax(dim=1).cpu().double().tolist()

    @property
    def labels(self) -> np.ndarray:
        """Classes of the items, ``[n]``."""
        return np.array([item["label"] for item in self.items])

    @property
    def scores(self) -> np.ndarray:
        """Probability of the positive class, ``[n]``, in the order of the items; see ``rows``."""
        return np.array(self.rows)[:, POSITIVE]


@dataclass(kw_only=True, eq=False)
class ClassificationResults(FoldResults):
    """Scores the fold with the network as it is, chooses the threshold, and writes predictions, numbers and model.

    Attributes:
        scoring: evaluator of the scored fold, with the metric ``auroc`` (MONAI's ``ROCAUC``).
        validation: evaluator of the inner validation part, which only ``youden`` needs. Both get a ``ScoreTable``.
        threshold: a number, or ``youden``: chosen on the inner validation part, and beside it (``optimistic_*``) on the
            scored fold itself, which makes the result look too good. None is a trained model's own.
    """

    validation: Any
    threshold: float | str | None

    def __post_init__(self) -> None:
        is_own = self.threshold is None and not self.parts.training
        if self.threshold != YOUDEN and not is_own and not isinstance(self.threshold, (int, float)):
            raise InputError(f"threshold {self.threshold!r}: a number, or {YOUDEN!r}")
        self.scores, self.validation_scores = ScoreTable(self.parts.scored), ScoreTable(self.parts.validation)
        self.scores.attach(self.scoring)
        if self.threshold == YOUDEN:
            self.validation_scores.attach(self.validation)

    def __call__(self, engine: Engine) -> Results:
        """Results of the last epoch."""
        cost, threshold = training_cost(engine), self.threshold
        if threshold == YOUDEN:
            # The last epoch's validation has this model's scores, unless the run was broken off after it.
            if self.validation_scores.epoch != engine.state.epoch:
                self.validation.run(engine.state.epoch)
            threshold = youden_threshold(self.validation_scores.labels, self.validation_scores.scores)
        assert threshold is not None
        metrics, intervals = self._score(float(threshold), self.threshold == YOUDEN)
        more = {"subjects": self.subjects, "cost": cost}
        record = {
            "threshold": float(threshold),
            "threshold_from": INNER if self.threshold == YOUDEN else "fixed",
            "metrics": metrics,
            "intervals": intervals,
            **more,
        }
        if process_rank() == 0:
            names = self.record.get("class_names", ("0", "1"))
            pair = self.scores.labels, self.scores.scores
            write_classification_picture(self.folder / PICTURES / PICTURE, *pair, float(threshold), names)
        caption = f"The scored fold ({len(self.parts.scored)} scans): ROC curve, and what is called what."
        self.keep(record, caption, shows_scans=False)
        return self.finished(with_limits(metrics, intervals), "predictions.csv", more)

    def evaluate(
        self, record: Mapping[str, Any], allow_leak: bool = False, accept_look_alikes: bool = False
    ) -> dict[str, float]:
        """Score a trained model and write ``predictions.csv`` and ``metrics.json``.

        The threshold is the one given, or else that in the model's record; ``metrics.json`` says which.

        Raises:
            InputError: see ``check_model``; or if there is no threshold to score at.
        """
        leak = check_model(record, self.parts.scored, allow_leak, accept_look_alikes)
        is_given = self.threshold not in (None, YOUDEN)
        threshold = self.threshold if is_given else record.get("threshold")
        if threshold is None:
            raise InputError(
                "the JSON beside the model has no threshold, which was chosen on its inner validation part; fetch the "
                "model with its JSON, or give a threshold (--threshold NUMBER)"
            )
        origin = "given" if is_given else str(record.get("threshold_from", "the model"))
        metrics, intervals = self._score(float(threshold), self.threshold == YOUDEN or origin == INNER)
        metrics = with_limits(metrics, intervals)
        limits = " to ".join(f"{end:.3f}" for end in intervals.get("auroc", ())) or "too few people for an interval"
        summary = (
            f"AUROC {metrics['auroc']:.3f} ({limits}), "
            f"sensitivity {metrics['sensitivity']:.3f}, specificity {metrics['specificity']:.3f} at "
            f"{metrics['threshold']:.3f}, {counted(self.scores.items)}; {self.folder / 'predictions.csv'}"
        )
        self.write_metrics(metrics, record, leak, summary, threshold_from=origin)
        return metrics

    def _score(self, threshold: float, with_best: bool) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Score the fold and write ``predictions.csv``: the numbers, and the interval of AUROC."""
        self.scoring.run()
        labels, scores = self.scores.labels, self.scores.scores
        best = youden_threshold(labels, scores) if with_best else None
        metrics = {"auroc": float(self.scoring.state.metrics["auroc"])}
        for prefix, value in (("", threshold), ("optimistic_", best)):
            if value is not None:
                sensitivity, specificity = sensitivity_specificity(labels, scores, value)
                metrics |= {
                    f"{prefix}sensitivity": sensitivity,
                    f"{prefix}specificity": specificity,
                    f"{prefix}threshold": value,
                }
        columns = ("label", "score", "prediction", "threshold", "optimistic_threshold")
        rows = (
            [label, repr(score), int(score >= threshold), threshold, best]
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        )
        self.write_scores(self.folder / "predictions.csv", columns, self.scores.items, rows)
        _, low, high = auroc_interval(labels, scores, [str(item["patient_id"]) for item in self.scores.items])
        return metrics, {"auroc": (low, high)} if math.isfinite(low) else {}
