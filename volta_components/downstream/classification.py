# SPDX-License-Identifier: Apache-2.0
"""The classification bundles' items, thresholds and results."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from torch import distributed as dist
from torch import nn

from volta_components.data.datalist import Datalist
from volta_components.distributed import process_count, process_rank
from volta_components.downstream.leaks import check_model
from volta_components.downstream.metrics import auroc_interval, sensitivity_specificity, youden_threshold
from volta_components.downstream.splits import Item, Parts, item_name
from volta_components.downstream.start import save_model
from volta_components.downstream.tracking import Results
from volta_components.errors import InputError
from volta_components.files import atomic_path, write_json

logger = logging.getLogger(__name__)
POSITIVE = 1


YOUDEN = "youden"


SESSIONS = ("first", "all")


COLUMNS = ("subject_id", "patient_id", "session", "site", "sex", "age")


@dataclass(frozen=True)
class Labelled:
    """Items that have a class.

    Attributes:
        items: with ``label``, the index of the class (a label map of the datalist's is left behind).
        left_out: subject and reason of every other item.
    """

    items: list[Item]
    left_out: list[tuple[str, str]]


def labelled_items(datalist: Datalist, key: str, classes: Sequence[str], sessions: str = "first") -> Labelled:
    """The datalist's items that belong to one of the classes.

    Args:
        datalist: the prepared data set.
        key: where items have their class: ``sex``, ``diagnosis``.
        classes: values of ``key``; the second one is the positive class.
        sessions: which scans of a patient: ``first`` (the baseline, whatever its class), ``all``, or a session's name.

    Raises:
        InputError: if no item has ``key`` at all, or a class has nobody.
    """
    items: list[Item] = []
    left_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    everything = sorted(datalist.items, key=lambda item: (str(item["patient_id"]), str(item.get("session") or "")))
    for item in everything:
        first = item["patient_id"] not in seen
        seen.add(item["patient_id"])
        value, session = item.get(key), item.get("session")
        if sessions == "first" and not first:
            left_out.append((item_name(item), "not the patient's first session"))
        elif sessions not in SESSIONS and session != sessions:
            left_out.append((item_name(item), f"session {session}"))
        elif not isinstance(value, str) or value not in classes:
            left_out.append((item_name(item), f"{key} is {value or 'not known'}"))
        else:
            items.append({**item, "label": list(classes).index(value)})
    counts = Counter(int(item["label"]) for item in items)
    missing = [name for index, name in enumerate(classes) if not counts[index]]
    if missing:
        values = Counter(str(item.get(key)) for item in datalist.items)
        raise InputError.many(
            f"{datalist.path}: nobody with {key} {' or '.join(missing)} among {len(datalist)} items; the values of "
            f"{key} are {', '.join(f'{value} ({count})' for value, count in sorted(values.items()))}",
            left_out or [(item_name(item), f"{key} is {item.get(key)}") for item in items],
            f"This bundle needs {key} {' and '.join(classes)}: give participants.tsv (or the sessions' tables) with it "
            "to volta3d prepare, or set label_key and classes in the config.",
            limit=10,
        )
    items.sort(key=lambda item: (str(item["subject_id"]), str(item.get("session") or "")))
    if left_out:
        logger.info("%d of %d items are left out: %s", len(left_out), len(datalist), _reasons(left_out))
    logger.info("%s", ", ".join(f"{counts[index]} {name}" for index, name in enumerate(classes)))
    return Labelled(items, left_out)


def _reasons(rows: Iterable[tuple[str, str]], names: int = 5) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in rows:
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{reason}: {len(who)} ({', '.join(who[:names])}{', ...' if len(who) > names else ''})"
        for reason, who in sorted(by_reason.items())
    )


def score_only(items: Sequence[Item], fold: int | None) -> Parts:
    """Items of one fold (or of all, with None) as the scored part, and nobody to train on.

    Raises:
        InputError: if the fold has no items.
    """
    scored = [item for item in items if fold is None or item["fold"] == fold]
    if not scored:
        raise InputError(
            f"fold {fold} has none of the {len(items)} items; choose another, or --fold None for everybody"
        )
    return Parts(training=[], validation=[], scored=scored)


class ScoreTable:
    """Collects what an evaluator predicts, by item, over all processes.

    MONAI's ``ClassificationSaver`` writes file names and raw outputs; here predictions are found by the item's index,
    which ``KeyedDataset`` gives as ``key``, so that they can be joined with the datalist.

    Args:
        items: the data set's items.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.epoch: int | None = None
        self._rows: dict[int, list[float]] = {}

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self) -> None:
        self.epoch = None
        self._rows.clear()

    def _iteration_completed(self, engine: Any) -> None:
        probabilities = engine.state.output["pred"].detach().float().softmax(dim=1).cpu().double()
        for key, row in zip(engine.state.batch["key"].tolist(), probabilities.tolist(), strict=True):
            self._rows[int(key[1])] = row

    def _completed(self, engine: Engine) -> None:
        if process_count() > 1:
            parts: list[Any] = [None] * process_count()
            dist.all_gather_object(parts, self._rows)
            self._rows = {index: row for part in parts for index, row in part.items()}
        self.epoch = engine.state.epoch

    @property
    def labels(self) -> np.ndarray:
        """Classes of the items, ``[n]``."""
        return np.array([item["label"] for item in self.items])

    @property
    def probabilities(self) -> np.ndarray:
        """``[n, classes]``, in the order of the items.

        Raises:
            RuntimeError: if the evaluator has not been through all of them.
        """
        if len(self._rows) != len(self.items):
            raise RuntimeError(f"{len(self._rows)} of {len(self.items)} items have been scored")
        return np.array([self._rows[index] for index in range(len(self.items))])

    @property
    def scores(self) -> np.ndarray:
        """Probability of the positive class, ``[n]``."""
        return self.probabilities[:, POSITIVE]


class ClassificationResults:
    """Scores the fold with the network as it is, chooses the threshold, and writes predictions, numbers and model.

    Called by ``FinishRun`` at the end of training, or through ``evaluate`` for a trained model.

    Args:
        parts: who is trained on, who chooses the threshold, who is scored.
        network: the network.
        scoring: evaluator of the scored fold, with the metric ``auroc`` (MONAI's ``ROCAUC``).
        scores: its table.
        validation: evaluator of the inner validation part.
        validation_scores: its table.
        threshold: a number, or ``youden``: chosen on the inner validation part, and beside it (``optimistic_*``) on the
            scored fold itself, which flatters the result.
        output_dir: the run's folder.
        model_path: where the trained network goes; None to keep none.
        record: written beside the network: classes, settings, provenance.
    """

    def __init__(
        self,
        parts: Parts,
        network: nn.Module,
        scoring: Any,
        scores: ScoreTable,
        validation: Any,
        validation_scores: ScoreTable,
        threshold: float | str,
        output_dir: str | os.PathLike[str],
        model_path: str | os.PathLike[str] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if threshold != YOUDEN and not isinstance(threshold, (int, float)):
            raise InputError(f"threshold {threshold!r}: a number, or {YOUDEN!r}")
        self.parts = parts
        self.network = network
        self.scoring = scoring
        self.scores = scores
        self.validation = validation
        self.validation_scores = validation_scores
        self.threshold = threshold
        self.folder = Path(output_dir)
        self.model_path = None if model_path is None else Path(model_path)
        self.record = dict(record or {})

    def __call__(self, engine: Engine) -> Results:
        """Results of the last epoch."""
        threshold = self.threshold
        if threshold == YOUDEN:
            # The last epoch's validation has this model's scores, unless the run was broken off after it.
            if self.validation_scores.epoch != engine.state.epoch:
                self.validation.run(engine.state.epoch)
            threshold = youden_threshold(self.validation_scores.labels, self.validation_scores.scores)
        self.scoring.run()
        metrics = self._write(float(threshold), self.threshold == YOUDEN)
        patients = [str(item["patient_id"]) for item in self.parts.scored]
        _, low, high = auroc_interval(self.scores.labels, self.scores.scores, patients)
        record = {
            "threshold": float(threshold),
            "threshold_from": "inner validation" if self.threshold == YOUDEN else "fixed",
            "metrics": metrics,
            "intervals": {"auroc": [low, high]},
            "subjects": {
                name: len(getattr(self.parts, name)) for name in ("training", "validation", "scored", "unused")
            },
        }
        if self.model_path is not None and process_rank() == 0:
            save_model(self.model_path, self.network, {**self.record, **record})
            logger.info("model written to %s", self.model_path)
        artifacts = [("predictions.csv", "predictions")]
        if (self.folder / "pretrained.txt").is_file():
            artifacts.append(("pretrained.txt", ""))
        return Results(metrics, artifacts, {"subjects": record["subjects"]})

    def evaluate(self, record: Mapping[str, Any], allow_leak: bool = False) -> dict[str, float]:
        """Score a trained model at its own threshold; write ``predictions.csv`` and ``metrics.json``.

        Args:
            record: the JSON beside the model.
            allow_leak: score patients whom the model was, or may have been, trained or pretrained on all the same.

        Raises:
            InputError: see ``check_model``; or if there is no threshold to score at.
        """
        leak = check_model(record, self.parts.scored, allow_leak)
        threshold = record.get("threshold", self.threshold)
        if threshold == YOUDEN:
            raise InputError(
                "the JSON beside the model has no threshold, which was chosen on its inner validation part; fetch the "
                "model with its JSON, or give a threshold (--threshold NUMBER)"
            )
        self.scoring.run()
        metrics = self._write(float(threshold), self.threshold == YOUDEN)
        patients = [str(item["patient_id"]) for item in self.parts.scored]
        _, low, high = auroc_interval(self.scores.labels, self.scores.scores, patients)
        metrics |= {"auroc_low": low, "auroc_high": high}
        if process_rank() == 0:
            content = {"metrics": metrics, "leak": leak, "scored": len(self.parts.scored)}
            write_json(self.folder / "metrics.json", content)
            print(
                f"AUROC {metrics['auroc']:.3f} ({low:.3f} to {high:.3f}), sensitivity {metrics['sensitivity']:.3f}, "
                f"specificity {metrics['specificity']:.3f} at {metrics['threshold']:.3f}, {len(patients)} scans; "
                f"{self.folder / 'predictions.csv'}"
            )
        return metrics

    def _write(self, threshold: float, optimistic: bool) -> dict[str, float]:
        labels, scores = self.scores.labels, self.scores.scores
        sensitivity, specificity = sensitivity_specificity(labels, scores, threshold)
        metrics = {
            "auroc": float(self.scoring.state.metrics["auroc"]),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "threshold": threshold,
        }
        best: float | str = ""
        if optimistic:
            best = youden_threshold(labels, scores)
            sensitivity, specificity = sensitivity_specificity(labels, scores, best)
            metrics |= {
                "optimistic_sensitivity": sensitivity,
                "optimistic_specificity": specificity,
                "optimistic_threshold": best,
            }
        if process_rank() == 0:
            with (
                atomic_path(self.folder / "predictions.csv") as temporary,
                temporary.open("w", newline="", encoding="utf-8") as stream,
            ):
                writer = csv.writer(stream)
                names = ("label", "score", "prediction", "threshold", "optimistic_threshold")
                writer.writerow([*COLUMNS, *names])
                for item, score in zip(self.scores.items, scores, strict=True):
                    facts = ["" if item.get(key) is None else item[key] for key in COLUMNS]
                    writer.writerow(
                        [*facts, item["label"], repr(float(score)), int(score >= threshold), threshold, best]
                    )
        return metrics
