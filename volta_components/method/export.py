# SPDX-License-Identifier: Apache-2.0
"""Writes the encoder when a pretraining is complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import nn

from volta_components.distributed import process_rank
from volta_components.errors import InputError
from volta_components.method.weights import keep_other_weights, keep_picture, save_encoder
from volta_components.training.cost import cost_metrics, training_cost
from volta_components.training.tracking import find_mlflow_handler

logger = logging.getLogger(__name__)
CAPTION = (
    "One training volume after epoch {}: as it is, as teacher and student see it (masked), the student's "
    "reconstruction, and the masked parts restored."
)


@dataclass(eq=False)
class EncoderExport:
    """Writes the encoder and summariser of the teacher (or student) when the run is complete.

    Attributes:
        path: the ``.safetensors`` file; a JSON of the same name holds configuration and provenance.
        networks: what can be exported, by name: ``teacher`` and ``student``.
        export: the name of the one to export.
        provenance: gives what is written into the JSON: ``volta_components.training.record.provenance`` with its
            arguments, called at the end, since what it says of many people takes time and memory.
        pictures: folder of the run's pictures (``ReconstructionPicture``); the last one is kept beside the encoder.

    Raises:
        InputError: if there is no network of that name.
    """

    path: str | os.PathLike[str]
    networks: Mapping[str, nn.Module]
    export: str
    provenance: Callable[[], Mapping[str, Any]]
    pictures: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.export not in self.networks:
            raise InputError(f"export {self.export!r}: choose {' or '.join(self.networks)}")

    def attach(self, engine: Engine) -> None:
        """Export when the run is complete."""
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _completed(self, engine: Engine) -> None:
        if process_rank():
            return
        more = {"exported": self.export, "epochs": engine.state.epoch, "iterations": engine.state.iteration}
        provenance = {**self.provenance(), **more}
        keep_other_weights(self.path, {"provenance": provenance})
        cost = training_cost(engine)
        facts: dict[str, Any] = {"cost": cost} if cost else {}
        if self.pictures is not None:
            picture = Path(self.pictures) / f"reconstruction_{engine.state.epoch:04d}.png"
            facts |= keep_picture(self.path, picture, CAPTION.format(engine.state.epoch), shows_scans=True)
        save_encoder(self.path, self.networks[self.export], provenance, **facts)  # type: ignore[arg-type]
        logger.info("encoder written to %s", self.path)
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None:
            run_id = mlflow_handler.cur_run.info.run_id
            mlflow_handler._log_metrics(cost_metrics(cost), step=engine.state.epoch)
            mlflow_handler.client.log_artifact(run_id, str(Path(self.path).with_suffix(".json")), "encoder")
