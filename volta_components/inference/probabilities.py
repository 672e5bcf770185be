# SPDX-License-Identifier: Apache-2.0
"""Table of class probabilities."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.data import MetaTensor

from volta_components.downstream.classification import POSITIVE
from volta_components.files import atomic_path
from volta_components.inference.journal import Journal

logger = logging.getLogger(__name__)


class ProbabilityTable:
    """Writes a CSV of what an evaluator predicts: subject, session, file, a probability for each class, the call.

    Args:
        path: the table.
        classes: names of the classes.
        threshold: the positive class is called from this probability on; with None nothing is called.
        journal: keeps rows as they are made; the table has its rows then, of this start and earlier ones.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        classes: Sequence[str],
        threshold: float | None = 0.5,
        journal: Journal | None = None,
    ) -> None:
        self.path = Path(path)
        self.journal = journal
        self.classes = list(classes)
        self.threshold = threshold
        self.rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def _started(self) -> None:
        self.rows.clear()

    def _iteration_completed(self, engine: Any) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            probabilities = [float(value) for value in output["pred"].flatten()]
            image = item["image"]
            source = image.meta.get("filename_or_obj", "") if isinstance(image, MetaTensor) else ""
            called = "" if self.threshold is None else self.classes[int(probabilities[POSITIVE] >= self.threshold)]
            names = [item.get("subject_id") or "", item.get("session") or ""]
            self.rows.append([*names, source, *(f"{value:.6f}" for value in probabilities), called])
            if self.journal is not None and self.journal.has_begun:
                self.journal.add(source, self.rows[-1])

    def write(self) -> None:
        """Write the table."""
        rows = self.journal.rows() if self.journal is not None and self.journal.has_begun else self.rows
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["subject_id", "session", "file", *self.classes, "prediction"])
            writer.writerows(rows)
        if self.threshold is None:
            logger.warning(
                "the JSON beside the model has no threshold: probabilities only; give one (--threshold NUMBER)"
            )
        print(f"{len(rows)} predictions in {self.path}")
