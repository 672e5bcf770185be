# SPDX-License-Identifier: Apache-2.0
"""What the results of both kinds of task share: rows by item, the trained model, the record of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import nn

from volta_components.distributed import gather_objects, process_rank
from volta_components.downstream.splits import Item, Parts
from volta_components.downstream.start import save_model
from volta_components.files import write_csv, write_json
from volta_components.method.weights import keep_other_weights, keep_picture

logger = logging.getLogger(__name__)

PICTURES = "pictures"  # folder beside the scores, and of MLflow's artifacts
PICTURE = "scored.png"  # in it
ENDS = ("low", "high")
PERSON_COLUMNS = ("subject_id", "patient_id", "session", "site", "sex", "age")


@dataclass(frozen=True)
class Results:
    """What a finished run leaves.

    Attributes:
        metrics: final numbers, for MLflow and the record.
        artifacts: files or folders within the run's folder, each with the folder of MLflow's artifacts that it goes to.
        record: more of the run's record: whatever JSON can hold.
    """

    metrics: Mapping[str, float]
    artifacts: Sequence[tuple[str, str]]
    record: Mapping[str, Any] = field(default_factory=dict)


def with_limits(metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Numbers, and after them the ends of their intervals: ``auroc_low``, ``auroc_high``."""
    ends = {f"{name}_{end}": value for name, pair in intervals.items() for end, value in zip(ENDS, pair, strict=True)}
    return {**metrics, **ends}


class ItemRows:
    """Collects a row for each item that an evaluator goes through, over all processes.

    Args:
        items: the data set's items, found by the index that ``KeyedCacheDataset`` gives as ``key``.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.epoch: int | None = None
        self._rows: dict[int, Any] = {}

    def batch_rows(self, output: Mapping[str, Any], items: Sequence[Item]) -> Iterable[Any]:
        """The rows of a mini-batch, of the evaluator's ``pred`` and ``label``."""
        raise NotImplementedError

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self) -> None:
        self.epoch = None
        self._rows.clear()

    def _iteration_completed(self, engine: Any) -> None:
        indices = [int(key[1]) for key in engine.state.batch["key"].tolist()]
        rows = self.batch_rows(engine.state.output, [self.items[index] for index in indices])
        self._rows.update(zip(indices, rows, strict=True))

    def _completed(self, engine: Engine) -> None:
        self._rows = dict(gather_objects(list(self._rows.items())))
        self.epoch = engine.state.epoch

    @property
    def rows(self) -> list[Any]:
        """A row for each item, in their order.

        Raises:
            RuntimeError: if the evaluator has not been through all of them.
        """
        if len(self._rows) != len(self.items):
            raise RuntimeError(f"{len(self._rows)} of {len(self.items)} items have been scored")
        return [self._rows[index] for index in range(len(self.items))]


@dataclass(kw_only=True, eq=False)
class FoldResults:
    """The results of a fold.

    ``FinishRun`` calls them at the end of a training; ``evaluate`` scores a trained model.

    Attributes:
        parts: who is trained on, who validates, who is scored.
        scoring: evaluator of the scored fold; its network has no distributed wrapper.
        output_dir: the run's folder.
        model_path: where the trained network goes; None to keep none.
        record: written beside the network: classes, settings, provenance.
    """

    parts: Parts
    scoring: Any
    output_dir: str | os.PathLike[str]
    model_path: str | os.PathLike[str] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir)

    @property
    def network(self) -> nn.Module:
        """The network that is scored."""
        network: nn.Module = self.scoring.network
        return network

    def __call__(self, engine: Engine) -> Results:
        """Results of a run that is complete."""
        raise NotImplementedError

    @property
    def subjects(self) -> dict[str, int]:
        """Number of scans in each part."""
        return {name: len(getattr(self.parts, name)) for name in ("training", "validation", "scored", "unused")}

    def keep(self, record: Mapping[str, Any], caption: str = "", shows_scans: bool = True) -> None:
        """Write the model, if it is kept, with what its record says besides, and the run's picture with its caption."""
        if self.model_path is not None and process_rank() == 0:
            keep_other_weights(self.model_path, self.record)
            picture = keep_picture(self.model_path, self.folder / PICTURES / PICTURE, caption, shows_scans)
            save_model(self.model_path, self.network, {**self.record, **picture, **record})
            logger.info("model written to %s", self.model_path)

    def finished(self, metrics: Mapping[str, float], scores: str, record: Mapping[str, Any]) -> Results:
        """What ``FinishRun`` hands to MLflow; ``scores`` is a file or folder within the run's folder."""
        reports = [("pretrained.txt", "")] if (self.folder / "pretrained.txt").is_file() else []
        pictures = [(PICTURES, PICTURES)] if (self.folder / PICTURES).is_dir() else []
        return Results(metrics, [(scores, "predictions"), *reports, *pictures], record)

    def write_scores(self, path: Path, columns: Sequence[str], items: Sequence[Item], rows: Iterable[Any]) -> None:
        """Write a row for each item: who it is, then its numbers."""
        if process_rank() == 0:
            facts = ([item.get(key) for key in PERSON_COLUMNS] for item in items)
            write_csv(path, [*PERSON_COLUMNS, *columns], ([*who, *row] for who, row in zip(facts, rows, strict=True)))

    def write_metrics(
        self, metrics: Mapping[str, float], model: Mapping[str, Any], leak: str, summary: str, **more: Any
    ) -> None:
        """Write ``metrics.json`` of a trained model, and print the summary.

        ``model`` is the record beside it; ``leak`` what ``check_model`` said. The config's record names the data set.
        """
        if process_rank() == 0:
            data = self.record.get("provenance", {})
            origin = {
                "model_sha256": model.get("sha256"),
                "datalist_name": data.get("cohort"),
                "datalist_hash": data.get("datalist_hash"),
            }
            content = {"metrics": metrics, **more, "leak": leak, "scored": len(self.parts.scored), **origin}
            write_json(self.folder / "metrics.json", content)
            whole = sum(self.subjects.values())
            folds = sorted({str(item.get("fold")) for item in self.parts.scored})
            named = f"fold {folds[0]}" if len(folds) == 1 else f"{len(folds)} folds"
            more_of_them = not self.parts.training and len(self.parts.scored) < whole
            hint = "; --fold all scores everybody" * more_of_them
            print(f"{summary}\n{named}: {len(self.parts.scored)} of {whole} scans{hint}\n{self.folder}")
