# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/learning_pairs.py``: differences are paired, and heads are found by an encoder's own tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from method_helpers import IMAGE, tiny_network

from benchmarks.learning_pairs import BASE, VOXELS, WAYS, hits_of_run, paired_lines
from volta_components.method.weights import save_encoder


def run(name: str, seed: int, values: list[float]) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    return {"name": name, "epochs": 50, "seed": seed}, {way: np.array(values) for way in WAYS}


def test_differences_are_paired_by_seed_and_by_head() -> None:
    pairs = [
        run(BASE, 0, [0.0, 0.5, 1.0, 0.0]),
        run(BASE, 1, [0.5, 0.0, 0.5, 0.5]),
        run("better by a half", 0, [0.5, 1.0, 1.5, 0.5]),
        run("better by a half", 1, [1.0, 0.5, 1.0, 1.0]),
        run("one seed", 1, [0.5, 0.0, 0.5, 0.0]),
        run("another seed", 7, [1.0, 1.0, 1.0, 1.0]),
    ]
    voxels = run(VOXELS, 0, [0.25, 0.25, 0.75, 0.25])[1]
    given = [each[0] for each in pairs], [each[1] for each in pairs], voxels, ["a", "a", "b", "b"]
    lines = paired_lines(*given)[2:]
    assert len(lines) == 3
    # Beside voxels (by hand, means of 0.375 and of 0.875), seed 7 too, of which reconstruction alone is missing.
    beside = paired_lines(*given, base=VOXELS)[2:]
    assert [line.split(" (")[0] for line in beside] == [
        f"| {BASE} | 50 | 2 | +0.00",
        "| better by a half | 50 | 2 | +0.50",
        "| one seed | 50 | 1 | -0.12",
        "| another seed | 50 | 1 | +0.62",
    ]
    assert lines.pop(0).startswith(f"| {VOXELS} | 50 | 2 | +0.00 (")
    # Head by head and seed by seed it is the same difference, so that no draw gives another.
    assert lines[0] == "| better by a half | 50 | 2 | " + " | ".join(["+0.50 (+0.50 to +0.50)"] * 3) + " |"
    # By hand: the last head is half below. b is drawn twice in a quarter of the samples, and of four draws of its two
    # heads all are the last one once in 16 (1.6 % in all, less than 2.5), three of them four times in 16.
    assert lines[1] == "| one seed | 50 | 1 | " + " | ".join(["-0.12 (-0.38 to +0.00)"] * 3) + " |"


def test_heads_are_found_where_their_scans_are_nearest(tmp_path: Path) -> None:
    network = tiny_network(3)
    save_encoder(tmp_path / "encoder.safetensors", network, {"seed": 3})
    rng = np.random.default_rng(0)
    heads = rng.random((5, *IMAGE)).astype(np.float32)
    scans = np.concatenate([heads, heads + 0.01 * rng.random(heads.shape).astype(np.float32)])
    # e's second scan looks as d's first, which has a nearer one.
    scans[9] = heads[3] + 0.1 * rng.random(heads.shape[1:])
    names, finished = np.array([*"abcde"] * 2), {"encoder": tmp_path / "encoder.safetensors", "heads": "1"}
    found = hits_of_run(finished, names, scans)
    for way in ("places", "summary"):
        assert found[way][:4].tolist() == [1, 1, 1, 1] and found[way][4] <= 0.5
    assert set(found) == set(WAYS)
    # Kept for these heads, and found again for others.
    kept = hits_of_run(finished, names, scans[::-1])
    assert all(np.array_equal(kept[way], found[way]) for way in WAYS)
    others = hits_of_run(finished | {"heads": "2"}, names, np.concatenate([scans[:5], scans[:5]]))
    assert others["places"].tolist() == [1] * 5
