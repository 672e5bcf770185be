# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle's workflow: network, label maps, scores of a fold, and masks in a scan's own space."""

from __future__ import annotations

import csv
import gzip
import logging
import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.inferers import SlidingWindowInferer
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks.nets import UNETR
from monai.networks.nets.vit import ViT
from monai.networks.utils import one_hot
from monai.transforms import MapTransform
from scipy import ndimage
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch import distributed as dist

from volta_components.classification import find_volumes, meta_tensor
from volta_components.cores import cores
from volta_components.data.datalist import Datalist, load_datalist, make_content
from volta_components.data.labels import read_labels
from volta_components.data.layouts.common import LEFT, RIGHT, LabelFile
from volta_components.data.volumes import UnusableVolume, Volume, read_header, read_volume
from volta_components.distributed import process_count, process_rank
from volta_components.errors import InputError
from volta_components.files import atomic_path, sha256_file, sha256_json, write_json
from volta_components.finetune import (
    Item,
    Parts,
    Results,
    check_model,
    item_name,
    known_patients,
    save_model,
    split_items,
)
from volta_components.handlers import refer as refer  # the configs say segmentation.refer
from volta_components.journal import Journal
from volta_components.networks import check_heads, fit_cross_attention, settle_cross_attention
from volta_components.record import patient_key
from volta_components.weights import read_record, read_weights

logger = logging.getLogger(__name__)

SIDES = {"left": LEFT, "right": RIGHT}
NUM_CLASSES = 3
SHOWN = ("image", "label")
FACTS = ("subject_id", "patient_id", "session", "site", "sex", "age")


# --- network -----------------------------------------------------------------------------------------------------


class VoltaUNETR(UNETR):
    """MONAI's ``UNETR`` with a number of transformer blocks that can be chosen.

    ``UNETR`` has 12 blocks and takes its skip connections after blocks 4, 7 and 10, whatever the encoder that is to be
    loaded; here the skips lie at a quarter, a half and three quarters of the depth, which is the same at 12. With 12
    blocks, state dict and output are MONAI's own. Its ``vit`` takes an exported encoder's weights as they are.

    Args:
        in_channels: image channels.
        out_channels: classes: background, left, right.
        img_size: size ``(D, H, W)`` in voxels of the crops; a multiple of the patch, which is 16.
        feature_size: channels at full resolution.
        hidden_size: token size.
        mlp_dim: hidden size of each block's MLP.
        num_layers: transformer blocks, at least 4.
        num_heads: attention heads of each block.
        norm_name: normalisation of the convolutions.

    Shapes:
        ``[B, in_channels, D, H, W]`` to logits ``[B, out_channels, D, H, W]``.

    Raises:
        InputError: if the patch does not divide ``img_size``, the heads do not share ``hidden_size``, or there are
            fewer than 4 blocks.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = NUM_CLASSES,
        img_size: Sequence[int] = (96, 96, 96),
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        norm_name: str = "instance",
    ) -> None:
        if any(side < 16 or side % 16 for side in img_size):
            raise InputError(f"image size {tuple(img_size)}: UNETR's patch is 16; give multiples of it")
        if num_layers < 4:
            raise InputError(f"num_layers {num_layers}: UNETR needs 4 blocks or more for its skip connections")
        check_heads(hidden_size, num_heads)
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            img_size=tuple(img_size),
            feature_size=feature_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            proj_type="conv",
            norm_name=norm_name,
            res_block=True,
        )
        if num_layers != self.num_layers:
            self.num_layers = num_layers
            self.vit = ViT(
                in_channels=in_channels,
                img_size=tuple(img_size),
                patch_size=self.patch_size,
                hidden_size=hidden_size,
                mlp_dim=mlp_dim,
                num_layers=num_layers,
                num_heads=num_heads,
                proj_type="conv",
            )
        self.skips = tuple(num_layers * quarter // 4 for quarter in (1, 2, 3))
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "img_size": list(img_size),
            "feature_size": feature_size,
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "norm_name": norm_name,
        }
        settle_cross_attention(self)

    def forward(self, x_in: Tensor) -> Tensor:
        """Logits of an image."""
        tokens, hidden = self.vit(x_in)
        full = self.encoder1(x_in)
        half = self.encoder2(self.proj_feat(hidden[self.skips[0]]))
        quarter = self.encoder3(self.proj_feat(hidden[self.skips[1]]))
        eighth = self.encoder4(self.proj_feat(hidden[self.skips[2]]))
        features = self.decoder5(self.proj_feat(tokens), eighth)
        features = self.decoder4(features, quarter)
        features = self.decoder3(features, half)
        return self.out(self.decoder2(features, full))


class FloatWindowInferer(SlidingWindowInferer):
    """``SlidingWindowInferer`` that weights and adds up the windows' logits in float32, in mixed precision as well.

    MONAI's multiplies each window by its weights in the network's own type: rounded to bfloat16, the logits of two
    classes are often equal, and the background wins.
    """

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Logits of whole volumes ``[B, C, D, H, W]``; see ``SlidingWindowInferer``."""

        def in_float32(*arguments: Any, **keywords: Any) -> Tensor:
            return network(*arguments, **keywords).float()

        return super().__call__(inputs, in_float32, *args, **kwargs)


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Sizes of a network, for the run's settings: its ``config``, or what MONAI's ``UNet`` tells of itself."""
    names = ("in_channels", "out_channels", "channels", "strides", "num_res_units")
    config = getattr(network, "config", None) or {
        name: getattr(network, name) for name in names if isinstance(getattr(network, name, None), (int, Sequence))
    }
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in config.items()}


# --- who is trained on, and the label maps -----------------------------------------------------------------------


def find_datalist(path: str | os.PathLike[str], shape: Sequence[int], spacing: Sequence[float]) -> Datalist:
    """The datalist, or an empty one where there is no file.

    An annotation server gives its own items to ``train#dataset#data`` and has no datalist; when nobody does,
    ``training_items`` says what is missing.

    Args:
        path: of ``datalist.json``, or of the folder that holds it.
        shape: of the volumes, voxels.
        spacing: of the volumes, mm.

    Raises:
        InputError: see ``load_datalist``.
    """
    if Path(path).exists():
        return load_datalist(path, shape=shape, spacing=spacing)
    content = make_content("none", spacing, shape, 0, 1, [], [])
    return Datalist(Path(path), content, str(content["hash"]))


def labelled_parts(
    datalist: Datalist, fold: int, fraction: float = 1.0, validation_fraction: float = 0.2, seed: int = 0
) -> Parts:
    """Split the datalist by patient; see ``split_items``.

    Args:
        datalist: the prepared data set; an empty one gives empty parts.
        fold: the scored fold (the paper's hold-out).
        fraction: share of the training part that is used.
        validation_fraction: share of the used ones that is held out for inner validation.
        seed: of the order.

    Raises:
        InputError: if items have no label map, naming them, or the fold cannot be scored.
    """
    if not len(datalist):
        return Parts([], [], [])
    items = datalist.items
    without = [item for item in items if not item.get("label")]
    if without:
        raise InputError.many(
            f"{datalist.path}: {len(without)} of {len(items)} items have no label map",
            [(item_name(item), str(item["image"])) for item in without],
            "This bundle needs a label map of both hippocampi for each scan: prepare the data set with "
            "--labels require, which leaves out the others.",
        )
    return split_items(items, fold, fraction, validation_fraction, seed)


def training_items(parts: Parts, datalist_path: str | os.PathLike[str]) -> list[Item]:
    """Items to fit the weights on.

    Raises:
        InputError: if there is no datalist, or nobody to train on.
    """
    if not parts.training:
        load_datalist(datalist_path)
        raise InputError(f"{datalist_path}: nobody to train on; take a larger fraction, or prepare more subjects")
    return parts.training


def check_label_maps(items: Iterable[Mapping[str, Any]], workers: int | None = None) -> None:
    """Check every label map before a training starts: there, on its scan's grid, 0/1/2, both sides, each on its side.

    Sides are told from the centroids in world coordinates: the left hippocampus has the smaller x (NIfTI's x points to
    the right), whatever the orientation of the file.

    Args:
        items: with ``image`` and ``label``, paths.
        workers: threads; the number of cores by default.

    Raises:
        InputError: listing every item with its file and what is wrong.
    """

    def examine(item: Mapping[str, Any]) -> tuple[str, str, str] | None:
        name = item_name(item) or Path(str(item["image"])).name
        if not item.get("label"):
            return name, "(none)", "has no label map"
        path = Path(str(item["label"]))
        try:
            scan = read_volume(str(item["image"]))
            label, _, quirks = read_labels([LabelFile(path)], scan, Path(str(item["image"])))
        except UnusableVolume as error:
            return name, error.path, error.reason
        if quirks:
            return name, str(path), f"left and right are swapped: {quirks[0][1]}"
        empty = [f"{side} ({value})" for side, value in SIDES.items() if not (label == value).any()]
        return (name, str(path), f"no voxels of {' and '.join(empty)}") if empty else None

    items = list(items)
    with ThreadPoolExecutor(workers or cores()) as pool:
        rows = [row for row in pool.map(examine, items) if row is not None]
    if rows:
        raise InputError.many(
            f"{len(rows)} of {len(items)} label maps cannot be used",
            rows,
            "A label map lies on its scan's grid and has 0 background, 1 left and 2 right hippocampus. Mend the files "
            "and prepare the data set again, or leave these scans out.",
        )


def one_hot_pair(output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Prediction and truth of an evaluator's output, both one-hot ``[B, 3, D, H, W]``, for MONAI's metrics."""
    logits = output["pred"]
    predicted = logits.argmax(dim=1, keepdim=True)
    return one_hot(predicted, logits.shape[1]), one_hot(output["label"], logits.shape[1])


# --- scores ------------------------------------------------------------------------------------------------------


def score_mask(mask: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Dice and HD95 of one scan, per side and as the mean of both sides, with volumes.

    HD95 is the larger of both directions' 95th percentiles of distances between surfaces, in mm. It is NaN for a side
    whose mask is empty, which counts as a failure; then the mean is NaN as well. MONAI's ``HausdorffDistance`` handler
    knows no spacing and drops NaN silently, hence this function around ``compute_hausdorff_distance``.

    Args:
        mask: ``[D, H, W]``, 1 left, 2 right.
        truth: ``[D, H, W]``, the same; both sides there.
        spacing: mm along each axis.

    Returns:
        ``dice_left``, ``dice_right``, ``dice``, ``hd95_left``, ``hd95_right``, ``hd95``, ``failures`` (0 to 2),
        ``volume_left_mm3``, ``volume_right_mm3``, ``true_volume_left_mm3``, ``true_volume_right_mm3``.
    """
    pair = [torch.from_numpy(np.stack([array == value for value in SIDES.values()])[None]) for array in (mask, truth)]
    predicted, true = (tensor.float() for tensor in pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty masks, which are counted here
        dice = compute_dice(predicted, true, include_background=True, ignore_empty=False)[0].tolist()
        distance = compute_hausdorff_distance(
            predicted, true, include_background=True, percentile=95, spacing=[float(side) for side in spacing]
        )[0].tolist()
    voxel = float(np.prod([float(side) for side in spacing]))
    result: dict[str, float] = {}
    for name, values in (("dice", dice), ("hd95", distance)):
        result |= {f"{name}_{side}": float(value) for side, value in zip(SIDES, values, strict=True)}
        result[name] = float(np.mean(values))
    result["failures"] = sum(not (mask == value).any() for value in SIDES.values())
    for what, array in (("volume", mask), ("true_volume", truth)):
        result |= {f"{what}_{side}_mm3": int((array == value).sum()) * voxel for side, value in SIDES.items()}
    return result


def summarise_scores(rows: Sequence[Mapping[str, float]], penalty: float) -> dict[str, float]:
    """Means over scans.

    Args:
        rows: see ``score_mask``.
        penalty: HD95 in mm that a side with an empty mask counts as in ``hd95_with_penalty``.

    Returns:
        ``mean_dice``, ``dice_left``, ``dice_right``; ``hd95``, ``hd95_left``, ``hd95_right`` over those that have one
        (left out when nobody has); ``hd95_with_penalty`` over everybody; ``hd95_failures``, sides with an empty mask.
    """
    result = {
        "mean_dice": float(np.mean([row["dice"] for row in rows])),
        **{f"dice_{side}": float(np.mean([row[f"dice_{side}"] for row in rows])) for side in SIDES},
    }
    for name in ("hd95", *(f"hd95_{side}" for side in SIDES)):
        values = [row[name] for row in rows if not math.isnan(row[name])]
        if values:
            result[name] = float(np.mean(values))
    sides = np.array([[row[f"hd95_{side}"] for side in SIDES] for row in rows])
    result["hd95_with_penalty"] = float(np.where(np.isnan(sides), penalty, sides).mean())
    result["hd95_failures"] = float(sum(row["failures"] for row in rows))
    return result


def score_intervals(rows: Sequence[Mapping[str, float]], patients: Sequence[str]) -> dict[str, list[float]]:
    """95 % bootstrap intervals over patients of the mean Dice and HD95.

    Args:
        rows: see ``score_mask``.
        patients: of each row; scans of one patient are averaged first.

    Returns:
        Lower and upper bound of ``mean_dice`` and ``hd95``, where two patients or more have a value.
    """
    result = {}
    for name, key in (("mean_dice", "dice"), ("hd95", "hd95")):
        by_patient: dict[str, list[float]] = {}
        for patient, row in zip(patients, rows, strict=True):
            if not math.isnan(row[key]):
                by_patient.setdefault(patient, []).append(row[key])
        means = [float(np.mean(values)) for values in by_patient.values()]
        if len(means) > 1:
            found = bootstrap((means,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
            result[name] = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return result


class MaskTable:
    """Scores what an evaluator predicts, scan by scan, over all processes; writes masks where asked to.

    It only does so while ``active``, so that the evaluations during training, for which Dice suffices, stay cheap.

    Args:
        items: the data set's items, found by ``key``, which ``KeyedDataset`` gives.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.active = False
        self.folder: Path | None = None
        self._rows: dict[int, dict[str, float]] = {}

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self) -> None:
        self._rows.clear()

    def _iteration_completed(self, engine: Any) -> None:
        if not self.active:
            return
        output = engine.state.output
        masks = output["pred"].argmax(dim=1).to(torch.uint8).cpu().numpy()
        truths = output["label"][:, 0].to(torch.uint8).cpu().numpy()
        for key, mask, truth in zip(engine.state.batch["key"].tolist(), masks, truths, strict=True):
            item = self.items[int(key[1])]
            header = read_header(item["image"])
            self._rows[int(key[1])] = score_mask(mask, truth, header.spacing)
            if self.folder is not None:
                write_label_map(self.folder / f"{item_name(item)}.nii.gz", mask, header.affine)

    def _completed(self) -> None:
        if self.active and process_count() > 1:
            parts: list[Any] = [None] * process_count()
            dist.all_gather_object(parts, self._rows)
            self._rows = {index: row for part in parts for index, row in part.items()}

    def score(self, evaluator: Any, folder: str | os.PathLike[str] | None = None) -> list[dict[str, float]]:
        """Run an evaluator that this table is attached to.

        Args:
            evaluator: the evaluator.
            folder: where masks are written, as ``<subject_id>_<session>.nii.gz``; None for no masks.

        Returns:
            A row for each item, in their order; see ``score_mask``.
        """
        self.active, self.folder = True, None if folder is None else Path(folder)
        try:
            evaluator.run()
        finally:
            self.active = False
        if len(self._rows) != len(self.items):
            raise RuntimeError(f"{len(self._rows)} of {len(self.items)} items have been scored")
        return [self._rows[index] for index in range(len(self.items))]


# --- training ----------------------------------------------------------------------------------------------------


class KeepBest:
    """Keeps the weights of the epoch with the highest value of an evaluator's metric.

    MONAI's ``CheckpointSaver`` does so with ``save_key_metric``, but writes in place, so that a run killed while saving
    loses its best weights, and does not remember the best value when a run goes on.

    Put it after ``FinishRun`` and before ``ResumableCheckpoint``; what it kept is removed when the run is finished.

    Args:
        network: the network whose weights are kept.
        evaluator: the evaluator.
        metric: its metric; the first epoch of several equal ones counts.
        path: file of the weights; the epoch is added to its name, so that weights are never taken for another's.
        interval: epochs between two runs of the evaluator; 0 leaves them to a ``ValidationHandler``.
        report_as: also put the value into the trainer's metrics of that epoch, under this name.
    """

    def __init__(
        self,
        network: nn.Module,
        evaluator: Any,
        metric: str,
        path: str | os.PathLike[str],
        interval: int = 0,
        report_as: str | None = None,
    ) -> None:
        self.network = network
        self.evaluator = evaluator
        self.metric = metric
        self.path = Path(path)
        self.interval = interval
        self.report_as = report_as
        self.epoch = 0
        self.value = -math.inf
        self._in_checkpoint: int | None = None

    def attach(self, engine: Engine) -> None:
        """Look at every epoch's end."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and value of the best."""
        self._in_checkpoint = self.epoch
        return {"epoch": self.epoch, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.epoch, self.value = int(state["epoch"]), float(state["value"])
        self._in_checkpoint = self.epoch

    def _file(self, epoch: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{epoch}{self.path.suffix}")

    def _epoch_started(self, engine: Engine) -> None:
        if self.report_as is not None:
            engine.state.metrics.pop(self.report_as, None)
        # Until a checkpoint knows of the new best epoch, a run that is killed goes on with the one that it does know.
        self._remove(but=(self.epoch, self._in_checkpoint))

    def _epoch_completed(self, engine: Engine) -> None:
        if self.interval and engine.state.epoch % self.interval == 0:
            self.evaluator.run(engine.state.epoch)
        if self.evaluator.state.epoch != engine.state.epoch or self.metric not in self.evaluator.state.metrics:
            return
        value = float(self.evaluator.state.metrics[self.metric])
        if self.report_as is not None:
            engine.state.metrics[self.report_as] = value
        if value > self.value:
            self.epoch, self.value = engine.state.epoch, value
            if process_rank() == 0:
                with atomic_path(self._file(self.epoch)) as temporary:
                    torch.save(self.network.state_dict(), temporary)

    def _completed(self) -> None:
        self._remove()

    def _remove(self, but: Iterable[int | None] = ()) -> None:
        """Remove kept weights of all epochs but some."""
        if process_rank() == 0:
            kept = {self._file(epoch) for epoch in but if epoch is not None}
            for path in self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}"):
                if path not in kept:
                    path.unlink(missing_ok=True)

    def restore(self) -> bool:
        """Put the best epoch's weights into the network; False if no epoch was evaluated."""
        if self.epoch == 0:
            return False
        if process_count() > 1:
            dist.barrier()
        self.network.load_state_dict(torch.load(self._file(self.epoch), map_location="cpu", weights_only=True))
        return True


class SegmentationResults:
    """Scores the fold with the best epoch's weights, and writes scores, masks, numbers and model.

    The epoch is the one with the highest Dice on the inner validation part; beside it (``optimistic_*``) stands the one
    with the highest Dice on the scored fold itself, which is what the paper did and what flatters the result.

    Called by ``FinishRun`` at the end of training, or through ``evaluate`` for a trained model.

    Args:
        parts: who is trained on, who chooses the epoch, who is scored.
        network: the network, without any distributed wrapper.
        scoring: evaluator of the scored fold.
        table: its table.
        best: the best epoch by inner validation; without validation, the last epoch counts.
        optimistic: the best epoch by the scored fold.
        penalty: HD95 in mm that an empty mask counts as in ``hd95_with_penalty``.
        output_dir: the run's folder.
        model_path: where the trained network goes; None to keep none.
        record: written beside the network: settings, provenance.
        show_all_below: label maps are kept beside the masks, so that a report can show and score on another machine;
            volumes too, with fewer scored scans than this of all, otherwise of the worst, median and best by Dice.
            ``paths.csv`` names those of all.
    """

    def __init__(
        self,
        parts: Parts,
        network: nn.Module,
        scoring: Any,
        table: MaskTable,
        best: KeepBest | None,
        optimistic: KeepBest | None,
        penalty: float,
        output_dir: str | os.PathLike[str],
        model_path: str | os.PathLike[str] | None = None,
        record: Mapping[str, Any] | None = None,
        show_all_below: int = 20,
    ) -> None:
        self.parts = parts
        self.network = network
        self.scoring = scoring
        self.table = table
        self.best = best
        self.optimistic = optimistic
        self.penalty = float(penalty)
        self.folder = Path(output_dir)
        self.model_path = None if model_path is None else Path(model_path)
        self.record = dict(record or {})
        self.show_all_below = show_all_below

    def __call__(self, engine: Engine) -> Results:
        """Results of a run that is complete."""
        chosen = self._choose(engine)
        rows = self.table.score(self.scoring, self.folder / "predictions" / "masks")
        metrics = {**summarise_scores(rows, self.penalty), "epoch": float(chosen["epoch"])}
        optimistic_rows = rows
        if self.optimistic is not None and self.optimistic.epoch not in (0, chosen["epoch"]):
            self.optimistic.restore()
            optimistic_rows = self.table.score(self.scoring)
            self._choose(engine)
        if self.optimistic is not None and self.optimistic.epoch:
            numbers = {**summarise_scores(optimistic_rows, self.penalty), "epoch": float(self.optimistic.epoch)}
            metrics |= {f"optimistic_{name}": value for name, value in numbers.items()}
        self._write(rows)
        record = {
            **chosen,
            "metrics": metrics,
            "intervals": score_intervals(rows, self._patients),
            "hd95_penalty_mm": self.penalty,
            "subjects": {
                name: len(getattr(self.parts, name)) for name in ("training", "validation", "scored", "unused")
            },
        }
        self._save(record)
        artifacts = [("predictions", "predictions")]
        if (self.folder / "pretrained.txt").is_file():
            artifacts.append(("pretrained.txt", ""))
        rest = {name: value for name, value in record.items() if name not in ("metrics", "intervals")}
        return Results(metrics, artifacts, rest)

    @property
    def _patients(self) -> list[str]:
        return [str(item["patient_id"]) for item in self.table.items]

    def _choose(self, engine: Engine) -> dict[str, Any]:
        """Put the weights in place that the run ends with."""
        if self.best is not None and self.best.restore():
            return {"epoch": self.best.epoch, "epoch_from": "inner validation"}
        return {"epoch": engine.state.epoch, "epoch_from": "last"}

    def _save(self, record: Mapping[str, Any]) -> None:
        if self.model_path is not None and process_rank() == 0:
            save_model(self.model_path, self.network, {**self.record, **record})
            logger.info("model written to %s", self.model_path)

    def save_model(self, engine: Engine, record: Mapping[str, Any]) -> None:
        """Write the model alone, without scoring: what an annotation server wants.

        Args:
            engine: the trainer.
            record: written into the model's record, in place of what the config says of the datalist.
        """
        self._save({**self._choose(engine), **record})

    def evaluate(self, record: Mapping[str, Any], allow_leak: bool = False) -> dict[str, float]:
        """Score a trained model; write ``predictions`` and ``metrics.json``.

        Args:
            record: the JSON beside the model.
            allow_leak: score patients whom the model was, or may have been, trained or pretrained on all the same.

        Raises:
            InputError: see ``check_model``.
        """
        leak = check_model(record, self.parts.scored, allow_leak)
        rows = self.table.score(self.scoring, self.folder / "predictions" / "masks")
        metrics = summarise_scores(rows, self.penalty)
        self._write(rows)
        for name, (low, high) in score_intervals(rows, self._patients).items():
            metrics |= {f"{name}_low": low, f"{name}_high": high}
        if process_rank() == 0:
            content = {
                "metrics": metrics,
                "hd95_penalty_mm": self.penalty,
                "leak": leak,
                "scored": len(rows),
            }
            write_json(self.folder / "metrics.json", content)
            distance = f"{metrics['hd95']:.2f} mm" if "hd95" in metrics else "none (every mask failed)"
            print(
                f"Dice {metrics['mean_dice']:.3f} (left {metrics['dice_left']:.3f}, right "
                f"{metrics['dice_right']:.3f}), "
                f"HD95 {distance}, {int(metrics['hd95_failures'])} of {2 * len(rows)} sides without a mask, "
                f"{len(rows)} scans; {self.folder / 'predictions' / 'scores.csv'}"
            )
        return metrics

    def _write(self, rows: Sequence[Mapping[str, float]]) -> None:
        if process_rank():
            return
        folder = self.folder / "predictions"
        numbers = list(rows[0])
        _write_csv(
            folder / "scores.csv",
            [*FACTS, *numbers],
            (
                [
                    *("" if item.get(key) is None else item[key] for key in FACTS),
                    *("" if math.isnan(row[name]) else row[name] for name in numbers),
                ]
                for item, row in zip(self.table.items, rows, strict=True)
            ),
        )
        _write_csv(
            folder / "paths.csv",
            ["subject_id", "session", "image", "label"],
            (
                [item["subject_id"], item.get("session") or "", *(str(Path(item[key]).resolve()) for key in SHOWN)]
                for item in self.table.items
            ),
        )
        shown = shown_scans([row["dice"] for row in rows], self.show_all_below)
        for place, item in enumerate(self.table.items):
            name = f"{item_name(item)}.nii.gz"
            truth = read_volume(item["label"])
            write_label_map(folder / "labels" / name, truth.voxels, truth.affine)
            if place in shown:
                _write_picture_volume(folder / "images" / name, read_volume(item["image"]))


def shown_scans(dices: Sequence[float], show_all_below: int) -> set[int]:
    """Places of the scans that are worth looking at: all of a few, otherwise the worst, the median and the best."""
    order = sorted(range(len(dices)), key=lambda place: dices[place])
    if len(order) < show_all_below:
        return set(order)
    return {order[0], order[(len(order) - 1) // 2], order[-1]}


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def _write_picture_volume(path: Path, volume: Volume) -> None:
    """Write a prepared volume in 256 steps, a tenth of its size, to be looked at."""
    voxels = volume.voxels.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.intercept)
    image = nib.Nifti1Image(np.round(np.clip(voxels, 0, 1) * 255).astype(np.uint8), volume.affine)
    image.header.set_slope_inter(1 / 255, 0)
    _write_nifti(path, image)


def write_label_map(path: str | os.PathLike[str], mask: np.ndarray, affine: np.ndarray) -> None:
    """Write a label map as uint8 NIfTI, atomically; the same bytes for the same voxels.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        mask: ``[X, Y, Z]``, 0 to 255.
        affine: ``[4, 4]``, voxel to world mm.
    """
    _write_nifti(Path(path), nib.Nifti1Image(np.asarray(mask, dtype=np.uint8), affine))


def _write_nifti(path: Path, image: nib.Nifti1Image) -> None:
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


class SaveModel:
    """Writes the model at the end of a run that nobody scores, such as one that an annotation server started.

    What the config records of the datalist would be untrue of such a run. Its record tells instead which weights it
    began with, the hashes of the scans and label maps that it was given, and everybody whom the weights have ever been
    trained on, as far as it is known; patients are told from the names of the scans. It has no metrics.

    Put it after the handler that loads a checkpoint.

    Args:
        results: knows which weights, and where to.
    """

    def __init__(self, results: SegmentationResults) -> None:
        self.results = results
        self._start: dict[str, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Look at the weights at the start; write when the run is complete."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self) -> None:
        path = self.results.model_path
        self._start = {} if path is None else find_start(self.results.network, path.parent)

    def _completed(self, engine: Any) -> None:
        training = list(engine.data_loader.dataset.data)
        best = self.results.best
        validation = [] if best is None else list(best.evaluator.data_loader.dataset.data)
        record = annotation_record(self.results.record, self._start, training, validation)
        self.results.save_model(engine, record)


def find_start(network: nn.Module, folder: Path) -> dict[str, Any]:
    """Which of the models in a folder a network's weights are.

    Returns:
        ``file``, ``sha256`` and ``record`` (the JSON beside it) of the model; empty when it is none of them.
    """
    own = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    for path in sorted(folder.glob("*.pt")):
        try:
            state = fit_cross_attention(read_weights(path), network)
            record = read_record(path)
        except InputError as error:
            logger.warning("%s", error)
            continue
        if state.keys() == own.keys() and all(torch.equal(own[name], value.cpu()) for name, value in state.items()):
            return {"file": path.name, "sha256": sha256_file(path), "record": record}
    return {}


def annotation_record(
    record: Mapping[str, Any], start: Mapping[str, Any], training: Sequence[Item], validation: Sequence[Item]
) -> dict[str, Any]:
    """Provenance and tags of a model that was trained on scans without a datalist.

    Args:
        record: of the config.
        start: see ``find_start``.
        training: items with ``image`` and ``label``, paths.
        validation: the same, for inner validation.

    Returns:
        ``started_from``, ``pretraining``, ``provenance``, ``tags`` and ``subjects``.
    """
    items = [*training, *validation]
    files = [[sha256_file(item[key]) for key in SHOWN] for item in items]
    digest = sha256_json(sorted(files))
    before = start.get("record") or {}
    origin, tags = (dict(before.get(key) or {}) for key in ("provenance", "tags"))
    trained, pretrained = known_patients(before)
    pretraining = dict(record.get("pretraining") or {})
    if start:
        # Of a model that does not tell whom it has seen, nobody can say that a patient is new to it.
        pretraining = {**before.get("pretraining", {}), "patient_ids": None if trained is None else pretrained}
    names = [str(item["subject_id"]) for item in find_volumes([str(item["image"]) for item in items])]
    started = {key: origin[key] for key in ("cohort", "volumes", "datalist_hash", "code_version") if key in origin}
    if "started_from" in before:
        started["started_from"] = before["started_from"]
    kept = {key: tags[key] for key in ("encoder_sha256", "pretrain_datalist_hash", "leak", "phantom") if key in tags}
    return {
        "started_from": {key: start[key] for key in ("file", "sha256")} | started if start else None,
        "pretraining": pretraining,
        "tags": {**(record.get("tags") or {}), **kept, "datalist_name": "annotated", "datalist_hash": digest},
        "provenance": {
            **(record.get("provenance") or {}),
            "cohort": "annotated",
            "volumes": len(items),
            "datalist_hash": digest,
            "patient_ids": sorted({*(trained or ()), *map(patient_key, names)}),
            "patients_from": "names of the scans, and the record of the model that it started from",
        },
        "subjects": {"training": len(training), "validation": len(validation), "scored": 0, "unused": 0},
    }


# --- masks in a scan's own space ---------------------------------------------------------------------------------


def restore_mask(
    probabilities: np.ndarray, affine: np.ndarray, target_affine: np.ndarray, target_shape: Sequence[int]
) -> np.ndarray:
    """Label map on a scan's own grid from probabilities on the prepared grid.

    Probabilities are interpolated linearly, and the class with the highest one is taken afterwards, so that edges are
    as smooth as the scan's grid allows; an interpolated label map would be frayed. On equal grids nothing changes.

    Args:
        probabilities: ``[C, D, H, W]``, background first.
        affine: ``[4, 4]`` of the prepared grid.
        target_affine: ``[4, 4]`` of the scan.
        target_shape: of the scan, voxels.

    Returns:
        ``target_shape``, uint8; background outside the prepared grid.
    """
    shape = tuple(int(side) for side in target_shape)
    result = np.zeros(shape, np.uint8)
    places = np.argwhere(probabilities.argmax(axis=0) > 0)
    if not len(places):
        return result
    to_prepared = np.linalg.inv(affine) @ target_affine
    snapped = np.round(to_prepared)
    if np.abs(to_prepared - snapped).max() * max(shape) < 1e-3:
        to_prepared = snapped
    # A voxel that becomes foreground lies less than one prepared voxel from one that is.
    low, high = places.min(axis=0) - 1.0, places.max(axis=0) + 1.0
    corners = np.array([[(low, high)[bit][axis] for axis, bit in enumerate(bits)] for bits in np.ndindex(2, 2, 2)])
    box = nib.affines.apply_affine(np.linalg.inv(to_prepared), corners)
    first = np.maximum(np.floor(box.min(axis=0)), 0).astype(int)
    last = np.minimum(np.ceil(box.max(axis=0)) + 1, shape).astype(int)
    if (last <= first).any():
        return result
    matrix, offset = to_prepared[:3, :3], to_prepared[:3, 3]
    part = np.stack(
        [
            ndimage.affine_transform(
                channel,
                matrix,
                offset=offset + matrix @ first,
                output_shape=tuple(last - first),
                output=np.float32,
                order=1,
                mode="constant",
                cval=float(index == 0),
            )
            for index, channel in enumerate(probabilities)
        ]
    )
    result[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = part.argmax(axis=0)
    return result


class RestoreMaskd(MapTransform):
    """Turns logits on the prepared grid into a label map on the scan's own: its orientation, spacing and shape.

    The inverse of ``LoadScand``, which MONAI's ``Invertd`` would need a trace of invertible transforms for.

    Args:
        keys: of the logits, ``[3, D, H, W]``.
        image_key: of the volume they were computed from, as ``LoadScand`` gave it.

    Shapes:
        becomes ``MetaTensor`` ``[1, X, Y, Z]``, uint8, with the scan's affine: 0 background, 1 left, 2 right.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore each mask."""
        result = dict(data)
        image = data[self.image_key]
        affine, own = (
            np.asarray(torch.as_tensor(a).cpu(), float) for a in (image.affine, image.meta["original_affine"])
        )
        shape = [int(side) for side in torch.as_tensor(image.meta["spatial_shape"])]
        for key in self.key_iterator(data):
            logits = torch.as_tensor(data[key])
            probabilities = logits.float().softmax(dim=0).cpu().numpy()
            mask = restore_mask(probabilities, affine, own, shape)
            meta = {
                "filename_or_obj": image.meta["filename_or_obj"],
                "original_affine": own,
                "spatial_shape": np.array(shape),
                "original_channel_dim": float("nan"),
            }
            result[key] = meta_tensor(mask, own, meta)
        return result


class VolumeTable:
    """Writes a CSV of the volumes of both hippocampi, in mm^3 of the scan's own voxels.

    Args:
        path: the table.
        journal: keeps rows as they are made; the table has its rows then, of this start and earlier ones.
    """

    def __init__(self, path: str | os.PathLike[str], journal: Journal | None = None) -> None:
        self.path = Path(path)
        self.journal = journal
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
            mask = output["pred"]
            voxel = abs(float(np.linalg.det(np.asarray(mask.affine.cpu())[:3, :3])))
            volumes = [int((mask == value).sum()) * voxel for value in SIDES.values()]
            names = [item.get("subject_id") or "", item.get("session") or "", mask.meta["filename_or_obj"]]
            self.rows.append([*names, *(f"{volume:.1f}" for volume in (*volumes, sum(volumes)))])
            if self.journal is not None and self.journal.has_begun:
                self.journal.add(names[-1], self.rows[-1], [mask.meta["saved_to"]])
            if not all(volumes):
                logger.warning("%s: no voxels of a hippocampus were found", names[-1])

    def write(self) -> None:
        """Write the table."""
        rows = self.journal.rows() if self.journal is not None and self.journal.has_begun else self.rows
        _write_csv(self.path, ["subject_id", "session", "file", "left_mm3", "right_mm3", "both_mm3"], rows)
        print(f"{len(rows)} masks; volumes in {self.path}")
