# SPDX-License-Identifier: Apache-2.0
"""What each lever of pretraining does for what the encoder knows: short pretrainings that differ in one thing each.

Every row is the bundle's own ``train.json`` on endless heads of label maps with ``recommended.json``, changed in the
one thing that its name says, for the same number of heads. Three rows are other recipes as a whole, and one is no
pretraining: it is told which scans are one head, and begins again where it was interrupted. ``evaluate.json`` then asks
each frozen encoder about heads of anatomies that none of them has seen, each head by two scanners.

    python -m benchmarks.learning --anatomies DIR --output runs/learning [--rows "one scanner" --seeds 0 --seeds 1]

takes about six minutes a run on one core. A run that is finished is not done again, and one that was interrupted
resumes. The table has all finished runs of the folder; ``--only-table`` makes no others. A folder is of one version of
this project: heads and encoders of another are not told apart.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
from numpy.typing import NDArray

from benchmarks.learning_bound import train_bound
from benchmarks.learning_pairs import VOXELS, differences, read_heads
from volta_components.data.datalist import datalist_hash
from volta_components.data.phantom.command import phantom
from volta_components.data.phantom.labels import find_label_maps
from volta_components.data.prepare import prepare
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_json, write_json, write_text
from volta_components.inference.probes import Features, Probes

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "pretrain" / "configs"
RESULTS = Path(__file__).resolve().parent / "results" / "learning.md"
SCORED = ("anatomy-05", "anatomy-10", "anatomy-15", "anatomy-20")
SPACING, SHAPE = 5, (27, 36, 36)
# Whole heads, small enough for a core: 48 patches of 45 mm, about the quick start's, of fewer voxels. An optimiser step
# for every four heads; most heads are used in every epoch.
BASE: dict[str, Any] = {
    "spacing": SPACING,
    "volume_size": list(SHAPE),
    "global_size": list(SHAPE),
    "global_extent_mm": [side * SPACING for side in SHAPE],
    "patch_size": [9, 9, 9],
    "local_size": [18, 18, 18],
    "local_side_mm": [110, 150],
    "mask_cell": 3,
    "hidden_size": 128,
    "mlp_dim": 256,
    "num_layers": 4,
    "num_heads": 4,
    "heads_per_epoch": 160,
    "fresh_heads": 8,
    "batch_size": 4,
    "learning_rate": 0.001,
    "warmup_epochs": 1,
    "frozen_last_layer_epochs": 0,
    "checkpoint_minutes": 2,
    "picture_interval": 1000,
}
STILL: dict[str, Any] = {"rotation_degrees": 0, "translation_mm": 0, "global_zoom": [1, 1]}
STRONG: dict[str, Any] = {
    "views#student_intensity#gamma": 2.0,
    "views#student_intensity#contrast": 0.4,
    "views#student_intensity#brightness": 0.15,
    "views#student_intensity#bias": 0.3,
}
NO_GLOBAL: dict[str, Any] = {"loss#global_weight": 0}
NO_PATCH: dict[str, Any] = {"loss#patch_weight": 0}
TENTH: dict[str, Any] = {"loss#global_weight": 0.1, "loss#patch_weight": 0.1}
WHOLE: dict[str, Any] = {"mask_cell": [9, 9, 9]}  # a patch
EIGHT: dict[str, Any] = {"batch_size": 1, "accumulation_steps": 8}
TWO, STANDARD, CENTRE = "two_scanners", "standard_picture", "token_centre"
ALL = (TWO, STANDARD, CENTRE)
# configs/recommended.json
RECOMMENDED = "recommended"
RECIPE = STILL | TENTH
# What supervision gets from the same network and heads; see learning_bound.py.
BOUND = "told which scans are one head"
# name: overlays after synthetic.json, ids
ROWS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    RECOMMENDED: (ALL, RECIPE),
    "two scanners alone": ((TWO,), {}),
    "one scanner": ((), {}),
    "reconstruction alone": (ALL, STILL | NO_GLOBAL | NO_PATCH),
    "reconstruction and patches": (ALL, STILL | NO_GLOBAL),
    "reconstruction and summaries": (ALL, STILL | NO_PATCH),
    "alignment at full weight": (ALL, STILL),
    # New heads throughout: with as few as the others have, it learns to tell the heads it has by heart.
    BOUND: ((TWO,), {"batch_size": 32, "fresh_heads": 40}),
    "without a standard picture": ((TWO, CENTRE), RECIPE),
    "without token centre": ((TWO, STANDARD), RECIPE),
    "turned and moved": (ALL, TENTH),
    "resized crops": ((*ALL, "resized_crops"), TENTH),
    "separate heads": (ALL, RECIPE | {"plain_student#head#_target_": "benchmarks.learning_heads.SeparateHeads"}),
    "the other scanner's picture": ((TWO, "other_picture", CENTRE), RECIPE),
    "Sinkhorn and KoLeo": ((*ALL, "sinkhorn", "koleo"), RECIPE),
    "Sinkhorn, KoLeo at full weight": ((*ALL, "sinkhorn", "koleo"), RECIPE | {"koleo_weight": 1.0}),
    "Sinkhorn and KoLeo, summaries at full weight": ((*ALL, "sinkhorn", "koleo"), RECIPE | {"loss#global_weight": 1}),
    "Sinkhorn, KoLeo, masked tokens": ((*ALL, "sinkhorn", "koleo", "masked_tokens"), RECIPE | WHOLE),
    "batches of 16, rate 0.002": (ALL, RECIPE | {"batch_size": 16, "learning_rate": 0.002}),
    "eight accumulated": (ALL, RECIPE | EIGHT),
    # The teacher then follows by an optimiser step as far as without accumulation: 0.99 to the power of 1/8.
    "eight accumulated, slower teacher": (ALL, RECIPE | EIGHT | {"teacher_momentum": [0.99874, 1.0]}),
    "masked tokens alone": ((*ALL, "masked_tokens"), RECIPE | WHOLE),
    "masked tokens, patches at full weight": ((*ALL, "masked_tokens"), STILL | WHOLE | {"loss#global_weight": 0.1}),
    "reconstruction alone, whole patches masked": (ALL, STILL | NO_GLOBAL | NO_PATCH | WHOLE | {"mask_max_side": 0.5}),
    "stochastic depth": ((*ALL, "stochastic_depth"), RECIPE),
    "64 prototypes": (ALL, RECIPE | {"head_out_dim": 64}),
    "1024 prototypes": (ALL, RECIPE | {"head_out_dim": 1024}),
    "learning rate 0.003": (ALL, RECIPE | {"learning_rate": 0.003}),
    "learning rate 0.0003": (ALL, RECIPE | {"learning_rate": 0.0003}),
    "one scanner, stronger contrast changes": ((), STRONG),
}


def run(configs: Sequence[str], ids: dict[str, Any], log: Path) -> str:
    """A config with its overlays, by MONAI's own command; what it prints goes to a file as well.

    Raises:
        InputError: if the run fails.
    """
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    words = [word for name, value in ids.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), *words]
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"})
    text = log.read_text(errors="replace")
    if done.returncode:
        raise InputError(f"{' '.join(command)}\nfailed:\n{text[-3000:]}")
    return text


def scored_heads(anatomies: Path, folder: Path, count: int) -> Path:
    """The prepared heads that every encoder is asked about, two scans each, in two poses; made once."""
    names = list(find_label_maps(anatomies))
    if missing := set(SCORED) - set(names):
        raise InputError(f"--anatomies {anatomies}: lacks {', '.join(sorted(missing))}, which are scored")
    prepared, raw = folder / "heads", folder / "raw_heads"
    if not (prepared / "datalist.json").is_file():
        others = [name for name in names if name not in SCORED]
        phantom(raw, count, seed=7, spacing=3, anatomies=anatomies, leave_out=others, scans=2, workers=1)
        prepare("bids", raw, prepared, spacing=SPACING, shape=SHAPE, sessions=["all"], folds=len(SCORED), workers=1)
        add_contrast(raw, prepared / "datalist.json")
    return prepared


def add_contrast(raw: Path, datalist: Path) -> None:
    """Give each scan of a datalist its scanner's brightness of grey over white matter."""
    content = read_json(datalist)
    for item in content["training"]:
        name = f"{item['subject_id']}_{item['session']}_T1w.json"
        (sidecar,) = raw.glob(f"sub-*/ses-*/anat/{name}")
        means = read_json(sidecar)["Phantom"]["scanner"]["means"]
        item["contrast"] = means["cortex_left"] / means["white_matter_left"]
    write_json(datalist, content | {"hash": datalist_hash(content)})


def pretrain(
    name: str,
    seed: int,
    epochs: int,
    anatomies: Path,
    scored: Path,
    folder: Path,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """One row with one seed, pretrained and probed unless that was done before; what is known of it."""
    overlays, changes = ROWS[name]
    ids = {**BASE, "epochs": epochs, "collapse_grace_epochs": epochs, **changes, "seed": seed}
    settings = {"overlays": list(overlays), "ids": ids}
    home = folder / f"{sha256_json(settings)[:12]}"
    found, trained = home / "found.json", home / "curves.json"
    asked = {"heads": read_json(scored / "datalist.json")["hash"], "asked": sorted(map(list, ASKED.values()))}
    if found.is_file() and read_json(found).items() >= asked.items():
        return read_json(found)
    home.mkdir(parents=True, exist_ok=True)
    encoder = home / "encoder.safetensors"
    if not trained.is_file():
        write_json(home / "settings.json", {"name": name, **settings})
        data = {
            "anatomies": anatomies,
            "leave_out": list(SCORED),
            "num_workers": workers,
            "device": f"$torch.device('{device}')",
        }
        places = {"output_dir": home, "ckpt_dir": home, "encoder_path": encoder, "run_name": home.name}
        configs = ["train", "tiny", "synthetic", *overlays]
        if name == BOUND:
            curve = train_bound([str(CONFIGS / f"{each}.json") for each in configs], {**data, **ids, **places})
        else:
            curve = curves(run(configs, {**data, **ids, **places}, home / "log"))
        write_json(trained, curve)
    places = {"output_dir": home / "probes", "encoder_path": encoder, "run_name": home.name, "dataset_dir": scored}
    asks = {"num_workers": 0, "targets": {}, "numbers": ["contrast"], "seed": seed}  # and random weights of that seed
    run(["evaluate"], {**places, **asks}, home / "probes.log")
    rows = read_json(home / "probes" / "probes.json")
    result = {"name": name, "seed": seed, **asked, "rows": rows, "curves": read_json(trained)}
    write_json(found, result)
    return result


def finished(folder: Path) -> list[dict[str, Any]]:
    """What is known of all finished runs, in order of their epochs, rows and seeds."""
    runs = []
    for found in folder.glob("*/found.json"):
        epochs = int(read_json(found.with_name("settings.json"))["ids"]["epochs"])
        runs.append({**read_json(found), "epochs": epochs, "encoder": found.with_name("encoder.safetensors")})
    return sorted(runs, key=lambda each: (each["epochs"], list(ROWS).index(each["name"]), each["seed"]))


def curves(log: str) -> list[dict[str, float]]:
    """The numbers of each epoch, as the training printed them."""
    epochs: dict[int, dict[str, float]] = {}
    for number, line in re.findall(r"epoch (\d+) of \d+: (.*)", log):
        epochs[int(number)] = {name: float(value) for name, value in re.findall(r"(\w+) ([-+.\de]+)", line)}
    return [epochs[number] for number in sorted(epochs)]


# column: what it is of, embedding, probe
ASKED = {
    "same head, summary": ("same subject", "summary", "nearest"),
    "same head, mean token": ("same subject", "mean", "nearest"),
    "same head, places": ("same subject", "places", "nearest"),
    "the same, whitened": ("same subject", "places", "whitened"),
    "same person, mean token": ("same patient", "mean", "nearest"),
    "same person, places": ("same patient", "places", "nearest"),
    "hippocampal volume": ("hippocampal volume", "mean", "ridge"),
    "hippocampus in the patch": ("hippocampus in the patch", "tokens", "ridge"),
    "contrast": ("contrast", "mean", "ridge"),
}


def cell(runs: Sequence[dict[str, Any]], encoder: str, label: str, embedding: str, probe: str) -> str:
    """Mean over seeds, with the lowest and the highest limit of their 95 % intervals."""
    rows = [
        row
        for each in runs
        for row in each["rows"]
        if row["encoder"] == encoder
        and row["label"] == label
        and (encoder == "voxels" or row["embedding"] == embedding)
        and row["probe"] == probe
    ]
    if not rows:
        return "-"
    mean = sum(row["value"] for row in rows) / len(rows)
    return f"{mean:.2f} ({min(row['low'] for row in rows):.2f} to {max(row['high'] for row in rows):.2f})"


def voxel_rows(items: Sequence[dict[str, Any]], voxels: NDArray[np.float32]) -> list[dict[str, Any]]:
    """What the heads' own voxels ``[n, D, H, W]`` tell, all of them; ``evaluate.json`` asks four a patch and axis."""
    features = Features("voxels", "voxels", voxels.reshape(len(voxels), -1), components=100)
    probes = Probes(items, [features], neighbours=20, seed=0)
    return [*probes.same_subject(), *probes.numbers("contrast", [item["contrast"] for item in items])]


def table(runs: Sequence[dict[str, Any]], of_voxels: list[dict[str, Any]]) -> list[str]:
    """Lines of the table, a row for each setting; random weights and plain voxels first.

    Args:
        runs: as ``finished`` gives them.
        of_voxels: as ``voxel_rows`` gives them.
    """
    health = ("loss_reconstruction", "global_predicted", "patch_predicted")
    lines = [f"| setting | epochs | seeds | masked error | global | patch | {' | '.join(ASKED)} |"]
    lines.append("|---" * (6 + len(ASKED)) + "|")
    for encoder, name, own in (
        ("random", "random weights", list({each["seed"]: each for each in runs}.values())),
        ("voxels", VOXELS, [{"rows": of_voxels}]),
        ("voxels", "voxels, four a patch and axis", runs[:1]),
    ):
        cells = [cell(own, encoder, *asked) for asked in ASKED.values()]
        lines.append(f"| {name} | - | - | - | - | - | {' | '.join(cells)} |")
    for name, epochs in dict.fromkeys((each["name"], each["epochs"]) for each in runs):
        own = [each for each in runs if (each["name"], each["epochs"]) == (name, epochs)]
        last = [each["curves"][-1] for each in own]
        means = [[each[key] for each in last if key in each] for key in health]
        cells = [f"{sum(each) / len(each):.3f}" if each else "-" for each in means]
        cells += [cell(own, "volta", *asked) for asked in ASKED.values()]
        lines.append(f"| {name} | {epochs} | {len(own)} | {' | '.join(cells)} |")
    return lines


def main(
    anatomies: Path,
    output: Path,
    rows: tuple[str, ...] = tuple(ROWS),
    seeds: tuple[int, ...] = (0,),
    epochs: int = 50,
    heads: int = 80,
    results: Path | None = None,
    only_table: bool = False,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Pretrain, ask, and print a table.

    Args:
        anatomies: folder of label maps.
        output: folder of the runs.
        rows: names of the settings; all by default.
        seeds: of the pretrainings.
        epochs: of each, of 160 heads.
        heads: that the encoders are asked about, of four anatomies.
        results: file for the table.
        only_table: pretrain nothing.
        device: where the encoders are trained, such as cuda:0.
        workers: processes that render heads.

    Raises:
        InputError: if there is no such row, or a run fails.
    """
    if unknown := [name for name in rows if name not in ROWS]:
        raise InputError(f"--rows {unknown[0]}: choose {', '.join(ROWS)}")
    output.mkdir(parents=True, exist_ok=True)
    scored = output / "heads" if only_table else scored_heads(anatomies.resolve(), output.resolve(), heads)
    items, voxels = read_heads(scored)
    of_voxels = voxel_rows(items, voxels)
    for seed, name in () if only_table else itertools.product(seeds, rows):
        pretrain(name, seed, epochs, anatomies.resolve(), scored, output.resolve(), device, workers)
        print("\n".join(table(finished(output), of_voxels)), flush=True)
    runs = finished(output)
    bound = [BOUND_ROW] if any(each["name"] == BOUND for each in runs) else []
    beside, beside_voxels = differences(runs, items, voxels)
    lines = [*table(runs, of_voxels), *bound, BESIDE, *beside, BESIDE_VOXELS, *beside_voxels]
    print("\n".join(lines))
    if results is not None:
        write_text(results, "\n".join([HEADER.format(heads=heads), *lines]) + "\n")


HEADER = """# What an encoder learns, by setting

`python -m benchmarks.learning --anatomies DIR --output DIR [--epochs 200]`: synthetic heads at 5 mm, a ViT of 4
blocks of 128 on 48 patches, epochs of 40 mini-batches of 4 heads of 16 anatomies; {heads} heads of four other
anatomies are scored, each by two scanners. Values are means over seeds, in brackets the lowest and highest limit of
their 95 % intervals over anatomies; with four of these, about 80 % of such intervals hold the true value. A row is
`recommended.json`, changed as it says; *two scanners alone* and *one scanner* have none of its other parts, and
alignment at full weight, as the rows *reconstruction and patches* and *reconstruction and summaries* have.

- same head: share of scans whose nearest neighbour is the same head, lying otherwise, by another scanner (chance 0.01);
  by the summary, by the mean of all tokens, by the means of tokens place by place, and by standardised principal
  components of these places (whitened); by voxels, in place of any of these. Of a quarter of the heads, one scan is
  stripped of its skull and the other is not;
- same person: share of scans whose nearest neighbour of another head grew from the same anatomy (chance 0.24);
- hippocampal volume, hippocampus in the patch: share of variance that a ridge regression explains, across anatomies;
  of the patch, beyond its position;
- contrast: the same of the scanner's brightness of grey over white matter; lower is better.
"""

BOUND_ROW = """
*Told which scans are one head* is supervised, the same network by a contrastive loss, for four times as many epochs and
more heads. It is no bound where others find more: it learns the people by heart that it was shown.
"""

BESIDE = """
Beside *reconstruction alone*, of the same seeds: the difference in the share of heads found, with a 95 % interval.
People, their heads and the seeds are drawn with replacement, the same ones for both; with four people and two seeds
such intervals are rather too narrow.
"""

BESIDE_VOXELS = """
Beside plain voxels, in the same way:
"""


if __name__ == "__main__":
    cyclopts.run(main)
