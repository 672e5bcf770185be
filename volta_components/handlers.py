# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers: resuming, recording, watching for collapse, pictures, export."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from volta_components.distributed import mean_over_processes, process_rank
from volta_components.errors import InputError
from volta_components.files import atomic_path, remove_partials, write_json
from volta_components.masking import VISIBLE
from volta_components.record import code_version

logger = logging.getLogger(__name__)


def find_mlflow_handler(engine: Engine) -> Any:
    """The MLflow handler that ``--tracking`` has attached to an engine, if any.

    ``monai.bundle`` appends it to the list of handlers after the configuration was read, so that no configuration can
    refer to it. ``None`` when there is none.
    """
    for handlers in engine._event_handlers.values():
        for handler, *_ in handlers:
            owner = getattr(handler, "__self__", None)
            if owner is None:
                owner = getattr(getattr(handler, "__wrapped__", None), "__self__", None)
            if isinstance(owner, MLFlowHandler) and owner.cur_run is not None:
                return owner
    return None


def refer(handler: Any) -> Any:
    """The handler itself: an entry of a config's list of handlers that has an id of its own elsewhere in the config.

    Plain references would do to run it, but what looks for a handler in such a list (``check_properties``, MONAI Label)
    expects every entry to be a dictionary with a ``_target_``.

    Args:
        handler: by reference, ``"@train#record"``.
    """
    return handler


class ResumableCheckpoint:
    """Saves a run so that the same command, started again, goes on where it was.

    MONAI's ``CheckpointSaver`` writes in place, so that a run killed while saving loses its only checkpoint; it also
    knows nothing of accumulation windows. This handler writes beside and renames, saves only where no gradient is
    pending, and refuses a checkpoint of a run with other settings. Loading is ``weights_only``. The trainer's gradient
    scaler, which MONAI makes when the run starts, is saved with the rest.

    Args:
        path: the checkpoint file.
        objects: what to save, by name: anything with ``state_dict`` and ``load_state_dict``.
        settings: the run's settings by name; they must be the same when it is resumed.
        interval: mini-batches between two checkpoints; a multiple of the accumulation window. 0: ends of epochs only.
        window: mini-batches of an accumulation window.
        minutes: least time between two checkpoints at ends of epochs; 0: at the end of every epoch. The last epoch
            always has one, as scoring begins after it.

    Raises:
        InputError: if the interval is not a multiple of the window, or at the start of a run when the checkpoint
            belongs to other settings or cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        objects: Mapping[str, Any],
        settings: Mapping[str, Any],
        interval: int = 0,
        window: int = 1,
        minutes: float = 0.0,
    ) -> None:
        if interval % window:
            raise InputError(
                f"checkpoint interval {interval} is not a multiple of the {window} accumulated mini-batches"
            )
        self.path = Path(path)
        self.objects = {
            name: item.module if isinstance(item, DistributedDataParallel) else item for name, item in objects.items()
        }
        self.settings = _plain(dict(settings))
        self.interval = interval
        self.window = window
        self.minutes = minutes
        self._last_save = time.monotonic()

    def attach(self, engine: Engine) -> None:
        """Load at the start; save at intervals and at ends of epochs."""
        engine.add_event_handler(Events.STARTED, self.load)
        if self.interval:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._interval_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _interval_completed(self, engine: Engine) -> None:
        length = engine.state.epoch_length
        place = engine.state.iteration % length if length else 0
        # The end of an epoch has its own checkpoint, after what other handlers do there.
        if place and place % self.interval == 0:
            self.save(engine)

    def _epoch_completed(self, engine: Engine) -> None:
        waited = time.monotonic() - self._last_save
        if waited >= 60 * self.minutes or engine.state.epoch == engine.state.max_epochs:
            self.save(engine)

    def save(self, engine: Engine) -> None:
        """Write the checkpoint, atomically, from the first process."""
        if process_rank():
            return
        state = {name: item.state_dict() for name, item in self.objects.items()}
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        state["engine"] = {
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "max_epochs": engine.state.max_epochs,
        }
        state["settings"] = self.settings
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)
        self._last_save = time.monotonic()

    def load(self, engine: Engine) -> None:
        """Restore a run if there is a checkpoint; what a killed run left half written is removed."""
        self._last_save = time.monotonic()
        if not process_rank():
            remove_partials(self.path.parent)
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, progress = state["settings"], state["engine"]
        except Exception as error:
            raise InputError(
                f"{self.path}: not a checkpoint of this project ({type(error).__name__}); remove it to start anew"
            ) from error
        there, here = _leaves(settings), _leaves(self.settings)
        rows = [
            (name, str(there.get(name)), str(here.get(name)))
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if rows:
            raise InputError.many(
                f"{self.path} belongs to a run with other settings (name, there, here)",
                rows,
                "Choose another run_name (--run_name NAME), or remove the checkpoint to start anew.",
            )
        for name, item in self.objects.items():
            item.load_state_dict(state[name])
        if state.get("scaler"):
            engine.scaler.load_state_dict(state["scaler"])  # type: ignore[attr-defined]
        engine.load_state_dict(progress)
        logger.info("resumed %s at mini-batch %d", self.path, engine.state.iteration)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, so that of a block only what differs is shown."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def _plain(value: Any) -> Any:
    """Settings as types that a ``weights_only`` checkpoint can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


class TrainingRecord:
    """Means of a mini-batch's numbers, for the log, MLflow and the end of an epoch.

    MONAI's MLflow handler records one loss and the learning rate; this one gives it every number that the trainer
    returns, averaged over ``interval`` mini-batches and all processes, and puts the epoch's means into
    ``engine.state.metrics``, where all of MONAI's handlers look for them. In an epoch that a broken run goes on with,
    means are of the mini-batches since.

    Args:
        settings: recorded as parameters.
        interval: mini-batches over which to average.
        tags: recorded as tags, such as the seed or the datalist's hash.
    """

    def __init__(self, settings: Mapping[str, Any], interval: int = 8, tags: Mapping[str, Any] | None = None) -> None:
        self.settings = _leaves(_plain(dict(settings)))
        self.tags = {"code_version": code_version(), **_plain(dict(tags or {}))}
        self.interval = interval
        self._described = False
        self._recent: dict[str, list[float]] = defaultdict(list)
        self._epoch: dict[str, list[float]] = defaultdict(list)

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch and epoch."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _iteration_completed(self, engine: Any) -> None:
        for name, value in engine.state.output[0].items():
            self._recent[name].append(value)
            self._epoch[name].append(value)
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None and not self._described:
            run_id = mlflow_handler.cur_run.info.run_id
            known = mlflow_handler.client.get_run(run_id).data.params
            mlflow_handler._log_params({k: v for k, v in self.settings.items() if k not in known})
            for name, value in self.tags.items():
                mlflow_handler.client.set_tag(run_id, name, str(value))
        self._described = True
        if engine.state.iteration % self.interval == 0:
            means = _means(self._recent, engine.state.device)
            if mlflow_handler is not None:
                mlflow_handler._log_metrics(means, step=engine.state.iteration)

    def _completed(self, engine: Engine) -> None:
        mlflow_handler = None if self._described else find_mlflow_handler(engine)
        if mlflow_handler is None:
            return
        run_id = mlflow_handler.cur_run.info.run_id
        if not mlflow_handler.client.get_run(run_id).data.metrics:
            # Nothing was left to train, and MONAI's handler has opened a new run beside the finished one.
            mlflow_handler.client.set_tag(run_id, "superseded", "true")

    def _epoch_completed(self, engine: Any) -> None:
        engine.state.metrics |= _means(self._epoch, engine.state.device)


def log_epoch(engine: Engine) -> None:
    """One line for an epoch, with what one looks at first; for MONAI's ``StatsHandler``, whose own lists everything."""
    numbers = engine.state.metrics
    parts = [
        f"loss {numbers['loss']:.3f} (global {numbers['loss_global']:.3f}, patch {numbers['loss_patch']:.3f}, "
        f"reconstruction {numbers['loss_reconstruction']:.4f})",
        *(
            f"{branch}: entropy {numbers[f'{branch}_teacher_entropy']:.2f}, "
            f"predicted {numbers[f'{branch}_predicted']:.3f} of ln K"
            for branch in ("global", "patch")
        ),
        f"{numbers['volumes_per_second']:.2f} volumes/s",
    ]
    logger.info("epoch %d of %s: %s", engine.state.epoch, engine.state.max_epochs, "; ".join(parts))


def _means(numbers: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Means of the numbers, over all processes; the lists are emptied.

    Computed on the training's device: NCCL reduces nothing that lies on the CPU.
    """
    names = sorted(numbers)
    means = torch.tensor([float(np.mean(numbers[name])) for name in names], dtype=torch.float64, device=device)
    numbers.clear()
    return dict(zip(names, mean_over_processes(means).tolist(), strict=True))


class CollapseError(RuntimeError):
    """A branch of the self-distillation has died."""


class CollapseMonitor:
    """Stops a run whose teacher has collapsed, and says which branch died.

    Watches, as running means: the teacher's entropy in both branches as a share of ``ln K`` (near 1: uniform, near 0:
    a single prototype); what the student tells of the targets beyond their mean (at 0, views of a volume agree on
    nothing: the teacher's sharpening makes targets of noise, which the entropy does not show); and the effective rank
    of the last summaries (the exponential of the entropy of their covariance's eigenvalues; near 1: every volume has
    the same embedding). Adds ``effective_rank`` to the trainer's numbers.

    Args:
        low: entropies under this share of ``ln K`` count as a collapse to a point.
        high: entropies over this share count as a uniform collapse.
        min_predicted: shares of ``ln K`` that the student tells of the targets; less counts as targets of noise.
        min_rank: effective ranks under this count as a collapse of the embeddings.
        patience: mini-batches that a collapse must last to stop the run.
        grace: mini-batches at the start that never count.
        smoothing: share of the old running mean kept at a mini-batch.
        queue_size: summaries over which the rank is taken.
        rank_interval: mini-batches between two computations of the rank.
    """

    REMEDIES = (
        "Try more local crops or larger ones (num_local, local_side_mm), gentler geometry (rotation_degrees, "
        "translation_mm, global_zoom), another centre_momentum or target_entropy, fewer prototypes (head_out_dim), a "
        "larger batch, or an overlay against collapse: configs/sinkhorn.json or configs/koleo.json."
    )

    def __init__(
        self,
        low: float = 0.02,
        high: float = 0.995,
        min_predicted: float = 0.001,
        min_rank: float = 1.05,
        patience: int = 4000,
        grace: int = 2000,
        smoothing: float = 0.95,
        queue_size: int = 256,
        rank_interval: int = 16,
    ) -> None:
        self.low = low
        self.high = high
        self.min_predicted = min_predicted
        self.min_rank = min_rank
        self.patience = patience
        self.grace = grace
        self.smoothing = smoothing
        self.rank_interval = rank_interval
        self.means: dict[str, float] = {}
        self.bad: dict[str, int] = defaultdict(int)
        self.queue: deque[torch.Tensor] = deque(maxlen=queue_size)

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def state_dict(self) -> dict[str, Any]:
        """Running means, counters and the queue."""
        queue = torch.stack(list(self.queue)) if self.queue else torch.empty(0)
        return {"means": dict(self.means), "bad": dict(self.bad), "queue": queue}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.means = dict(state["means"])
        self.bad = defaultdict(int, state["bad"])
        self.queue.clear()
        self.queue.extend(state["queue"].unbind(0) if len(state["queue"]) else ())

    def _iteration_completed(self, engine: Any) -> None:
        output = engine.state.output[0]
        iteration = engine.state.iteration
        self.queue.extend(engine.summaries.cpu().unbind(0))
        checks = []
        for branch in ("global", "patch"):
            mean = self._smoothed(branch, output[f"{branch}_teacher_entropy"])
            predicted = self._smoothed(f"{branch}_predicted", output[f"{branch}_predicted"])
            checks += [
                (f"{branch} branch: the teacher's output is uniform", mean > self.high, f"entropy {mean:.3f} of ln K"),
                (f"{branch} branch: the teacher's output is a point", mean < self.low, f"entropy {mean:.3f} of ln K"),
                (
                    f"{branch} branch: the student tells nothing of the teacher's targets beyond their mean",
                    predicted < self.min_predicted,
                    f"predicted {predicted:.4f} of ln K",
                ),
            ]
        if iteration % self.rank_interval == 0 and len(self.queue) >= 16:
            self.means["rank"] = effective_rank(torch.stack(list(self.queue)))
        if "rank" in self.means:
            rank = self.means["rank"]
            output["effective_rank"] = rank
            checks.append(("summaries: every volume has the same", rank < self.min_rank, f"effective rank {rank:.2f}"))
        for name, is_bad, figure in checks:
            self.bad[name] = self.bad[name] + 1 if is_bad and iteration > self.grace else 0
            if self.bad[name] >= self.patience:
                raise CollapseError(
                    f"collapsed for {self.bad[name]} mini-batches, at mini-batch {iteration}: {name} ({figure}). "
                    + self.REMEDIES
                )

    def _smoothed(self, name: str, value: float) -> float:
        self.means[name] = self.means.get(name, value) * self.smoothing + value * (1 - self.smoothing)
        return self.means[name]


def effective_rank(rows: torch.Tensor) -> float:
    """Exponential of the entropy of the covariance's normalised eigenvalues.

    Args:
        rows: ``[n, D]``.

    Returns:
        Between 1 and ``min(n - 1, D)``; 1 when all rows are equal.

    Source: Roy and Vetterli, 2007, on eigenvalues of the covariance.
    """
    values = torch.linalg.svdvals((rows - rows.mean(dim=0)).double()).square()
    total = values.sum()
    if total <= 1e-12 * rows.double().square().sum():
        return 1.0
    return float(torch.exp(torch.special.entr(values / total).sum()))


class ReconstructionPicture:
    """Every few epochs, a picture of original, masked and reconstructed slices of one volume.

    The volume, its crops and its mask are the same every time, so that pictures can be compared.

    Args:
        folder: where PNG files are written.
        volume: ``[1, D, H, W]`` in [0, 1], or an item of the data set that has it as ``image``.
        interval: epochs between two pictures.
    """

    def __init__(self, folder: str | os.PathLike[str], volume: Any, interval: int = 10) -> None:
        self.folder = Path(folder)
        self.volume = volume["image"] if isinstance(volume, Mapping) else volume
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Draw after the first epoch, every ``interval`` epochs, and after the last."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Any) -> None:
        epoch = engine.state.epoch
        if process_rank() or not (epoch == 1 or epoch == engine.state.max_epochs or epoch % self.interval == 0):
            return
        path = self.folder / f"reconstruction_{epoch:04d}.png"
        self.draw(engine, path)
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None:
            mlflow_handler.client.log_artifact(mlflow_handler.cur_run.info.run_id, str(path), "pictures")

    @torch.no_grad()
    def draw(self, engine: Any, path: Path) -> None:
        """Write the picture of the engine's present student."""
        from matplotlib.figure import Figure

        student = engine.plain_student
        volume = torch.as_tensor(self.volume).to(engine.state.device)[None]
        views = engine.views(volume, [(0, 0)])
        with engine.autocast():
            tokens = student.network.encode(views.student[0])
            restored = student.network.decode(tokens, student.network.token_grid(views.student[0])).float()
        images = {
            "original": views.image[0],
            "teacher's view": views.teacher[0],
            "student's view": views.student[0],
            "reconstruction": restored,
            "masked parts restored": torch.where(views.masked[0], restored, views.image[0]),
        }
        figure = Figure(figsize=(3 * len(images), 6.5), layout="constrained")
        axes = figure.subplots(2, len(images))
        for column, (title, image) in enumerate(images.items()):
            array = image[0, 0].cpu().numpy()
            axial, coronal = array[:, :, array.shape[2] // 2], array[:, array.shape[1] // 2]
            for row, plane in enumerate((axial, coronal)):
                axes[row, column].imshow(plane.T, origin="lower", cmap="gray", vmin=0, vmax=1)
                axes[row, column].set_axis_off()
            axes[0, column].set_title(title)
        figure.suptitle(f"epoch {engine.state.epoch}")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=80)


class ReconstructionCheck:
    """Masked reconstruction error on held-out volumes, beside that of predicting the mean training volume.

    Held-out volumes are masked as they lie, with the same masks every time. Their errors, ``validation_reconstruction``
    and ``validation_mean_view``, and the share of volumes where the first is lower, ``validation_share_better``, go to
    ``engine.state.metrics`` every ``interval`` epochs and, at the end, to a JSON.

    Args:
        path: the JSON file.
        validation: held-out items, with ``image`` ``[1, D, H, W]`` in [0, 1]; none of them is trained on.
        training: items whose mean volume is the naive prediction.
        interval: epochs between two checks.
        limit: volumes of each that are used at most.
    """

    def __init__(
        self, path: str | os.PathLike[str], validation: Any, training: Any, interval: int = 10, limit: int = 64
    ) -> None:
        self.path = Path(path)
        self.validation = validation
        self.training = training
        self.interval = interval
        self.limit = limit
        self._mean: torch.Tensor | None = None

    def attach(self, engine: Engine) -> None:
        """Check every ``interval`` epochs and after the last."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Any) -> None:
        epoch, last = engine.state.epoch, engine.state.max_epochs
        if epoch % self.interval and epoch != last:
            return
        errors = self.errors(engine)
        engine.state.metrics |= {f"validation_{name}": value for name, value in errors.items()}
        if epoch == last:
            write_json(self.path, {"epoch": epoch, **errors, "volumes": min(self.limit, len(self.validation))})

    @torch.no_grad()
    def errors(self, engine: Any) -> dict[str, float]:
        """Mean squared errors over masked voxels, averaged over volumes, and the share that is restored better."""
        device, network, mask = engine.state.device, engine.plain_student.network, engine.views.mask
        if self._mean is None:
            count = min(self.limit, len(self.training))
            self._mean = torch.stack([torch.as_tensor(self.training[i]["image"]) for i in range(count)]).mean(dim=0)
        mean = self._mean.to(device)[None]
        errors: dict[str, list[float]] = {"reconstruction": [], "mean_view": []}
        for index in range(min(self.limit, len(self.validation))):
            image = torch.as_tensor(self.validation[index]["image"]).to(device)[None]
            size = image.shape[2:]
            labels = mask.enlarge(mask.draw(size, np.random.default_rng(index)), size, device).expand_as(image)
            noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(index)).to(device)
            with engine.autocast():
                tokens = network.encode(mask.fill(image, labels, noise))
                restored = network.decode(tokens, network.token_grid(image)).float()
            hidden = labels != VISIBLE
            errors["reconstruction"].append(float((restored - image)[hidden].square().mean()))
            errors["mean_view"].append(float((mean - image)[hidden].square().mean()))
        better = np.less(errors["reconstruction"], errors["mean_view"])
        return {name: float(np.mean(values)) for name, values in errors.items()} | {
            "share_better": float(better.mean())
        }


class EncoderExport:
    """Writes the encoder and summariser of the teacher (or student) when the run is complete.

    Args:
        path: the ``.safetensors`` file; a JSON of the same name tells configuration and provenance.
        networks: what can be exported, by name: ``teacher`` and ``student``.
        export: the name of the one to export.
        provenance: written into the JSON, see ``volta_components.record.provenance``.

    Raises:
        InputError: if there is no network of that name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        networks: Mapping[str, nn.Module],
        export: str,
        provenance: Mapping[str, Any],
    ) -> None:
        if export not in networks:
            raise InputError(f"export {export!r}: choose {' or '.join(networks)}")
        self.path = Path(path)
        self.network = networks[export]
        self.provenance = {**provenance, "exported": export}

    def attach(self, engine: Engine) -> None:
        """Export when the run is complete."""
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _completed(self, engine: Engine) -> None:
        from volta_components.weights import save_encoder

        if process_rank():
            return
        progress = {"epochs": engine.state.epoch, "iterations": engine.state.iteration}
        save_encoder(self.path, self.network, {**self.provenance, **progress})  # type: ignore[arg-type]
        logger.info("encoder written to %s", self.path)
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None:
            run_id = mlflow_handler.cur_run.info.run_id
            mlflow_handler.client.log_artifact(run_id, str(self.path.with_suffix(".json")), "encoder")
