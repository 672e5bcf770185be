# SPDX-License-Identifier: Apache-2.0
"""The leak guard: nobody who is scored was trained on."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.downstream.inits import is_pretrained
from volta_components.downstream.splits import patients_of
from volta_components.errors import InputError
from volta_components.files import sha256_file
from volta_components.method.weights import find_encoder, read_record
from volta_components.training.record import patient_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a run's weights come from.

    Attributes:
        encoder_sha256: hash of the file; empty when training from scratch.
        pretrain_datalist_hash: of the data that the encoder was trained on.
        leak: ``none``, or ``allowed`` when scored patients were, or may have been, pretrained on.
        leaked: those patients' ids.
        patient_ids: keys of everybody pretrained on (``patient_key``), or None if the encoder has no such list.
    """

    encoder_sha256: str = ""
    pretrain_datalist_hash: str = ""
    leak: str = "none"
    leaked: tuple[str, ...] = ()
    patient_ids: tuple[str, ...] | None = ()

    @property
    def record(self) -> dict[str, Any]:
        """What a model's record keeps, so that its evaluation can rule out a leak as well."""
        return {
            "encoder_sha256": self.encoder_sha256,
            "datalist_hash": self.pretrain_datalist_hash,
            "patient_ids": None if self.patient_ids is None else list(self.patient_ids),
        }


@functools.lru_cache
def _digest(path: Path, _changed: int) -> str:
    """A cross-validation asks for each of its runs."""
    return sha256_file(path)


def check_origin(
    init: str, encoder_path: str | os.PathLike[str], scored: Sequence[Mapping[str, Any]], allow_leak: bool = False
) -> Origin:
    """The leak guard: no scored patient was in the pretraining data of the encoder.

    Args:
        init: see ``is_pretrained``.
        encoder_path: the exported encoder, with its JSON beside it, or a folder that holds one (``find_encoder``).
        scored: items of the scored fold.
        allow_leak: continue anyway; the run is marked.

    Raises:
        InputError: with the ids of the scored patients that were pretrained on; or if the encoder has no list of its
            patients. A missing encoder has none here; ``check_encoder`` refuses it.
    """
    if not is_pretrained(init):
        return Origin()
    path = find_encoder(encoder_path, required=False)
    if not path.is_file():
        return Origin()
    record = path.with_suffix(".json")
    provenance = read_record(path).get("provenance") or {}
    digest, datalist_hash = _digest(path, path.stat().st_mtime_ns), str(provenance.get("datalist_hash") or "")
    known = provenance.get("patient_ids")
    if known is None:
        if allow_leak:
            logger.warning("%s has no list of pretraining subjects; the run is marked as a possible leak", path)
            return Origin(digest, datalist_hash, leak="allowed", patient_ids=None)
        raise InputError(
            f"{record}: has no list of pretraining subjects (provenance.patient_ids), so leakage into the scored "
            "fold cannot be ruled out; export the encoder again, or say --allow_leak True"
        )
    leaked = patients_known_to(scored, known)
    if leaked and not allow_leak:
        raise InputError.many(
            f"{path} was pretrained on {len(leaked)} of the {len(patients_of(scored))} scored patients",
            [(patient,) for patient in leaked],
            "Pretrain without them (volta3d prepare --exclude-patients-of), or say --allow_leak True, which marks the "
            "run.",
        )
    if leaked:
        logger.warning("%d scored patients were pretrained on; the run is marked: %s", len(leaked), ", ".join(leaked))
    return Origin(digest, datalist_hash, "allowed" if leaked else "none", tuple(leaked), tuple(known))


def check_encoder(init: str, encoder_path: str | os.PathLike[str]) -> None:
    """Make sure that the weights of an init are there, before long work starts.

    Raises:
        InputError: if they are not.
    """
    path = find_encoder(encoder_path, required=False)
    if is_pretrained(init) and not path.is_file():
        raise InputError(
            f"{path}: no such encoder. Pretrain one (python -m monai.bundle run --config_file "
            "bundles/pretrain/configs/train.json), give another (--encoder_path FILE), or train from scratch "
            "(the overlay of a *_scratch init)"
        )


def patients_known_to(items: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> list[str]:
    """Ids of the items' patients who are among a record's (``patient_ids``)."""
    known = set(keys)
    return sorted({str(item["patient_id"]) for item in items if patient_keys(item) & known})


def known_patients(record: Mapping[str, Any]) -> tuple[list[str] | None, list[str] | None]:
    """Keys of a model's training and pretraining patients, from its record; None if it has no such list."""
    trained = (record.get("provenance") or {}).get("patient_ids")
    if "pretraining" in record:
        return trained, record["pretraining"].get("patient_ids")
    from_scratch = (record.get("tags") or {}).get("encoder_sha256") == ""
    return trained, [] if from_scratch else None


def check_model(record: Mapping[str, Any], scored: Sequence[Mapping[str, Any]], allow_leak: bool = False) -> str:
    """The leak guard of a trained model: nobody who is scored was pretrained on or trained on.

    Args:
        record: the JSON beside the model; see ``save_model``.
        scored: items to be scored.
        allow_leak: continue anyway.

    Returns:
        ``none``, or ``allowed`` when scored patients were, or may have been, among them.

    Raises:
        InputError: with the ids of those who were; or if the record has no such list.
    """
    trained, pretrained = known_patients(record)
    unknown = [name for name, ids in (("trained", trained), ("pretrained", pretrained)) if ids is None]
    rows = [
        (patient, what)
        for what, ids in (("pretrained on", pretrained), ("trained on", trained))
        for patient in patients_known_to(scored, ids or ())
    ]
    if rows and not allow_leak:
        raise InputError.many(
            f"the model was trained or pretrained on {len({row[0] for row in rows})} of the "
            f"{len(patients_of(scored))} scored patients",
            rows,
            "Score the fold that it was trained for (--fold), or say --allow_leak True.",
            limit=10,
        )
    if unknown and not allow_leak:
        raise InputError(
            f"the JSON beside the model does not say on which subjects it was {' and '.join(unknown)}, so leakage into "
            "the scored part cannot be ruled out; fetch model and JSON, train again, or say --allow_leak True"
        )
    if rows:
        logger.warning("scored patients are known to the model: %s", ", ".join(sorted({row[0] for row in rows})))
    return "allowed" if rows or unknown else "none"
