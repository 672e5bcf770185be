# SPDX-License-Identifier: Apache-2.0
"""What a run was made from: settings, code version, data."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import monai
import torch

from volta_components._version import __version__
from volta_components.data.identity import canonical_patient_id, is_worldwide


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, so that only the differing lines of a block are shown."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= (
            flatten_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return result


def plain_settings(value: Any) -> Any:
    """Settings as types that a ``weights_only`` checkpoint can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain_settings(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_settings(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def code_version() -> str:
    """Version of this package, with the commit where it runs from a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


def describe(thing: Any) -> dict[str, Any]:
    """An object's class and the plain values that it was built with, for a run's settings."""
    plain = (str, int, float, bool, type(None), list, tuple)
    values = {key: value for key, value in vars(thing).items() if not key.startswith("_") and key != "training"}
    return {"class": type(thing).__name__, **{key: value for key, value in values.items() if isinstance(value, plain)}}


def patient_key(patient_id: str, cohort: str = "") -> str:
    """A hash of a patient's canonical id (16 hexadecimal digits): overlaps can be found without passing on ids.

    Args:
        patient_id: in any form.
        cohort: the data set. It is part of the key where ids are unique within the data set only, such as ``sub-0001``.
    """
    canonical = canonical_patient_id(patient_id)
    text = canonical if not cohort or is_worldwide(canonical) else f"{cohort}/{canonical}"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def patient_keys(item: Mapping[str, Any]) -> set[str]:
    """The keys that a record may hold for an item's patient: with the cohort, and without it where none was known."""
    patient = str(item["patient_id"])
    return {patient_key(patient, str(item.get("cohort") or "")), patient_key(patient)}


def provenance(
    settings: Mapping[str, Any], datalist_hash: str, items: Iterable[Mapping[str, Any]], cohort: str = ""
) -> dict[str, Any]:
    """Everything needed to say how a result was obtained, and which patients it must not be scored on.

    Args:
        settings: the run's settings, by name.
        datalist_hash: hash of the datalist that it read.
        items: the items trained on, with ``patient_id`` and, where known, ``cohort``.
        cohort: name of the data set.
    """
    items = list(items)
    return {
        "settings": dict(settings),
        "cohort": cohort,
        "volumes": len(items),
        "datalist_hash": datalist_hash,
        "patient_ids": sorted({patient_key(str(item["patient_id"]), str(item.get("cohort") or "")) for item in items}),
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "monai_version": monai.__version__,
        "python_version": platform.python_version(),
    }
