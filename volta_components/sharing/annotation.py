# SPDX-License-Identifier: Apache-2.0
"""Models that MONAI Label trains, and the label maps that it trains them on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from torch import nn

from volta_components.data.names import parse_name, split_visit
from volta_components.data.walk import VolumeFile
from volta_components.distributed import process_rank
from volta_components.downstream.leaks import known_people
from volta_components.downstream.segmentation import SHOWN, SegmentationResults
from volta_components.downstream.splits import Item
from volta_components.errors import InputError
from volta_components.files import sha256_file, sha256_json, write_json
from volta_components.inference.scans import find_volumes, who_and_when
from volta_components.method.monai_versions import fit_cross_attention
from volta_components.method.weights import read_record, read_weights
from volta_components.training.people import facts_of, joined

logger = logging.getLogger(__name__)


STATS = "last_training.json"


def renumber(
    values: NDArray[Any], segments: Sequence[Mapping[str, Any]], labels: Mapping[str, int]
) -> NDArray[np.uint8]:
    """Give a label map the numbers of the model, by the names of its segments.

    3D Slicer names segments with ``idx``, their place among all segments. If some of them are not exported (scribbles,
    say), it numbers the rest from 1 on all the same. Both numberings are tried.

    Args:
        values: ``[X, Y, Z]``, whole numbers, 0 for the background.
        segments: each with ``name`` and, if known, ``idx``; empty if the client gave no names.
        labels: the model's number of each name.

    Returns:
        The label map ``[X, Y, Z]`` in the model's numbers.

    Raises:
        InputError: if a value has no name, a name is not one of the model's, or two readings are possible.
    """
    known = " and ".join(f"{value} {name}" for name, value in labels.items())
    there = [float(value) for value in np.unique(values) if value != 0]
    if odd := [f"{value:g}" for value in there if value != int(value) or value < 0]:
        raise InputError(f"the label map has values {', '.join(odd[:5])}: not numbers of segments; export it as labels")
    found = [int(value) for value in there]
    if not segments:
        segments = [{"name": name, "idx": value} for name, value in labels.items()]
    names = [str(segment.get("name", "")) for segment in segments]
    by_place = dict(enumerate(names, start=1))
    by_index = {int(segment.get("idx", place)): names[place - 1] for place, segment in enumerate(segments, start=1)}
    numberings = [numbering for numbering in (by_index, by_place) if {*found} <= numbering.keys()]
    if not numberings:
        unnamed = ", ".join(f"{value:g}" for value in found if value not in by_index)
        raise InputError(
            f"the label map has values without a name: {unnamed}; use {known}, or send the names as label_info"
        )
    readings = [{value: numbering[value] for value in found} for numbering in numberings]
    if readings[0] != readings[-1]:
        raise InputError(
            f"segments {', '.join(names)}: their numbers can be read in two ways; remove the segments that are not "
            "exported, and submit again"
        )
    numbers = {_plain(name): value for name, value in labels.items()}
    if strange := sorted({name for name in readings[0].values() if _plain(name) not in numbers}):
        raise InputError(
            f"segments that the model does not know: {', '.join(strange)}; rename them, or remove them ({known})"
        )
    result = np.zeros(values.shape, np.uint8)
    for value, name in readings[0].items():
        result[values == value] = numbers[_plain(name)]
    return result


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def split_scans(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Part labelled scans into those to train on and those that validate; no patient is on both sides.

    Patients are recognised by the names of their scans, as ``volta3d segment`` does. The last ones validate, as many as
    it takes for the share, but never all. Without a share, or with a single patient, the training scans validate.

    Args:
        items: with ``image``, a path.
        share: of the scans, for validation.
    """
    names, _ = who_and_when([Path(item["image"]) for item in items])
    patients = [split_visit(name)[0] or name for name, _ in names]
    count = max(1, round(share * len(items))) if share > 0 else 0
    chosen: set[str] = set()
    for patient in list(dict.fromkeys(patients))[:0:-1]:
        if sum(each in chosen for each in patients) < count:
            chosen.add(patient)
    training = [item for item, patient in zip(items, patients, strict=True) if patient not in chosen]
    validation = [item for item, patient in zip(items, patients, strict=True) if patient in chosen]
    return training, validation or training


class SaveModel:
    """Writes the model at the end of a run that nobody scores, such as one that an annotation server started.

    The datalist in the config is not what such a run trained on. Its record instead names the weights it began with,
    the hashes of its scans and label maps, and every patient that the weights were ever trained on, as far as known.
    Patients are recognised by the names of the scans. The record has no metrics.

    A run that began with a known model is compared with it, by Dice on the validation scans, before and after. If Dice
    has become worse, the model is not written. ``last_training.json`` beside the model follows the run: ``epoch``,
    ``total_epochs``, ``learning_rate``, ``dice_before``, ``dice_after``, ``best_metric``, ``scored_on``, ``replaced``
    and ``message``.

    Put it after the handler that loads a checkpoint.

    Args:
        results: knows which weights, and where to.
    """

    def __init__(self, results: SegmentationResults) -> None:
        self.results = results
        self._start: dict[str, Any] = {}
        self._stats: dict[str, Any] = {}
        self._began = 0.0

    def attach(self, engine: Engine) -> None:
        """Look at the weights at the start; write when the run is complete."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Any) -> None:
        path = self.results.model_path
        self._start = {} if path is None else find_start(self.results.network, Path(path).parent)
        if not self._start:
            return
        self._began = time.time()
        training, validation = self._items(engine)
        self._stats = {
            "start_ts": int(self._began),
            "total_epochs": engine.state.max_epochs,
            "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
            "started_from": self._start["file"],
            "scored_on": "the training scans" if validation == training else f"{len(validation)} validation scans",
            "dice_before": self._dice(),
        }
        self._write_stats(epoch=0)

    def _items(self, engine: Any) -> tuple[list[Any], list[Any]]:
        best = self.results.best
        validation = [] if best is None else list(best.evaluator.data_loader.dataset.data)
        return list(engine.data_loader.dataset.data), validation

    def _dice(self) -> float | None:
        """Mean Dice of the network as it is, on the validation scans; None if there are none."""
        best = self.results.best
        if best is None or not len(best.evaluator.data_loader.dataset):
            return None
        best.evaluator.run()
        # So that nobody takes this for the first epoch's.
        best.evaluator.state.epoch = -1
        return float(best.evaluator.state.metrics[best.evaluator.state.key_metric_name])

    def _write_stats(self, **changes: Any) -> None:
        self._stats |= {**changes, "total_time": round(time.time() - self._began, 1)}
        path = self.results.model_path
        if path is not None and process_rank() == 0:
            write_json(Path(path).with_name(STATS), self._stats)

    def _epoch_completed(self, engine: Any) -> None:
        if self._start:
            best = self.results.best
            known = {} if best is None or best.epoch == 0 else {"best_metric": best.value}
            self._write_stats(epoch=engine.state.epoch, **known)

    def _completed(self, engine: Any) -> None:
        training, validation = self._items(engine)
        record = annotation_record(
            self.results.record, self._start, training, [] if validation == training else validation
        )
        if not self._start:
            self.results.save_model(engine, record)
            return
        best = self.results.best
        before, after = self._stats["dice_before"], best.value if best is not None and best.restore() else self._dice()
        compared, worse = "not scored", False
        if before is not None and after is not None:
            compared = f"Dice {before:.3f} before, {after:.3f} after, on {self._stats['scored_on']}"
            worse = after < before
        if worse:
            message = f"the training made the model worse ({compared}); the model before is kept"
        else:
            message = f"the model is replaced ({compared})"
            self.results.save_model(engine, {**record, "annotation": {**self._stats, "dice_after": after}})
        logger.log(logging.WARNING if worse else logging.INFO, "%s", message)
        self._write_stats(dice_after=after, best_metric=after, replaced=not worse, message=message)


def find_start(network: nn.Module, folder: Path) -> dict[str, Any]:
    """Which of the models in a folder a network's weights are.

    Returns:
        ``file``, ``sha256`` and ``record`` (the JSON beside it) of the model; empty when it is none of them.
    """
    own = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    for path in sorted(path for path in folder.glob("*.pt") if not path.name.startswith(".")):
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

    Adds ``started_from``, ``pretraining``, ``provenance``, ``tags`` and ``subjects`` to the config's record. Items have
    ``image`` and ``label``, paths; for ``start`` see ``find_start``. ``volumes`` counts those of the model that it
    started from too, each once. Scans that somebody annotates count as people's.
    """
    items = [*training, *validation]
    files = [[sha256_file(item[key]) for key in SHOWN] for item in items]
    digest = sha256_json(sorted(files))
    before = start.get("record") or {}
    origin, tags = (dict(before.get(key) or {}) for key in ("provenance", "tags"))
    trained, pretrained = known_people(before)
    pretraining, volumes = dict(record.get("pretraining") or {}), len(items)
    scans = find_volumes([str(item["image"]) for item in items])
    names = [str(scan["subject_id"]) for scan in scans]
    # Of p01_visit2 the patient is known by either name.
    names += [parse_name(VolumeFile.of(Path(scan["image"])).stem).subject for scan in scans]
    names += [base for name in names if (base := split_visit(name)[0]) and base != name]
    seen = [{"patient_id": name} for name in names] + [
        {"patient_id": names[0], "source_sha256": image} for image, _ in files
    ]
    people = facts_of(seen)
    if start:
        pretraining = {**(before.get("pretraining") or {}), **pretrained}
        if everybody := joined(trained, seen):
            people = everybody
            new = len(everybody["voxel_hashes"]) - len(trained.get("voxel_hashes") or ())
            volumes = int(origin.get("volumes") or 0) + new
        else:  # Without a list of the patients that the model has seen, no patient can be called new to it.
            pretraining["patient_ids"] = None
    started = {key: origin[key] for key in ("cohort", "volumes", "datalist_hash", "code_version") if key in origin}
    if "started_from" in before:
        started["started_from"] = before["started_from"]
    kept = {key: tags[key] for key in ("encoder_sha256", "pretrain_datalist_hash", "leak") if key in tags}
    return {
        "started_from": {key: start[key] for key in ("file", "sha256")} | started if start else None,
        "pretraining": pretraining,
        "tags": {
            **(record.get("tags") or {}),
            **kept,
            "datalist_name": "annotated",
            "datalist_hash": digest,
            "phantom": "false",
        },
        "provenance": {
            **(record.get("provenance") or {}),
            "cohort": "annotated",
            "phantom": False,
            "volumes": volumes,
            "datalist_hash": digest,
            **people,
            "patients_from": "names of the scans, and the record of the model that it started from",
        },
        "subjects": {"training": len(training), "validation": len(validation), "scored": 0, "unused": 0},
    }
