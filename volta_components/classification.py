# SPDX-License-Identifier: Apache-2.0
"""The classification bundles' workflow: labels, scores of a fold, thresholds, and probabilities of new scans."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import distributed as dist
from torch import nn

from volta_components.data.datalist import Datalist, load_datalist
from volta_components.data.labels import read_labels
from volta_components.data.layouts.common import LabelFile
from volta_components.data.preprocess import Settings, UnusableVoxels, on_grid, prepare_volume
from volta_components.data.volumes import UnusableVolume, Volume, read_volume, volume_suffix
from volta_components.distributed import process_count, process_rank
from volta_components.errors import InputError
from volta_components.files import atomic_path, write_json
from volta_components.finetune import Item, Parts, Results, check_model, item_name, save_model
from volta_components.journal import Journal
from volta_components.metrics import auroc_interval, sensitivity_specificity, youden_threshold

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


# --- new scans ---------------------------------------------------------------------------------------------------


def find_volumes(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> list[Item]:
    """Volumes to predict: of a folder, a datalist, a single file or a list of files.

    Args:
        source: a folder (its ``datalist.json``, or else every scan below it, see ``scans_below``), a
            ``datalist.json``, a volume, or a list of volumes.
        output: where results go; it must not lie in a folder that is searched for volumes.

    Returns:
        Items with ``image``, ``subject_id`` and ``session``; ids come from the datalist or from file names, as in BIDS.

    Raises:
        InputError: if there is nothing, a file is missing, or the output lies in the source.
    """
    if isinstance(source, (list, tuple)):
        return [item for part in source for item in find_volumes(part, output)]
    assert isinstance(source, (str, os.PathLike))
    path = Path(source)
    if (path / "datalist.json").is_file() or path.suffix == ".json":
        return [
            {key: item.get(key) for key in ("image", "subject_id", "session")} for item in load_datalist(path).items
        ]
    if path.is_dir():
        if output is not None and Path(output).resolve().is_relative_to(path.resolve()):
            raise InputError(
                f"--output_dir {output} lies in --source {path}, where the next start would take results for scans; "
                "choose a folder outside of it"
            )
        files = scans_below(path)[0]
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path}: no such folder, volume or datalist; give one with --source")
    if not files:
        raise InputError(f"{path}: no volumes in it (.nii, .nii.gz, .mgz, ...)")
    items: list[Item] = []
    for file in files:
        suffix = volume_suffix(file)
        if suffix is None:
            raise InputError(f"{file}: not a volume (.nii, .nii.gz, .mgz, ...)")
        words = file.name[: -len(suffix)].split("_")
        session = next((word for word in words if word.startswith("ses-")), None)
        subject = words[0] if words[0].startswith("sub-") else "_".join(words)
        items.append({"image": str(file), "subject_id": subject, "session": session})
    return items


def scans_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Volumes below a folder, and apart from them those that are no T1 scans by the rules of BIDS.

    Set apart are volumes in ``derivatives``, ``sourcedata`` and ``code`` beside folders ``sub-*``, and those whose name
    begins with ``sub-`` and ends in another word than ``T1w`` (``sub-01_dseg.nii.gz``). Any other name is a scan's.

    Args:
        folder: a BIDS data set, a part of one, or a folder of anything else.

    Returns:
        Scans, and the volumes set apart, in order of their paths.
    """
    scans: list[Path] = []
    others: list[Path] = []
    aside = ("derivatives", "sourcedata", "code") if any(folder.glob("sub-*/")) else ()
    for path in sorted(folder.rglob("*")):
        suffix = volume_suffix(path)
        if suffix is None or not path.is_file():
            continue
        words = path.name[: -len(suffix)].split("_")
        is_other = words[0].startswith("sub-") and "-" not in words[-1] and words[-1] != "T1w"
        (others if is_other or path.relative_to(folder).parts[0] in aside else scans).append(path)
    return scans, others


def result_root(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str:
    """Where the folders of results begin (``SaveImaged``'s ``data_root_dir``).

    Results have the names of their scans. Where these are unique the folder does not matter; where they are not, as
    FreeSurfer's ``T1.mgz`` are, results lie in folders like those of the scans.

    Args:
        source: see ``find_volumes``.

    Returns:
        The scans' common folder where names clash, otherwise an empty text; also where there are no scans.

    Raises:
        InputError: if two scans of one folder have the same name up to the suffix.
    """
    try:
        paths = [Path(str(item["image"])).absolute() for item in find_volumes(source)]
    except InputError:
        return ""
    stems = [path.with_name(path.name[: -len(volume_suffix(path) or "")]) for path in paths]
    counts = Counter(stems)
    if twice := sorted(str(path) for path, stem in zip(paths, stems, strict=True) if counts[stem] > 1):
        raise InputError.many(
            "results of these scans would have the same name", [(path,) for path in twice], "Leave out one of each."
        )
    if len({stem.name for stem in stems}) == len(stems):
        return ""
    return os.path.commonpath([path.parent for path in paths])


class LoadScand(MapTransform):
    """Loads a scan, and its label map if it has one, as the networks are trained on.

    A volume that ``volta3d prepare`` wrote is taken as it is. Any other scan, of any orientation and spacing, goes
    through the very function of ``volta3d prepare`` on the way, which MONAI's ``LoadImaged``, ``Orientationd``,
    ``Spacingd`` and intensity scaling would only approximate: window around the head, percentiles of the foreground.

    Args:
        keys: where items have the scan's path; with a label map, the one that it belongs to.
        spacing: of the prepared volume, mm; one number or three.
        shape: of the prepared volume, voxels.
        label_key: where items may have the label map's path; None where label maps are no business of this.

    Shapes:
        scan: ``MetaTensor`` ``[1, D, H, W]``, float32 in [0, 1], with its own grid in ``original_affine`` and
        ``spatial_shape`` of its ``meta``; label map: ``MetaTensor`` ``[1, D, H, W]``, uint8.

    Raises:
        InputError: if a file cannot be used, naming it and the remedy.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float | Sequence[float],
        shape: Sequence[int],
        label_key: str | None = None,
    ) -> None:
        super().__init__(keys)
        mm = tuple(np.broadcast_to(np.asarray(spacing, float), 3).tolist())
        self.settings = Settings(spacing=mm, shape=tuple(shape))  # type: ignore[arg-type]
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace paths by volumes."""
        # None, of a session that is not known, cannot be collated; without a label map there is no such key.
        result = {
            key: "" if value is None else value
            for key, value in data.items()
            if value is not None or key != self.label_key
        }
        given = None if self.label_key is None else data.get(self.label_key)
        label_path = Path(str(given)) if isinstance(given, (str, os.PathLike)) else None
        for key in self.key_iterator(data):
            result[key], label = self._load(Path(str(data[key])), label_path)
            if label is not None:
                result[self.label_key] = label
        return result

    def _load(self, path: Path, label_path: Path | None) -> tuple[MetaTensor, MetaTensor | None]:
        volume = read_volume(path)
        label: np.ndarray | None = None
        label_affine: np.ndarray | None = None
        if label_path is not None:
            label, label_affine, _ = read_labels([LabelFile(label_path)], volume, path)
        affine = volume.affine
        image = self._already_prepared(volume)
        if image is None:
            try:
                prepared = prepare_volume(volume, self.settings, label, label_affine)
            except UnusableVoxels as error:
                raise UnusableVolume(path, error.reason, error.remedy) from error
            image, label, affine = prepared.image, prepared.label, prepared.affine
            for warning in prepared.warnings:
                logger.warning("%s: %s", path, warning)
        meta = {
            "filename_or_obj": str(path),
            "original_affine": np.array(volume.affine, dtype=float),
            "spatial_shape": np.array(volume.voxels.shape),
            "original_channel_dim": float("nan"),
        }
        label_meta = {**meta, "filename_or_obj": str(label_path)}
        return meta_tensor(image, affine, meta), None if label is None else meta_tensor(label, affine, label_meta)

    def _already_prepared(self, volume: Volume) -> np.ndarray | None:
        """The voxels of a volume that is on such a grid and in [0, 1]; otherwise None."""
        if not on_grid(volume, self.settings):
            return None
        image = volume.voxels.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.intercept)
        is_unit = np.isfinite(image).all() and image.min() >= -1e-3 and image.max() <= 1 + 1e-3
        return image if is_unit and image.min() < image.max() else None


def meta_tensor(voxels: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any]) -> MetaTensor:
    """Voxels ``[D, H, W]`` as MONAI's ``[1, D, H, W]``, uint8 or otherwise float32."""
    array = np.ascontiguousarray(voxels, dtype=np.uint8 if voxels.dtype == np.uint8 else np.float32)
    return MetaTensor(
        torch.from_numpy(array.copy())[None], affine=torch.from_numpy(np.array(affine, float)), meta=dict(meta)
    )


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
