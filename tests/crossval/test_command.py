# SPDX-License-Identifier: Apache-2.0
"""``volta3d crossval --adopt``: a finished run's model becomes the bundle's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import empty_store, write_bundle, write_datalist

from volta_components.cli import main
from volta_components.crossval import execute as module
from volta_components.crossval.execute import Outcome
from volta_components.crossval.plan import Run


def record(name: str) -> dict[str, Any]:
    return {"of": name, "provenance": {"settings": {"run": name}}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake bundle and its datalist; a run ends at once, and leaves a model that tells its name."""
    write_bundle(tmp_path)
    write_datalist(tmp_path / "datalist.json")
    empty_store(tmp_path / "runs")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def run_here(runs: Sequence[Run], *_: Any) -> Iterator[Outcome]:
        for run in runs:
            failed = run.name == os.environ.get("FAILS")
            if not failed:
                (run.folder / "models").mkdir(exist_ok=True)
                (run.folder / "models" / "model_tiny.pt").write_bytes(run.name.encode())
                (run.folder / "models" / "model_tiny.json").write_text(json.dumps(record(run.name)))
                (run.folder / "models" / "model_tiny.png").write_bytes(run.name.encode())
            yield Outcome(run, "failed" if failed else "finished")

    monkeypatch.setattr(module, "run_here", run_here)
    return tmp_path


WORDS = ["crossval", "--bundle", "fake", "--datalist", "datalist.json", "--inits", "volta,linear_scratch"]
WORDS += ["--folds", "2", "--fractions", "1.0,0.5"]


def test_the_first_inits_model_at_the_largest_fraction(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (place / "fake" / "models").iterdir())
    assert main([*WORDS]) == 0
    assert sorted(path.name for path in (place / "fake" / "models").iterdir()) == before
    assert main([*WORDS, "--adopt", "1"]) == 0
    model = place / "fake" / "models" / "model_tiny.pt"
    assert model.read_bytes() == model.with_suffix(".png").read_bytes() == b"volta_fold1_frac1_seed1"
    assert json.loads(model.with_suffix(".json").read_text()) == record("volta_fold1_frac1_seed1")
    assert "fake/models/model_tiny.pt: the model of volta_fold1_frac1_seed1" in capsys.readouterr().out
    assert main([*WORDS, "--adopt", "0"]) == 0
    assert model.read_bytes() == b"volta_fold0_frac1_seed0"
    (kept,) = model.parent.glob("model_tiny_*.pt")
    assert kept.read_bytes() == kept.with_suffix(".png").read_bytes() == b"volta_fold1_frac1_seed1"
    assert f"seed0; the one before is kept as {kept.name}" in capsys.readouterr().out


def test_not_of_an_unfinished_crossval_nor_of_a_fold_that_is_not_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", "linear_scratch_fold1_frac1_seed1")
    assert main([*WORDS, "--adopt", "0"]) == 1
    assert main([*WORDS, "--adopt", "2"]) == 2
    assert "--adopt 2: not one of the folds that are run" in capsys.readouterr().err
    assert not (place / "fake" / "models" / "model_tiny.pt").exists()


def test_a_network_from_scratch_is_not_adopted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model has a name of its own, which nothing that uses the bundle looks for."""
    words = [word if word != "volta,linear_scratch" else "linear_scratch,volta" for word in WORDS]
    assert main([*words, "--adopt", "0"]) == 2
    assert "the first of --inits, linear_scratch, is from scratch" in capsys.readouterr().err
    assert not list(place.glob("runs/fake/*/models"))
