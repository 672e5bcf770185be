# SPDX-License-Identifier: Apache-2.0
"""The numbers of a training for MLflow and the console."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

from volta_components.distributed import mean_over_processes, process_rank
from volta_components.errors import AGAIN, InputError, chain
from volta_components.files import sha256_json, write_text
from volta_components.training.record import code_version, other_settings, shown_settings
from volta_components.training.stores import check_experiment, share_rows

logger = logging.getLogger(__name__)

# A path from the root, at the beginning of a text or behind sqlite:/// or file://.
_ABSOLUTE = re.compile(r"""(?<![^\s"'=\[,])(?:sqlite:///|file://)?/(?!\.\.)[^\s"'/:]+(?:/[^\s"'/:]+)+""")
# A variable with the id of MLflow's run that a process logs to; crossval sets it.
RUN_ID = "VOLTA3D_RUN_ID"
OF_MONAI = MLFlowHandler.default_tracking_params  # parameters that MONAI's handler logs itself
MLFLOW_BATCH = 100  # parameters that a store takes at a time
# Of an epoch's means, what is printed; MONAI's ``StatsHandler`` would print all of them.
SHOWN = (
    *("loss", "loss_global", "loss_patch", "loss_reconstruction", "volumes_per_second"),
    *("global_teacher_entropy", "global_predicted", "patch_teacher_entropy", "patch_predicted"),
)
# Where MLflow's pages show a metric: a group for each prefix of our names.
GROUPS = {"train_": "train/", "val_": "val/", "validation_": "val/", "optimistic_": "optimistic/"}
DESCRIPTION = """Runs of the VolTA-3D bundle `{bundle}`.

- `train/`, `val/`: means by epoch. Validation is on a part of the training folds.
- `step/`: pretraining, means of a few mini-batches, by mini-batch.
- `score/`: the scored fold, once, at the end; `_low` and `_high` are 95 % limits.
- `optimistic/`: choices made on the scored fold itself. These numbers are too good.
- `cost/`: hours of training, and memory at its peak in GiB.
"""


def group_metrics(metrics: Mapping[str, Any], default: str) -> dict[str, Any]:
    """Metrics by the names that MLflow shows them under: ``val_auroc`` is ``val/auroc``.

    Args:
        metrics: by our names.
        default: group of a name without a prefix, such as ``train/``.
    """

    def place(name: str) -> str:
        prefix = next((prefix for prefix in GROUPS if name.startswith(prefix)), "")
        return GROUPS.get(prefix, default) + name.removeprefix(prefix)

    return {place(name): value for name, value in metrics.items()}


def find_mlflow_handler(engine: Engine) -> Any:
    """The MLflow handler that ``--tracking`` has attached to an engine and that has begun; ``None`` without one.

    ``monai.bundle`` appends it to the list of handlers after the config was read, so no config can refer to it.
    """
    return next((handler for handler in _mlflow_handlers(engine) if handler.cur_run is not None), None)


def prepare_handlers(engine: Engine, *others: Engine | None, settings: Mapping[str, Any] | None = None) -> None:
    """Make MLflow's handlers log what this project logs, before they look for their runs.

    A metric has one axis: epochs. MONAI's handler would also log the loss of every mini-batch, which takes longer than
    a small network's step. The name of a run becomes text: ``--run_name 7`` arrives as a number, and MLflow finds no
    run of that name, so that training and validation would be two runs, and a resumed training two more.

    MONAI's handler takes any open run of its name. A process that crossval has started is given its own: another
    cross-validation may train a run of the same name at the same time, with other settings.

    Args:
        engine: the trainer.
        others: their handlers log to the trainer's run.
        settings: of the run, see ``run_settings``. An open run of the same name and other settings is ended.
    """
    run_id = os.environ.get(RUN_ID)
    handlers = [handler for each in filter(None, (engine, *others)) for handler in _mlflow_handlers(each)]
    # Ignite knows a handler by each of its events.
    handlers = [*{id(handler): handler for handler in handlers}.values()]
    for handler in handlers:
        if run_id and handler.cur_run is None:
            handler.cur_run = handler.client.get_run(run_id)
        handler.iteration_logger = lambda _: None
        handler.epoch_logger = partial(_log_epoch, handler)
        if handler.run_name is not None:
            handler.run_name = str(handler.run_name)
        # Called when MONAI's handler starts, which comes last: a checkpoint of other settings was refused before.
        handler._set_experiment = partial(_begin, handler, handlers, handler._set_experiment, engine, settings)


def _begin(
    handler: Any,
    handlers: Sequence[Any],
    set_experiment: Callable[[], None],
    engine: Engine,
    settings: Mapping[str, Any] | None,
) -> None:
    """Set a handler's experiment, and the run of all handlers where there is none yet."""
    check_experiment(handler.client.get_experiment_by_name(handler.experiment_name), "--experiment_name NAME")
    share_rows(set_experiment)
    if settings is None or handler.run_name is None or handler.cur_run is not None:
        return
    ours = shown_settings(settings) | {name: getattr(engine.state, name, None) for name in OF_MONAI}
    place = handler.experiment.experiment_id
    found = None
    for run in handler.client.search_runs([place]):
        is_open = run.info.status != handler.run_finish_status and run.data.tags.get("superseded") != "true"
        if not is_open or run.info.run_name != handler.run_name:
            continue
        known = run.data.params
        if not other_settings(known, {name: str(ours[name]) for name in known if name in ours}):
            found = found or run
        # Crossval looks after its own runs: those of other settings may be in training.
        elif not any(name.startswith("crossval_") for name in run.data.tags):
            handler.client.set_tag(run.info.run_id, "superseded", "true")
            handler.client.set_terminated(run.info.run_id, "KILLED")
    found = found or handler.client.create_run(experiment_id=place, run_name=handler.run_name)
    for each in handlers:
        each.cur_run = found


def _log_epoch(handler: Any, engine: Engine) -> None:
    if engine.state.metrics:
        handler._log_metrics(group_metrics(engine.state.metrics, "train/"), step=engine.state.epoch)


def _mlflow_handlers(engine: Engine) -> Iterator[Any]:
    for handlers in engine._event_handlers.values():
        for handler, *_ in handlers:
            owner = getattr(handler, "__self__", None)
            if owner is None:
                owner = getattr(getattr(handler, "__wrapped__", None), "__self__", None)
            if isinstance(owner, MLFlowHandler):
                yield owner


def describe_run(
    handler: Any,
    settings: Mapping[str, Any],
    tags: Mapping[str, Any],
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    device: torch.device,
) -> None:
    """Give MLflow a run's settings, tags and data sets, and say what its experiment is.

    Args:
        handler: see ``find_mlflow_handler``.
        settings: see ``run_settings``. Those that MLflow has already are left as they are.
        tags: by name.
        data: items of each part, such as ``training``. MLflow gets their number and hash, not the items.
        device: where the run computes.
    """
    from mlflow.tracking.context.registry import resolve_tags

    client, run_id = handler.client, handler.cur_run.info.run_id
    known = client.get_run(run_id).data.params
    params = [(name, value) for name, value in shown_settings(settings).items() if name not in known]
    for start in range(0, len(params), MLFLOW_BATCH):
        handler._log_params(dict(params[start : start + MLFLOW_BATCH]))
    made = {"command": command_line(sys.orig_argv), "hardware": hardware(device)}
    for name, value in {**resolve_tags(), **made, **tags}.items():
        client.set_tag(run_id, name, hide_folders(str(value)))
    # The merged config, which MONAI uploads at the end.
    for path in (Path(str(artifact)) for artifact in handler.artifacts or () if artifact):
        if path.suffix == ".json" and path.is_file() and process_rank() == 0:
            write_text(path, hide_folders(path.read_text(encoding="utf-8")))
    experiment = handler.cur_run.info.experiment_id
    about = DESCRIPTION.format(bundle=tags.get("bundle", "?"))
    share_rows(lambda: client.set_experiment_tag(experiment, "mlflow.note.content", about))
    name = str(tags.get("datalist_name") or tags.get("bundle") or "datalist")
    inputs = [
        _dataset_input(name, str(tags.get("datalist_hash", "")), part, items) for part, items in data.items() if items
    ]
    if inputs:
        share_rows(lambda: client.log_inputs(run_id, datasets=inputs))


def command_line(words: Sequence[str]) -> str:
    """A command as one would type it, without folders; see ``hide_folders``."""
    quoted = (
        f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)
        for word in map(hide_folders, words)
    )
    return " ".join(quoted)


def hide_folders(text: str) -> str:
    """A text with only the last two parts of absolute paths: stores and reports are passed on, folders name people."""
    return _ABSOLUTE.sub(lambda match: "/".join(match[0].rsplit("/", 2)[-2:]), text)


def _dataset_input(name: str, datalist: str, part: str, items: Sequence[Mapping[str, Any]]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scans = sorted([str(item.get("subject_id", "")), str(item.get("session") or "")] for item in items)
    profile = {"scans": len(items), "patients": len({str(item.get("patient_id", "")) for item in items})}
    dataset = Dataset(
        name=f"{name} ({part})",
        digest=sha256_json(scans)[:32],
        source_type="datalist",
        source=json.dumps({"datalist_sha256": datalist}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", part)])


def device_of(engine: Any) -> torch.device:
    """Where an engine computes; configs and commands may name it by a text."""
    return torch.device(getattr(engine.state, "device", None) or "cpu")


def hardware(device: torch.device) -> str:
    """The name of a device: the GPU's, or the processor's with the number of cores that may be used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor, {joblib.cpu_count()} cores"


class TrainingRecord:
    """Means of a mini-batch's numbers, for the log, MLflow and the end of an epoch.

    MONAI's MLflow handler records one loss and the learning rate; this one gives it every number that the trainer
    returns: ``step/NAME``, averaged over ``interval`` mini-batches and all processes. The epoch's means go into
    ``engine.state.metrics``, where MONAI's handlers look for them; MLflow has them as ``train/NAME``. After a resume in
    the middle of an epoch, its means cover only the remaining mini-batches.

    Args:
        settings: recorded as parameters; the bundle, the seed and the datalist's hash as tags as well.
        interval: mini-batches over which to average; those between two readings of the trainer's numbers.
    """

    def __init__(self, settings: Mapping[str, Any], interval: int = 8) -> None:
        self.settings = dict(settings)
        tags = {name: settings[name] for name in ("bundle", "seed", "datalist_hash") if name in settings}
        self.tags = {"code_version": code_version(), **tags}
        self.interval = interval
        self._described = False
        self._recent: list[Mapping[str, float]] = []
        self._epoch: list[Mapping[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch and epoch."""
        # Before StatsHandler's, which prints a traceback that Python prints once more.
        engine.add_event_handler(Events.EXCEPTION_RAISED, raise_error)
        engine.add_event_handler(Events.STARTED, prepare_handlers, settings=self.settings)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _iteration_completed(self, engine: Any) -> None:
        # Not yet the numbers in it: those may still be on the device, and are read later.
        self._recent.append(engine.state.output[0])
        self._epoch.append(engine.state.output[0])
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None and not self._described:
            items = getattr(getattr(engine.state.dataloader, "dataset", None), "data", [])
            describe_run(mlflow_handler, self.settings, self.tags, {"training": items}, device_of(engine))
        self._described = True
        if engine.state.iteration % self.interval == 0:
            means = _means(self._recent, engine.state.device)
            if mlflow_handler is not None:
                numbers = {f"step/{name}": value for name, value in means.items()}
                mlflow_handler._log_metrics(numbers, step=engine.state.iteration)

    def _completed(self, engine: Engine) -> None:
        mlflow_handler = None if self._described else find_mlflow_handler(engine)
        if mlflow_handler is None:
            return
        run_id = mlflow_handler.cur_run.info.run_id
        if not mlflow_handler.client.get_run(run_id).data.metrics:
            # Nothing was left to train, and MONAI's handler has opened a new run beside the finished one.
            mlflow_handler.client.set_tag(run_id, "superseded", "true")

    def _epoch_completed(self, engine: Any) -> None:
        means = _means(self._epoch, engine.state.device)
        engine.state.metrics |= means
        if process_rank() == 0:
            numbers = ", ".join(f"{name} {means[name]:.4g}" for name in SHOWN if name in means)
            logger.info("epoch %d of %s: %s", engine.state.epoch, engine.state.max_epochs, numbers)


def raise_error(engine: Engine, error: BaseException) -> None:
    """Raise an engine's error before MONAI's ``StatsHandler`` prints its traceback; one of MLflow with its store.

    Raises:
        InputError: if MLflow's store failed, which its own error does not name.
    """
    handler = next(_mlflow_handlers(engine), None)
    stores = ("mlflow", "sqlalchemy", "sqlite3")
    cause = next((each for each in chain(error) if type(each).__module__.split(".")[0] in stores), None)
    if handler is not None and cause is not None:
        raise InputError(
            f"{handler.client.tracking_uri}: MLflow's store failed ({str(cause).splitlines()[0]}); see that it is "
            f"there, not locked, and on a disk with space, {AGAIN}"
        ) from error
    raise error


def _means(numbers: list[Mapping[str, float]], device: torch.device) -> dict[str, float]:
    """Means of the numbers by name, over all processes; the list is emptied.

    Computed on the training's device: NCCL cannot reduce tensors on the CPU.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for own in numbers:
        for name, value in own.items():
            values[name].append(float(value))
    numbers.clear()
    names = sorted(values)
    means = torch.tensor([float(np.mean(values[name])) for name in names], dtype=torch.float64, device=device)
    return dict(zip(names, mean_over_processes(means).tolist(), strict=True))
