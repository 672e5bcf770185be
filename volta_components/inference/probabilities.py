# SPDX-License-Identifier: Apache-2.0
"""Table of class probabilities."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volta_components.downstream.classification import POSITIVE
from volta_components.inference.tables import ResultTable, marks_of, source_file

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class ProbabilityTable(ResultTable):
    """Writes a CSV of what an evaluator predicts: subject, session, file, a probability for each class, the call.

    Attributes:
        classes: names of the classes.
        threshold: the positive class is predicted from this probability on; None predicts no class.
    """

    classes: Sequence[str]
    threshold: float | None = 0.5

    def result(self, item: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[list[Any], str, tuple[()]]:
        """Ids, file, probabilities and the call."""
        probabilities = [float(value) for value in output["pred"].flatten()]
        called = "" if self.threshold is None else self.classes[int(probabilities[POSITIVE] >= self.threshold)]
        file = source_file(item["image"])
        numbers = [f"{value:.6f}" for value in probabilities]
        return [item.get("subject_id"), item.get("session"), file, *numbers, called, marks_of(item["image"])], file, ()

    def write_table(self) -> None:
        """Write the table."""
        self.write_rows(["subject_id", "session", "file", *self.classes, "prediction", "marks"], "predictions")
        if self.threshold is None:
            logger.warning(
                "the JSON beside the model has no threshold: probabilities only; give one (--threshold NUMBER)"
            )
