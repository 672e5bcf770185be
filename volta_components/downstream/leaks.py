# SPDX-License-Identifier: Apache-2.0
"""The leak guard: nobody who is scored was trained on."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volta_components.data.fingerprint import near_copies
from volta_components.data.items import item_name
from volta_components.downstream.inits import is_pretrained
from volta_components.downstream.splits import patients_of
from volta_components.errors import InputError
from volta_components.files import sha256_file
from volta_components.method.weights import find_encoder, read_record
from volta_components.training.people import FACTS, key_of, look_alike_keys, patient_keys, sealed_keys, voxel_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a run's weights come from.

    Attributes:
        encoder_sha256: hash of the file; empty when training from scratch.
        pretrain_datalist_hash: of the data that the encoder was trained on.
        leak: ``none``, or ``allowed`` when scored patients were, or may have been, pretrained on.
        people: everybody pretrained on, as the encoder's record has them (``training.people.FACTS``); its
            ``patient_ids`` are None if the record has no such list.
        phantom: whether the encoder's record says that all of them are phantoms.
    """

    encoder_sha256: str = ""
    pretrain_datalist_hash: str = ""
    leak: str = "none"
    people: Mapping[str, Any] = field(default_factory=lambda: {"patient_ids": []})
    phantom: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What a model's record keeps, so that its evaluation can rule out a leak as well."""
        return {
            "encoder_sha256": self.encoder_sha256,
            "datalist_hash": self.pretrain_datalist_hash,
            "phantom": self.phantom,
            **self.people,
        }


@dataclass(frozen=True)
class Overlap:
    """Which scored patients a record knows.

    Attributes:
        known: ids of those who are in it, by id or by voxels, and how.
        look_alikes: ids that differ only in case, separators, prefixes or zero padding from one that is in it.
        near_copies: ids whose volume is nearly one that is in it, as far as fingerprints tell.
        sealed: whether the record is sealed by another lab, so that nothing can be found.
    """

    known: dict[str, str] = field(default_factory=dict)
    look_alikes: tuple[str, ...] = ()
    near_copies: tuple[str, ...] = ()
    sealed: bool = False


def find_overlap(scored: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Overlap:
    """Compare items with the people of a record: ids in any spelling, voxels, and what the volumes look like.

    Args:
        scored: items of datalists.
        record: ``provenance`` or ``pretraining`` of a record.
    """
    secret = key_of(record)
    if secret is None:
        return Overlap(sealed=True)
    ids, alike, voxels = (set(record.get(name) or ()) for name in ("patient_ids", "look_alike_ids", "voxel_hashes"))
    known: dict[str, str] = {}
    looks: set[str] = set()

    def among(keys: set[str], those: set[str]) -> bool:
        return not those.isdisjoint(sealed_keys(keys, secret) if secret else keys)

    for item in scored:
        patient = str(item["patient_id"])
        if among(patient_keys(item), ids):
            known[patient] = ""
        elif among(voxel_keys(item), voxels):
            known.setdefault(patient, "the same voxels, under another id")
        elif among(look_alike_keys(item), alike):
            looks.add(patient)
    prints = [str(print_) for print_ in record.get("fingerprints") or ()]
    new = [item for item in scored if item.get("fingerprint") and str(item["patient_id"]) not in known]
    pairs = near_copies([str(item["fingerprint"]) for item in new], prints)
    near = sorted({item_name(new[i]) + " and " + prints[j][:16] for i, j in pairs})
    return Overlap(known, tuple(sorted(looks - set(known))), tuple(near))


def _check_looks(what: str, overlap: Overlap, accept_look_alikes: bool, allow_leak: bool) -> str:
    """Warn of near copies, refuse ids that look alike; ``allowed`` if they may be a leak."""
    if overlap.near_copies:
        warnings.warn(
            f"{what}: {len(overlap.near_copies)} scored volumes look like one that it was trained on, and may be "
            f"copies of the same scan (scan, and fingerprint there): {'; '.join(overlap.near_copies[:10])}. volta3d "
            "check TRAINED_ON SCORED gives the names of both",
            stacklevel=3,
        )
    if not overlap.look_alikes or accept_look_alikes:
        return "none"
    if not allow_leak:
        raise InputError.many(
            f"{what}: {len(overlap.look_alikes)} scored patients have ids that look like those of patients it was "
            "trained on",
            [(patient,) for patient in overlap.look_alikes],
            "volta3d check TRAINED_ON SCORED lists both spellings. If they are the same people, train without them; if "
            "they are others, say --accept_look_alikes True.",
        )
    logger.warning("ids look like those of people it was trained on: %s", ", ".join(overlap.look_alikes))
    return "allowed"


@functools.lru_cache
def _digest(path: Path, _changed: int) -> str:
    """A cross-validation asks for each of its runs."""
    return sha256_file(path)


def check_origin(
    init: str,
    encoder_path: str | os.PathLike[str],
    scored: Sequence[Mapping[str, Any]],
    allow_leak: bool = False,
    accept_look_alikes: bool = False,
) -> Origin:
    """The leak guard: no scored patient was in the pretraining data of the encoder.

    Args:
        init: see ``is_pretrained``.
        encoder_path: the exported encoder, with its JSON beside it, or a folder that holds one (``find_encoder``).
        scored: items of the scored fold.
        allow_leak: continue anyway; the run is marked.
        accept_look_alikes: take ids that look alike for different people.

    Raises:
        InputError: with the ids of the scored patients that were pretrained on, or that look alike; or if the encoder
            has no list of its patients, or one that another lab has sealed. A missing encoder has none here;
            ``check_encoder`` refuses it.
    """
    if not is_pretrained(init):
        return Origin()
    path = find_encoder(encoder_path, required=False)
    if not path.is_file():
        return Origin()
    record = path.with_suffix(".json")
    provenance = read_record(path).get("provenance") or {}
    digest, datalist_hash = _digest(path, path.stat().st_mtime_ns), str(provenance.get("datalist_hash") or "")
    people, phantom = _people(provenance), provenance.get("phantom") is True
    overlap = find_overlap(scored, people)
    if why := _unknown(people, overlap):
        if allow_leak:
            logger.warning("%s %s; the run is marked as a possible leak", path, why)
            return Origin(digest, datalist_hash, leak="allowed", people=people, phantom=phantom)
        raise InputError(
            f"{record}: {why} (provenance.patient_ids), so leakage into the scored fold cannot be ruled out; export "
            "the encoder again, or say --allow_leak True"
        )
    leaked = sorted(overlap.known)
    if leaked and not allow_leak:
        raise InputError.many(
            f"{path} was pretrained on {len(leaked)} of the {len(patients_of(scored))} scored patients",
            [(patient, overlap.known[patient]) for patient in leaked],
            "Pretrain without them (volta3d prepare --exclude-patients-of), or say --allow_leak True, which marks the "
            "run.",
        )
    if leaked:
        logger.warning("%d scored patients were pretrained on; the run is marked: %s", len(leaked), ", ".join(leaked))
    leak = _check_looks(str(path), overlap, accept_look_alikes, allow_leak)
    return Origin(digest, datalist_hash, "allowed" if leaked else leak, people, phantom)


def _people(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a record keeps of people; ``patient_ids`` are None if it has no list of them."""
    return {"patient_ids": None, **{name: part[name] for name in FACTS if name in part}}


def _unknown(people: Mapping[str, Any], overlap: Overlap) -> str:
    """Why a record does not say whom it knows; empty if it does."""
    if people.get("patient_ids") is None:
        return "has no list of pretraining subjects"
    return f"has a list of {len(people['patient_ids'])} subjects that another lab has sealed" if overlap.sealed else ""


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


def known_people(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """People whom a model was trained and pretrained on, by its record; ``patient_ids`` are None without a list."""
    trained = _people(record.get("provenance") or {})
    if record.get("pretraining") is not None:
        return trained, _people(record["pretraining"])
    from_scratch = "pretraining" in record or (record.get("tags") or {}).get("encoder_sha256") == ""
    return trained, {"patient_ids": [] if from_scratch else None}


def check_model(
    record: Mapping[str, Any],
    scored: Sequence[Mapping[str, Any]],
    allow_leak: bool = False,
    accept_look_alikes: bool = False,
) -> str:
    """The leak guard of a trained model: nobody who is scored was pretrained on or trained on.

    Args:
        record: the JSON beside the model; see ``save_model``.
        scored: items to be scored.
        allow_leak: continue anyway.
        accept_look_alikes: take ids that look alike for different people.

    Returns:
        ``none``, or ``allowed`` when scored patients were, or may have been, among them.

    Raises:
        InputError: with the ids of those who were, or that look alike; or if the record has no such list, or one that
            another lab has sealed.
    """
    trained, pretrained = known_people(record)
    parts = {"trained": trained, "pretrained": pretrained}
    overlaps = {name: find_overlap(scored, people) for name, people in parts.items()}
    unknown = [name for name, people in parts.items() if people["patient_ids"] is None]
    closed = [name for name, overlap in overlaps.items() if overlap.sealed and name not in unknown]
    rows = [
        (patient, f"{name} on", how)
        for name in ("pretrained", "trained")
        for patient, how in sorted(overlaps[name].known.items())
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
    if closed and not allow_leak:
        raise InputError(
            f"another lab has sealed on which subjects the model was {' and '.join(closed)}, so leakage into the "
            "scored part cannot be ruled out; score patients who cannot be among them, and say --allow_leak True"
        )
    if rows:
        logger.warning("scored patients are known to the model: %s", ", ".join(sorted({row[0] for row in rows})))
    looks = {_check_looks("the model", overlap, accept_look_alikes, allow_leak) for overlap in overlaps.values()}
    return "allowed" if rows or unknown or closed or "allowed" in looks else "none"
