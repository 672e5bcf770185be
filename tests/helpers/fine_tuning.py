# SPDX-License-Identifier: Apache-2.0
"""Patients to split and small encoders to start from: what the tests of fine-tuning share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder

SIZES = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 3, "num_heads": 4, "summary_heads": 4}


def cohort(count: int = 60, folds: int = 5, positive: float = 0.3, sessions: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "subject_id": f"sub-{patient:03d}",
            "patient_id": f"sub-{patient:03d}",
            "session": f"ses-M{12 * session:03d}",
            "label": int(patient // folds % 10 < 10 * positive),
            "fold": patient % folds,
        }
        for patient in range(count)
        for session in range(sessions)
    ]


def make_encoder(path: Path, patients: list[str] | None) -> Path:
    provenance: dict[str, Any] = {"datalist_hash": "d" * 64}
    if patients is not None:
        provenance["patient_ids"] = [hashlib.sha256(patient.encode()).hexdigest()[:16] for patient in patients]
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES), provenance)
    return path
