# SPDX-License-Identifier: Apache-2.0
"""How good the starter model of the hippocampus bundle is, on anatomies that it was not trained on.

    python benchmarks/hippocampus_scores.py --anatomies DIR --renderings 50

Heads are grown from the held-out label maps (``volta3d phantom``), segmented as a user would (``volta3d segment``), and
scored on the scan's own grid, in four conditions: T1-like with skull and without, any contrast with skull and without.
``--scans DIR`` adds real scans, of which only volumes are told. A table goes to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from volta_components.data.phantom.command import phantom
from volta_components.data.phantom.labels import find_label_maps
from volta_components.downstream.metrics import score_mask

CONDITIONS = {
    "T1, skull": {"contrast": "t1", "skull_share": 1.0},
    "T1, stripped": {"contrast": "t1", "skull_share": 0.0},
    "any contrast, skull": {"contrast": "any", "skull_share": 1.0},
    "any contrast, stripped": {"contrast": "any", "skull_share": 0.0},
}
RESULTS = Path(__file__).parent / "results" / "hippocampus_model.md"


def segment(source: str, output: Path, bundle: str) -> float:
    """Run ``volta3d segment`` as a user does; seconds."""
    began = time.monotonic()
    words = ["-m", "volta_components.cli", "segment", "--source", source, "--output", str(output), "--bundle", bundle]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def score_condition(
    folder: Path,
    heads: Path,
    anatomies: str,
    left_out: list[str],
    count: int,
    bundle: str,
    condition: str,
    seed: int,
    workers: int,
) -> tuple[pd.DataFrame, float]:
    """Scores of every head of a condition, and seconds a scan."""
    phantom(
        str(heads), count, seed=seed, anatomies=anatomies, leave_out=left_out, workers=workers, **CONDITIONS[condition]
    )
    with (heads / "participants.tsv").open(newline="") as stream:
        people = {row["participant_id"]: row["anatomy"] for row in csv.DictReader(stream, delimiter="\t")}
    seconds = segment(str(heads), folder / "masks", bundle)
    masks = {path.name.split("_")[0]: path for path in (folder / "masks").rglob("*_hippocampus.nii.gz")}
    rows = []
    for name, anatomy in people.items():
        stem = f"{name}/ses-M000/anat/{name}_ses-M000_desc-hippocampus_dseg.nii.gz"
        truth = nib.load(heads / "derivatives" / "hippocampus" / stem)
        mask = np.asarray(nib.load(masks[name]).dataobj).astype(np.uint8)
        there = np.asarray(truth.dataobj)
        exchanged = np.array([0, 2, 1], np.uint8)[mask]
        scores = score_mask(mask, there, truth.header.get_zooms()[:3])
        swapped = score_mask(exchanged, there, truth.header.get_zooms()[:3])["dice"] > scores["dice"]
        rows.append({"condition": condition, "anatomy": anatomy, "swapped": swapped, **scores})
    return pd.DataFrame(rows), seconds / len(rows)


def main() -> None:
    """Score, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies", required=True)
    parser.add_argument("--bundle", default="bundles/harp_hippocampus")
    parser.add_argument("--scored", default="anatomy-05,anatomy-10,anatomy-15,anatomy-20")
    parser.add_argument("--renderings", type=int, default=50, help="of each anatomy, in each condition")
    parser.add_argument("--any-renderings", type=int, help="of each anatomy with any contrast; --renderings by default")
    parser.add_argument("--work", type=Path, help="folder where heads are kept for the next time")
    parser.add_argument("--scans", help="folder of real scans")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scored = arguments.scored.split(",")
    left_out = [name for name in find_label_maps(Path(arguments.anatomies)) if name not in scored]
    parts, seconds = [], []
    for condition in CONDITIONS:
        count = arguments.renderings
        if condition.startswith("any") and arguments.any_renderings is not None:
            count = arguments.any_renderings
        with tempfile.TemporaryDirectory() as name:
            rows, each = score_condition(
                Path(name),
                (arguments.work or Path(name)) / condition.replace(", ", "_").replace(" ", "_"),
                arguments.anatomies,
                left_out,
                count * len(scored),
                arguments.bundle,
                condition,
                arguments.seed,
                arguments.workers,
            )
        parts.append(rows)
        seconds.append(each)
        print(condition, rows.groupby("anatomy")["dice"].mean().round(3).to_dict(), flush=True)
    table = pd.concat(parts)
    lines = [
        "# The starter model on anatomies that it was not trained on",
        "",
        f"`python benchmarks/hippocampus_scores.py --renderings {arguments.renderings} --any-renderings "
        f"{arguments.any_renderings or arguments.renderings} --seed {arguments.seed}`: heads of "
        f"{len(scored)} held-out anatomies ({', '.join(scored)}), as many of each, 1 mm, segmented by "
        "`volta3d segment`, scored on the scan's own grid. The truth is the label map that a head was rendered from, "
        "not a manual one.",
        "",
        "| condition | heads | Dice | worst anatomy | worst head | HD95 mm | sides without a mask | sides exchanged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for condition, rows in table.groupby("condition", sort=False):
        distances = rows[["hd95_left", "hd95_right"]].to_numpy()
        worst = rows.groupby("anatomy")["dice"].mean().min()
        lines.append(
            f"| {condition} | {len(rows)} | {rows['dice'].mean():.3f} | {worst:.3f} | "
            f"{rows['dice'].min():.3f} | {np.nanmean(distances):.2f} | {int(np.isnan(distances).sum())} of "
            f"{distances.size} | {int(rows['swapped'].sum())} of {len(rows)} |"
        )
    lines += ["", f"Seconds a scan, one process: {np.mean(seconds):.1f}."]
    if arguments.scans:
        with tempfile.TemporaryDirectory() as name:
            segment(arguments.scans, Path(name) / "masks", arguments.bundle)
            volumes = pd.read_csv(Path(name) / "masks" / "volumes.csv")
        lines += ["", "Real scans (no truth):", "", "| scan | left ml | right ml |", "|---|---|---|"]
        lines += [
            f"| {Path(row.file).name} | {row.left_mm3 / 1000:.2f} | {row.right_mm3 / 1000:.2f} |"
            for row in volumes.itertuples()
        ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
