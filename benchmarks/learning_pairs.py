# SPDX-License-Identifier: Apache-2.0
"""How far the settings of ``learning.py`` are above another at finding heads: paired, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.study.results import draw, replicates
from volta_components.bundle import load_encoder
from volta_components.downstream.metrics import interval
from volta_components.files import read_json, write_json
from volta_components.inference.probes import finds_same_subject

BASE, VOXELS = "reconstruction alone", "voxels, all"
WAYS = ("summary", "places", "whitened")
Hits = Mapping[str, NDArray[np.float64]]


def read_heads(scored: Path) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """Items of the scored heads, and their voxels ``[n, D, H, W]``."""
    items = read_json(scored / "datalist.json")["training"]
    return items, np.stack([nib.load(scored / item["image"]).get_fdata(dtype=np.float32) for item in items])


def find_heads(summary: NDArray[Any], places: NDArray[Any], heads: NDArray[np.str_]) -> Hits:
    """Share of each head's scans whose nearest neighbour is another scan of it, ``[heads]``, in each of ``WAYS``.

    Args:
        summary: ``[n, D]``.
        places: ``[n, D]``, features that say where.
        heads: ``[n]``, whose scan each one is.
    """
    cohort = np.full(len(heads), "")
    found = {
        "summary": finds_same_subject(summary, heads, cohort)[0],
        "places": finds_same_subject(places, heads, cohort)[0],
        "whitened": finds_same_subject(places, heads, cohort, components=100)[0],
    }
    names = np.unique(heads)
    return {way: np.array([each[heads == name].mean() for name in names]) for way, each in found.items()}


@torch.inference_mode()
def find_by_encoder(encoder: Path, heads: NDArray[np.str_], voxels: NDArray[np.float32]) -> Hits:
    """The same by an encoder's summary and tokens of voxels ``[n, D, H, W]``."""
    network = load_encoder(encoder).eval()
    tokens = torch.cat([network.encode(part[:, None]) for part in torch.from_numpy(voxels).split(16)])
    return find_heads(network.summarise(tokens).numpy(), tokens.flatten(1).numpy(), heads)


def hits_of_run(run: Mapping[str, Any], heads: NDArray[np.str_], voxels: NDArray[np.float32]) -> Hits:
    """The same by the encoder of a run; found once, and kept beside it for these heads."""
    path = run["encoder"].with_name("hits.json")
    kept = read_json(path) if path.is_file() else {}
    if kept.get("heads") != run["heads"]:
        found = find_by_encoder(run["encoder"], heads, voxels)
        kept = {"heads": run["heads"], "hits": {way: each.tolist() for way, each in found.items()}}
        write_json(path, kept)
    return {way: np.array(each) for way, each in kept["hits"].items()}


def differences(
    runs: Sequence[Mapping[str, Any]],
    items: Sequence[Mapping[str, Any]],
    voxels: NDArray[np.float32],
) -> tuple[list[str], list[str]]:
    """Lines of two tables: each setting beside ``BASE``, and beside ``VOXELS``, of as many epochs and the same seeds.

    Args:
        runs: as ``learning.finished`` gives them.
        items: the scored heads' scans; people, their heads and the seeds are drawn with replacement, the same ones for
            both sides of a difference.
        voxels: ``[n, D, H, W]`` of these.
    """
    heads = np.array([item["subject_id"] for item in items])
    people = {item["subject_id"]: item["patient_id"] for item in items}
    flat = voxels.reshape(len(voxels), -1)
    by_voxels = find_heads(flat, flat, heads)
    hits = [hits_of_run(run, heads, voxels) for run in runs]
    owners = [people[name] for name in np.unique(heads)]
    beside, beside_voxels = (paired_lines(runs, hits, by_voxels, owners, base) for base in (BASE, VOXELS))
    return beside, beside_voxels


def paired_lines(
    runs: Sequence[Mapping[str, Any]], hits: Sequence[Hits], by_voxels: Hits, people: Sequence[str], base: str = BASE
) -> list[str]:
    """The lines from hits of each run and of the heads' own voxels; ``people`` has the anatomy of each head."""
    by_setting: dict[tuple[int, str], dict[int, Hits]] = {
        (run["epochs"], VOXELS): {each["seed"]: by_voxels for each in runs} for run in runs
    }
    for run, found in zip(runs, hits, strict=True):
        by_setting.setdefault((run["epochs"], run["name"]), {})[run["seed"]] = found
    lines = [f"| setting | epochs | seeds | {' | '.join(WAYS)} |", "|---" * (3 + len(WAYS)) + "|"]
    for (epochs, name), own in by_setting.items():
        other = by_setting.get((epochs, base), {})
        seeds = sorted(own.keys() & other.keys())
        if name == base or not seeds:
            continue
        draws, cells = draw(people, len(seeds), 1), []
        for way in WAYS:
            scores = [np.array([[each[seed][way] for seed in seeds]]) for each in (own, other)]
            ours, theirs = (replicates("dice", np.zeros(len(people)), each, draws) for each in scores)
            low, high = interval(ours[1] - theirs[1])
            cells.append(f"{ours[0] - theirs[0]:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {name} | {epochs} | {len(seeds)} | {' | '.join(cells)} |")
    return lines
