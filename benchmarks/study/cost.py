# SPDX-License-Identifier: Apache-2.0
"""What a study will take: steps of every network, timed here and now, times their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers.utils import dense_patch_slices, fall_back_tuple
from monai.utils import set_determinism

from benchmarks.step_forms import clock_of
from benchmarks.study.plan import RECIPE, TASKS, Study, split_anatomies
from volta_components.downstream.inits import BASE_INIT
from volta_components.method.graphs import GraphedFunction

REPEATS = 2


def seconds(step: Callable[[], Any]) -> float:
    """Of one step, after some that warm up: computing time on a CPU, which others may share; wall time on a GPU.

    On a GPU, one that is recorded is as fast as the others once it has been.
    """
    has_gpu = torch.cuda.is_available()
    clock = clock_of(torch.device("cuda" if has_gpu else "cpu"))
    for _ in range(GraphedFunction.WARM_UP + 1 if has_gpu else 1):
        step()
    times = []
    for _ in range(REPEATS):
        started = clock()
        step()
        times.append(clock() - started)
    return min(times)


def _parser(files: list[str], **ids: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(files)
    for name, value in ids.items():
        parser[name] = value
    return parser


def pretraining(study: Study) -> float:
    """Seconds of a pretraining: its steps, and the heads that are rendered for it."""
    _, scored = split_anatomies(study.anatomies)
    places = {"anatomies": str(study.anatomies), "leave_out": scored, "output_dir": str(study.root / "none")}
    parser = _parser(study.configs("pretrain", *RECIPE), num_workers=0, **places)
    names = ("epochs", "train#epoch_length", "batch_size", "heads_per_epoch", "fresh_heads")
    epochs, length, batch_size, heads, fresh = (parser.get_parsed_content(name) for name in names)
    set_determinism(0)
    trainer = parser.get_parsed_content("train#trainer")
    trainer.state.epoch, trainer.state.iteration = 1, 0
    batches: Iterator[Any] = iter(trainer.data_loader)
    batch = next(batches)

    def step() -> None:
        trainer.state.iteration += 1
        trainer._iteration(trainer, batch)

    rendered = heads + (epochs - 1) * (heads if fresh is None else fresh)
    found = seconds(step) * epochs * length + seconds(lambda: next(batches)) * rendered / batch_size
    set_determinism(None)
    return found


def windows(parser: ConfigParser, is_mask: bool) -> int:
    """Passes of the network that a scored volume takes."""
    if not is_mask:
        return 1
    shape, crop = (parser.get_parsed_content(name) for name in ("volume_size", "image_size"))
    overlap = parser.get_parsed_content("window_overlap")
    intervals = [
        side if side == whole else max(1, int(side * (1 - overlap))) for side, whole in zip(crop, shape, strict=True)
    ]
    return len(dense_patch_slices(shape, fall_back_tuple(crop, shape), intervals))


def fine_tuning(study: Study, task: str, init: str) -> float:
    """Seconds of all runs of an init by one encoder: one for each fraction and seed, with their scorings."""
    overlays = [] if init == BASE_INIT else [init]
    parser = _parser(
        study.configs(task, *overlays), bundle_root=f"bundles/{task}", dataset_dir=str(study.root / "none")
    )
    is_mask = task == "harp_hippocampus"
    names = ("network", "loss", "optimizer", "device", "amp", "amp_dtype")
    network, loss, optimizer, device, amp, amp_dtype = (parser.get_parsed_content(name) for name in names)
    batch = parser.get_parsed_content("batch_size")
    crops = batch * parser.get_parsed_content("crops_per_volume") if is_mask else batch
    image = torch.rand(crops, 1, *parser.get_parsed_content("image_size"), device=device)
    label = (image > 0.5).long() if is_mask else torch.arange(crops, device=device) % 2

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp):
            found = loss(network(image), label)
        found.backward()
        optimizer.step()

    def score() -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype=amp_dtype, enabled=amp):
            network(image[:1])

    one_step, one_pass = seconds(step), seconds(score)
    total = 0.0
    for fraction in study.fractions():
        parser = _parser(study.configs(task, *overlays), fraction=fraction)
        epochs, interval = (parser.get_parsed_content(name) for name in ("epochs", "val_interval"))
        heads = max(1.0, fraction * study.size.training_heads)
        scored = study.size.scored_heads if is_mask else study.size.scored_for_labels
        passes = scored * (epochs // interval + 1) * windows(parser, is_mask)
        total += one_step * epochs * math.ceil(heads / batch) + one_pass * passes
    return total * study.size.seeds


def table(study: Study) -> list[tuple[str, int, float]]:
    """What is trained, number of runs, and hours of one run after the other."""
    rows = [("pretraining", study.size.pretrainings, study.size.pretrainings * pretraining(study) / 3600)]
    each = study.size.seeds * len(study.fractions())
    for task, scratch in TASKS.items():
        inits = [(init, study.size.pretrainings + (init in study.size.untrained)) for init in study.size.pretrained]
        inits += product(scratch, [1])
        rows += [
            (f"{task}, {init}", each * times, times * fine_tuning(study, task, init) / 3600) for init, times in inits
        ]
    return rows
