# SPDX-License-Identifier: Apache-2.0
"""What a record keeps of the people whom weights were trained on: hashes, by which overlaps can be found.

Ids are short, so that whoever knows how they are formed can try them all: hashes of ids hide nobody. Before weights
leave a lab, ``volta3d pack`` therefore seals them with a secret that stays there.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from volta_components.data.identity import exact_person, loose_person, voxel_hashes, who
from volta_components.errors import InputError

# Of a record: keys of people by their ids, and by their ids in any spelling; of their scans' voxels; what scans look
# like; and which secret the others are sealed with.
FACTS = ("patient_ids", "look_alike_ids", "voxel_hashes", "fingerprints", "sealed_with")
SECRET = "VOLTA3D_SECRET"


def patient_key(patient_id: str, cohort: str = "") -> str:
    """A hash of a patient's canonical id (16 hexadecimal digits): overlaps can be found without passing on ids.

    Args:
        patient_id: in any form.
        cohort: the data set. It is part of the key where ids are unique within the data set only, such as ``sub-0001``.
    """
    return _key(exact_person(patient_id, cohort))


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def patient_keys(item: Mapping[str, Any]) -> set[str]:
    """The keys that a record may hold for an item's patient: with the cohort, and without it where none was known."""
    patient, cohort = who(item)
    # As version 0.1.0 kept those whom a merge had renamed.
    merged = _key(f"{cohort}/{cohort}-{patient}")
    return {patient_key(patient, cohort), patient_key(patient), merged}


def look_alike_keys(item: Mapping[str, Any]) -> set[str]:
    """The same for ids in any spelling; see ``loose_person``."""
    patient, cohort = who(item)
    return {_key(loose_person(patient, cohort)), _key(loose_person(patient))}


def voxel_keys(item: Mapping[str, Any]) -> set[str]:
    """The first 16 digits of the hashes of an item's voxels and source."""
    return {digest[:16] for digest in voxel_hashes(item)}


def facts_of(items: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What a record keeps of the people in these items."""
    items = list(items)
    return {
        "patient_ids": sorted({patient_key(*who(item)) for item in items}),
        "look_alike_ids": sorted({_key(loose_person(*who(item))) for item in items}),
        "voxel_hashes": sorted({key for item in items for key in voxel_keys(item)}),
        "fingerprints": sorted({str(item["fingerprint"]) for item in items if item.get("fingerprint")}),
    }


def secret_path() -> Path:
    """Where the lab's secret lies: the file that the variable VOLTA3D_SECRET names, or ~/.config/volta3d/secret."""
    return Path(os.environ.get(SECRET) or "~/.config/volta3d/secret").expanduser()


def read_secret() -> bytes | None:
    """The lab's secret; None if there is none.

    Raises:
        InputError: if it cannot be read, or is too short to be one.
    """
    path = secret_path()
    try:
        secret = path.read_bytes().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: the lab's secret cannot be read ({error.strerror}); see docs/sharing.md") from error
    if len(secret) < 32:
        raise InputError(
            f"{path}: too short for a secret; restore it, or remove it and let volta3d pack make a new one"
        )
    return secret


def make_secret() -> bytes:
    """The lab's secret, made where there is none: a file that only its owner can read.

    Raises:
        InputError: if it can be neither read nor written.
    """
    if (secret := read_secret()) is not None:
        return secret
    path = secret_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32) + "\n")
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(fresh, path)
        fresh.unlink()
    except OSError as error:
        raise InputError(
            f"{path}: the lab's secret cannot be written ({error.strerror}); name another file in {SECRET}"
        ) from error
    return make_secret()


def name_of(secret: bytes) -> str:
    """By which a record says what it is sealed with."""
    return hmac.new(secret, b"name", hashlib.sha256).hexdigest()[:16]


def sealed_keys(keys: Iterable[str], secret: bytes) -> set[str]:
    """Keys that nobody can make, or try, without the secret."""
    return {hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()[:16] for key in keys}


def sealed(record: Mapping[str, Any], secret: bytes) -> dict[str, Any]:
    """A record whose hashes of people and voxels are sealed, and whose fingerprints are gone.

    Fingerprints are compared by how many bits differ, which nothing sealed allows. Hashes that are sealed already stay.

    Args:
        record: ``provenance``, or ``pretraining``.
        secret: the lab's.
    """
    found = dict(record)
    if found.get("sealed_with"):
        return found
    found.pop("fingerprints", None)
    for name in ("patient_ids", "look_alike_ids", "voxel_hashes"):
        if found.get(name) is not None:
            found[name] = sorted(sealed_keys(found[name], secret))
    return {**found, "sealed_with": name_of(secret)}


def sealed_record(record: Mapping[str, Any], secret: bytes | None) -> dict[str, Any]:
    """The record of weights, with what it has of people in training and pretraining sealed; as it is without secret."""
    if secret is None:
        return dict(record)
    parts = {name: sealed(record[name], secret) for name in ("provenance", "pretraining") if record.get(name)}
    return {**record, **parts}


def key_of(record: Mapping[str, Any]) -> bytes | None:
    """The secret that a record's hashes are sealed with; empty where they are not; None if it is another lab's."""
    if not record.get("sealed_with"):
        return b""
    secret = read_secret()
    return secret if secret is not None and name_of(secret) == record["sealed_with"] else None


def joined(before: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a record keeps after a further training: the people of a record, and those of these items.

    Returns:
        None if the record has no list of people, or one that another lab has sealed.
    """
    secret = key_of(before)
    if before.get("patient_ids") is None or secret is None:
        return None
    new = sealed(facts_of(items), secret) if secret else facts_of(items)
    lists = [name for name in FACTS if name in new and name != "sealed_with"]
    union = {name: sorted({*(before.get(name) or ()), *new[name]}) for name in lists}
    return union | ({"sealed_with": before["sealed_with"]} if secret else {})
