# SPDX-License-Identifier: Apache-2.0
"""Order and learning rate of a fine-tuning; the tags and the record that say what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from volta_components.data.datalist import Datalist
from volta_components.downstream.leaks import Origin
from volta_components.downstream.splits import Parts
from volta_components.errors import InputError
from volta_components.training.record import code_version, provenance
from volta_components.training.schedules import CosineSchedule

# Set by crossval: hashes of all that decides a run's result, and of what all runs of an init share; and the inits,
# fractions and folds of the cross-validation, as JSON.
SETTINGS_TAG = "crossval_settings"
RECIPE_TAG = "crossval_recipe"
PLAN_TAG = "crossval_plan"


@dataclass(eq=False)
class TrainingPlan:
    """Order and learning rate of a ``SupervisedTrainer``, as functions of epoch and mini-batch: nothing to restore.

    The learning rate warms up from 0 and then follows a cosine over the whole run, mini-batch by mini-batch; see
    ``CosineSchedule``. MONAI's ``LrScheduleHandler`` drives PyTorch's schedulers, whose counters would have to be saved
    with the run. The loader's sampler is told where each epoch begins. A group of the optimiser gets its ``rate``, a
    share of the learning rate; see ``tuning_groups``.

    Attributes:
        learning_rate: after the warm-up.
        final_learning_rate: of the last mini-batch.
        warmup_epochs: length of the warm-up.
        frozen_epochs: in so many first epochs, groups marked ``pretrained`` do not move. Their gradients are thrown
            away: the optimiser skips a parameter that has none, and keeps no running means of it.

    Raises:
        InputError: at the start of a run, if the warm-up is longer than the run, or nothing pretrained ever moves.
    """

    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_epochs: float = 0
    frozen_epochs: int = 0

    def __post_init__(self) -> None:
        self._schedule: CosineSchedule | None = None

    def attach(self, engine: Engine) -> None:
        """Follow epochs and mini-batches."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)
        if self.frozen_epochs:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._backward_completed)

    def _started(self, engine: Engine) -> None:
        length, epochs = engine.state.epoch_length, engine.state.max_epochs
        assert length is not None and epochs is not None
        if not 0 <= self.frozen_epochs < max(1, epochs):
            raise InputError(
                f"frozen_epochs {self.frozen_epochs} in a run of {epochs} epochs: give fewer, so that the encoder "
                "trains as well, or unfrozen_blocks 0 to keep it as it is"
            )
        warmup = int(self.warmup_epochs * length)
        self._schedule = CosineSchedule(self.learning_rate, self.final_learning_rate, epochs * length, warmup)

    def _epoch_started(self, engine: Any) -> None:
        engine.data_loader.sampler.set_position(engine.state.epoch)

    def _iteration_started(self, engine: Any) -> None:
        assert self._schedule is not None
        rate = self._schedule(engine.state.iteration - 1)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)

    def _backward_completed(self, engine: Any) -> None:
        if engine.state.epoch <= self.frozen_epochs:
            for group in engine.optimizer.param_groups:
                for parameter in group["params"] if group.get("pretrained") else ():
                    parameter.grad = None


def share_text(fraction: Any) -> str:
    """A fraction in names and tags: as short as can be, and another for each number (0.3333333)."""
    short = f"{fraction:g}" if isinstance(fraction, (int, float)) else str(fraction)
    return short if not isinstance(fraction, float) or float(short) == fraction else repr(fraction)


def run_name(init: str, fold: Any, fraction: Any, seed: Any) -> str:
    """The name of a run; also of values that cannot be, which ``check_ids`` names."""
    return f"{init}_fold{fold}_frac{share_text(fraction)}_seed{seed}"


def run_tags(settings: Mapping[str, Any], datalist: Datalist, origin: Origin) -> dict[str, str]:
    """The tags by which MLflow's runs are found and compared; ``finished`` comes last, by ``FinishRun``."""
    cohorts = {str(item.get("cohort", "")) for item in datalist.content["training"]} | {datalist.name}
    return {
        **{name: str(settings[name]) for name in ("bundle", "init", "fold", "seed")},
        "fraction": share_text(settings["fraction"]),
        "datalist_hash": datalist.hash,
        "datalist_name": datalist.name,
        "code_version": code_version(),
        "encoder_sha256": origin.encoder_sha256,
        "pretrain_datalist_hash": origin.pretrain_datalist_hash,
        "leak": origin.leak,
        "phantom": str(any("phantom" in cohort.lower() for cohort in cohorts)).lower(),
    }


def model_record(
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    datalist: Datalist,
    parts: Parts,
    origin: Origin,
    **classes: Sequence[str] | str,
) -> dict[str, Any]:
    """The record beside a trained network, without its results: what it was made from, which patients it has seen."""
    return {
        "bundle": tags["bundle"],
        **classes,
        "tags": dict(tags),
        "pretraining": origin.record,
        "provenance": provenance(settings, datalist.hash, parts.training + parts.validation, datalist.name),
    }
