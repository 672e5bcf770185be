# SPDX-License-Identifier: Apache-2.0
"""The encoder that is written at the end of a run."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import flat, tiny_run

from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file
from volta_components.method.export import EncoderExport
from volta_components.method.monitoring import ReconstructionPicture
from volta_components.method.weights import load_encoder
from volta_components.training.checkpoint import ResumableCheckpoint
from volta_components.training.record import provenance


def test_the_last_picture_and_the_cost_are_kept_with_the_encoder(tmp_path: Path) -> None:
    parts = tiny_run(count=2, epochs=2)
    path, pictures = tmp_path / "models" / "encoder.safetensors", tmp_path / "pictures"
    views, network = parts.views, parts.plain_student.network
    ReconstructionPicture(pictures, parts.loader.dataset, network, views, interval=1).attach(parts.trainer)
    EncoderExport(path, {"student": network}, "student", dict, pictures).attach(parts.trainer)
    ResumableCheckpoint(tmp_path / "checkpoint.pt", {}, {}).attach(parts.trainer)
    parts.trainer.run()
    record, beside = json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".png")
    assert beside.read_bytes() == (pictures / "reconstruction_0002.png").read_bytes()
    assert record["picture"]["sha256"] == sha256_file(beside) and record["picture"]["shows_scans"]
    assert "after epoch 2" in record["picture"]["caption"]
    assert 0 < record["cost"]["hours"] < 1 and 0 < record["cost"]["peak_memory_gib"] < 100
    # An encoder without a picture does not inherit the one of another.
    again = tiny_run(count=2, epochs=1)
    networks = {"student": again.plain_student.network}
    EncoderExport(path, networks, "student", dict, tmp_path / "none").attach(again.trainer)
    again.trainer.run()
    assert not beside.exists() and "picture" not in json.loads(path.with_suffix(".json").read_text())


def test_an_encoder_of_another_run_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "models" / "encoder.safetensors"

    def export(settings: dict[str, Any]) -> bytes:
        parts = tiny_run(count=2, epochs=1)
        networks = {"teacher": parts.teacher.network}
        EncoderExport(path, networks, "teacher", partial(provenance, settings, "abc", [])).attach(parts.trainer)
        parts.trainer.run()
        return path.read_bytes()

    first = export({"epochs": 300})
    assert export({"epochs": 300}) == first and len(list(path.parent.iterdir())) == 2
    export({"epochs": 1})
    kept = path.with_stem(f"encoder_{hashlib.sha256(first).hexdigest()[:8]}")
    assert f"kept as {kept}" in caplog.text and kept.read_bytes() == first
    assert read_json(kept.with_suffix(".json"))["provenance"]["settings"] == {"epochs": 300}
    assert read_json(path.with_suffix(".json"))["provenance"]["settings"] == {"epochs": 1}
    load_encoder(kept)


def test_the_export_at_the_end_of_a_run(tmp_path: Path) -> None:
    parts = tiny_run(count=2, epochs=2)
    path = tmp_path / "models" / "encoder.safetensors"
    networks = {"teacher": parts.teacher.network, "student": parts.plain_student.network}
    EncoderExport(path, networks, "teacher", partial(provenance, {"seed": 0}, "abc", [])).attach(parts.trainer)
    with pytest.raises(InputError, match="export 'Teacher': choose teacher or student"):
        EncoderExport(path, networks, "Teacher", dict)
    parts.trainer.run()
    network = load_encoder(path)
    mine, theirs = flat(network), flat(parts.teacher.network)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(value, theirs[name]) for name, value in mine.items())
    record = json.loads(path.with_suffix(".json").read_text())["provenance"]
    assert (record["epochs"], record["iterations"], record["datalist_hash"]) == (2, 4, "abc")
    assert record["settings"] == {"seed": 0}
    assert record["exported"] == "teacher"
    assert record["torch_version"] == torch.__version__
