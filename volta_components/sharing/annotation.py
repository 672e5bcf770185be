# SPDX-License-Identifier: Apache-2.0
"""Models that MONAI Label trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from volta_components.data.names import split_visit
from volta_components.downstream.leaks import known_people
from volta_components.downstream.segmentation import SHOWN, SegmentationResults
from volta_components.downstream.splits import Item
from volta_components.errors import InputError
from volta_components.files import sha256_file, sha256_json
from volta_components.inference.scans import find_volumes
from volta_components.method.monai_versions import fit_cross_attention
from volta_components.method.weights import read_record, read_weights
from volta_components.training.people import facts_of, joined

logger = logging.getLogger(__name__)


class SaveModel:
    """Writes the model at the end of a run that nobody scores, such as one that an annotation server started.

    The datalist in the config is not what such a run trained on. Its record instead names the weights it began with,
    the hashes of its scans and label maps, and every patient that the weights were ever trained on, as far as known.
    Patients are recognised by the names of the scans. The record has no metrics.

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
        self._start = {} if path is None else find_start(self.results.network, Path(path).parent)

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
    ``image`` and ``label``, paths; for ``start`` see ``find_start``.
    """
    items = [*training, *validation]
    files = [[sha256_file(item[key]) for key in SHOWN] for item in items]
    digest = sha256_json(sorted(files))
    before = start.get("record") or {}
    origin, tags = (dict(before.get(key) or {}) for key in ("provenance", "tags"))
    trained, pretrained = known_people(before)
    pretraining = dict(record.get("pretraining") or {})
    names = [str(item["subject_id"]) for item in find_volumes([str(item["image"]) for item in items])]
    # Of p01_visit2 the patient is known by either name.
    names += [base for name in names if (base := split_visit(name)[0]) and base != name]
    seen = [{"patient_id": name} for name in names] + [
        {"patient_id": names[0], "source_sha256": image} for image, _ in files
    ]
    people = joined(trained, seen) if start else facts_of(seen)
    if start:
        pretraining = {**(before.get("pretraining") or {}), **pretrained}
        if (
            people is None
        ):  # Without a list of the patients that the model has seen, no patient can be called new to it.
            pretraining["patient_ids"] = None
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
            **(people or facts_of(seen)),
            "patients_from": "names of the scans, and the record of the model that it started from",
        },
        "subjects": {"training": len(training), "validation": len(validation), "scored": 0, "unused": 0},
    }
