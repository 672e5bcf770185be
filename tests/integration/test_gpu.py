# SPDX-License-Identifier: Apache-2.0
"""Each training and inference on a GPU, with the quick start's sizes: ``make test-gpu``.

Everywhere else the tests compute on the CPU, where tensors on two devices, NCCL and half precision cannot go wrong.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from ignite.engine import Events
from method_helpers import HIDDEN, PATCH, tiny_run, tiny_views
from prepared import ROOT
from toy_anatomies import toy_folder

from volta_components.data.phantom.anatomy import geometry
from volta_components.data.phantom.heads import load_head
from volta_components.data.phantom.render import render_view, whole_view
from volta_components.data.phantom.scanner import draw_scanner
from volta_components.data.phantom.settings import Settings
from volta_components.data.phantom.subjects import draw_subject
from volta_components.method.air import AirTokens
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.weights import load_encoder
from volta_components.training.endless import EndlessHeads, anatomies_datalist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]

TASKS = {
    "ixi_sex": ("vit_scratch", "swin_scratch"),
    "aibl_ad": ("vit_scratch", "swin_scratch"),
    "harp_hippocampus": ("unetr_scratch", "unet_scratch"),
}


def run(*arguments: str) -> str:
    """``python ARGUMENTS`` in the repository's root; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def configs(bundle: str, *names: str) -> str:
    """Config files as MONAI takes a list of them."""
    return str([f"bundles/{bundle}/configs/{name}.json" for name in names])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared cohorts of phantoms, and an encoder that was pretrained on one of them, on the GPU.

    The processes of pytest-xdist share them: their temporary folders have one parent.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gpu"
    folder.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "one.safetensors").is_file():
            return folder
        for name, prefix, subjects, seed in (("pretrain", "PT", "12", "1"), ("labelled", "PL", "20", "2")):
            cohort = ("--subjects", subjects, "--seed", seed, "--prefix", prefix, "--spacing", "3")
            run("-m", "volta_components.cli", "phantom", "--output", str(folder / "raw" / name), *cohort)
            source = ("--layout", "bids", "--source", str(folder / "raw" / name))
            size = ("--spacing", "3", "--shape", "48,64,64")
            run("-m", "volta_components.cli", "prepare", *source, "--output", str(folder / name), *size)
        pretrain(folder, "one")
    return folder


def pretrain(folder: Path, name: str, *overlays: str, launcher: tuple[str, ...] = ()) -> None:
    files = configs("pretrain", "train", "tiny", *overlays)
    places = ("--dataset_dir", str(folder / "pretrain"), "--output_dir", str(folder / "runs" / name))
    places += ("--encoder_path", str(folder / f"{name}.safetensors"))
    options = ("--epochs", "2", "--num_workers", "2", "--log_interval", "2", "--checkpoint_minutes", "0")
    run("-m", *launcher, "monai.bundle", "run", "--config_file", files, *places, *options)


@pytest.mark.parametrize(
    ("together", "air", "graph"),
    [(together, air, False) for together in (True, False) for air in (None, AirTokens(PATCH, 0.3))]
    + [(together, None, True) for together in (True, False)],
)
def test_nothing_waits_for_the_gpu(together: bool, air: AirTokens | None, graph: bool) -> None:
    """Six whole mini-batches, two optimiser steps among them, between two readings: every wait is an error."""
    options = {"views_together": together, "views": tiny_views(air=air), "amp": True, "cuda_graph": graph}
    parts = tiny_run(count=12, epochs=1, accumulation_steps=3, log_interval=99, run_on="cuda", **options)

    def mode(name: str) -> None:
        torch.cuda.set_sync_debug_mode(name)

    # The first mini-batches fill caches, such as that of the position embedding's weights; the fourth records a graph.
    parts.trainer.add_event_handler(Events.ITERATION_STARTED(once=5), lambda: mode("error"))
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), lambda: mode("default"))
    try:
        parts.trainer.run()
    finally:
        mode("default")
    assert parts.trainer.state.iteration == 12


@pytest.mark.parametrize(
    "options", [{}, {"koleo_loss": KoLeoLoss(HIDDEN)}, {"views_together": False}, {"count": 17, "batch_size": 2}]
)
def test_a_graph_gives_the_same_run(options: dict[str, Any]) -> None:
    """The last window of each epoch is shorter, and so may its last batch be; the last layers are frozen at first."""

    def run_of(graph: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        run_on = {"run_on": "cuda", "cuda_graph": graph}
        parts = tiny_run(**{"count": 8, "epochs": 2, "accumulation_steps": 3, **run_on, **copy.deepcopy(options)})
        outputs: list[dict[str, float]] = []
        parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda each: outputs.extend(each.state.output))
        parts.trainer.run()
        return outputs, parts.teacher.state_dict() | parts.loss.state_dict()

    (outputs, weights), (others, other_weights) = run_of(False), run_of(True)
    assert len(outputs) == len(others) == (18 if options.get("count") else 16)
    for one, other in zip(outputs, others, strict=True):
        assert set(one) == set(other)
        for name in set(one) - {"volumes_per_second"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    for name, value in weights.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other_weights[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_encoder_loads_on_the_cpu(folder: Path) -> None:
    tokens = load_encoder(folder / "one.safetensors").encode(torch.rand(1, 1, 48, 64, 64))
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize(
    "overlay",
    ["koleo", "sinkhorn", "dino_gaps", "token_centre", "masked_tokens", "stochastic_depth", "drop_air"],
)
def test_variants_of_pretraining(folder: Path, overlay: str) -> None:
    pretrain(folder, overlay, overlay)


def test_heads_are_rendered_on_the_gpu(folder: Path) -> None:
    """As on the CPU, but for rounding, texture, bias field and noise; and a pretraining on them."""
    items = anatomies_datalist(toy_folder(folder / "anatomies", 2), (40, 44, 40), 3.0).items
    head = load_head(items[0]["subject_id"], items[0]["image"])
    subject = draw_subject(Settings(anatomies=(head.name,)), 1)
    silence = {"noise": 0.0, "bias": 0.0, "deviations": np.zeros(256, np.float32)}
    scanner = replace(draw_scanner(np.random.default_rng(0)), **silence)
    for spacing in (1, 3):
        view = whole_view(head, spacing)
        where = geometry(subject, head)
        here = render_view(subject, head, where, scanner, view)
        there = render_view(subject, head, where, scanner, replace(view, device=torch.device("cuda")))
        assert there.image.device.type == there.hippocampi.device.type == "cuda"
        assert torch.allclose(there.image.cpu(), here.image, atol=2e-3)
        assert torch.allclose(there.hippocampi.cpu(), here.hippocampi, atol=2e-3)
        assert there.volumes == pytest.approx(here.volumes, rel=1e-3)
    here, there = (EndlessHeads(items, 4, (40, 44, 40), spacing=3.0, device=name)[(1, 2)] for name in ("cpu", "cuda"))
    assert (here["label"] != there["label"].cpu()).float().mean() < 1e-3
    assert np.corrcoef(here["image"].flatten(), there["image"].cpu().flatten())[0, 1] > 0.8
    again = EndlessHeads(items, 4, (40, 44, 40), spacing=3.0, device="cuda")[(1, 2)]
    assert torch.equal(again["image"], there["image"])

    files = configs("pretrain", "train", "tiny", "synthetic")
    places = ("--anatomies", str(folder / "anatomies"), "--output_dir", str(folder / "runs" / "endless"))
    places += ("--encoder_path", str(folder / "endless.safetensors"))
    options = ("--epochs", "1", "--heads_per_epoch", "8", "--render_device", "cuda", "--num_workers", "0")
    run("-m", "monai.bundle", "run", "--config_file", files, *places, *options)
    assert (folder / "endless.safetensors").is_file()


def test_distributed_pretraining(folder: Path) -> None:
    """A process for each GPU, joined by NCCL."""
    count = str(min(torch.cuda.device_count(), 4))
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", count, "-m")
    pretrain(folder, "distributed", "multi_gpu_train", launcher=launcher)


def test_probes(folder: Path) -> None:
    places = ("--dataset_dir", str(folder / "labelled"), "--output_dir", str(folder / "probes"))
    arguments = ("--encoder_path", str(folder / "one.safetensors"), "--neighbours", "3")
    config = "bundles/pretrain/configs/evaluate.json"
    output = run("-m", "monai.bundle", "run", "--config_file", config, *places, *arguments)
    assert "value (95 % interval, out of fold), chance" in output


@pytest.mark.parametrize(("bundle", "overlay"), [(b, o) for b, names in TASKS.items() for o in ("", *names)])
def test_fine_tuning_and_inference(folder: Path, bundle: str, overlay: str) -> None:
    names = [name for name in (overlay, "tiny") if name]
    target = folder / bundle / (overlay or "volta")
    model = ("--model_path", str(target / "model.pt"), "--num_workers", "2")
    places = ("--dataset_dir", str(folder / "labelled"), "--output_dir", str(target / "run"))
    options = ("--epochs", "1", "--warmup_epochs", "0", "--encoder_path", str(folder / "one.safetensors"))
    files = configs(bundle, "train", *names)
    run("-m", "monai.bundle", "run", "--config_file", files, *places, *model, *options)
    places = ("--source", str(folder / "raw" / "labelled" / "sub-PL0001"), "--output_dir", str(target / "out"))
    run("-m", "monai.bundle", "run", "--config_file", configs(bundle, "inference", *names), *places, *model)
    assert len(list((target / "out").rglob("*.csv"))) == 1
