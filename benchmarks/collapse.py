# SPDX-License-Identifier: Apache-2.0
"""Which settings keep the global branch alive: short pretrainings on phantoms that differ in one thing each.

Every row is the bundle's own ``train.json`` with ``tiny.json``, a smaller network and six local crops, changed as its
name says. What is printed are means over the last epoch: the teacher's entropy as a share of ln K (1: uniform, 0: a
point), what its targets say beyond their running mean (information, drift of the teacher included), and what the
student tells of them beyond what it says of the volume before (predicted; 0: views of a volume agree on nothing).

    python benchmarks/collapse.py [--epochs 6] [--rows "one local crop" --rows KoLeo] [--output FILE]

takes about four minutes a row on one core.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import cyclopts
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from volta_components.data.phantom.command import phantom
from volta_components.data.prepare import prepare

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "pretrain" / "configs"
# A smaller network, more local crops than the quick start affords, and the paper's momentum of the teacher.
BASE = {
    "num_layers": 3,
    "hidden_size": 128,
    "mlp_dim": 256,
    "num_heads": 4,
    "num_local": 6,
    "teacher_momentum": [0.996, 1.0],
    "teacher_temperature_epochs": 5,
}
RAMP = [0.04, 0.07]  # DINO's; it has an effect only where no control sets the temperature
FREE = {
    **{"target_entropy": None, "patch_target_entropy": None},
    **{"teacher_temperature": RAMP, "patch_teacher_temperature": RAMP},
}
# name: overlay, ids
ROWS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "train.json": (None, {}),
    "one local crop": (None, {"num_local": 1}),
    "smaller local crops, 64 to 192 mm": (None, {"local_side_mm": [64, 192]}),
    "wider geometry: 10 degrees, 8 mm, zoom 0.9 to 1.1": (
        None,
        {"rotation_degrees": 10, "translation_mm": 8, "global_zoom": [0.9, 1.1]},
    ),
    "faster teacher, momentum from 0.99": (None, {"teacher_momentum": [0.99, 1.0]}),
    "KoLeo": ("koleo", {}),
    "Sinkhorn-Knopp over a queue": ("sinkhorn", {}),
    "DINO's gaps: centre 0.9, no entropy control": ("dino_gaps", {}),
    "centre 0.875 (about a window of 8), no control": (None, {**FREE, "centre_momentum": 0.875}),
    "slower centre 0.99, no control": (None, {**FREE, "centre_momentum": 0.99}),
    "slower centre 0.999, no control": (None, {**FREE, "centre_momentum": 0.999}),
    "32 prototypes, DINO's gaps": ("dino_gaps", {"head_out_dim": 32}),
}


def pretrain(data: Path, folder: Path, overlay: str | None, ids: dict[str, Any], epochs: int) -> dict[str, float]:
    """One run; the last epoch's means."""
    names = ["train", *([overlay] if overlay else []), "tiny"]
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    places = {"dataset_dir": str(data), "output_dir": str(folder), "ckpt_dir": str(folder)}
    fixed = {"device": "$torch.device('cpu')", "epochs": epochs, "collapse_grace_epochs": epochs, "deep_check": False}
    for key, value in {**BASE, **places, **fixed, **ids}.items():
        parser[key] = value
    set_determinism(parser["seed"])
    trainer = parser.get_parsed_content("train#trainer")
    trainer.run()
    return dict(trainer.state.metrics)


def main(output: str | None = None, epochs: int = 6, rows: tuple[str, ...] = (), subjects: int = 240) -> None:
    """Print a table.

    Args:
        output: file for the table.
        epochs: of each run; an epoch has 96 mini-batches of two volumes.
        rows: what the names of the rows to run begin with; all by default.
        subjects: phantoms, a fifth of which is held out.
    """
    logging.disable(logging.INFO)
    chosen = {name: row for name, row in ROWS.items() if not rows or name.startswith(rows)}
    lines = [
        f"{epochs} epochs of 96 mini-batches, means of the last one; torch {torch.__version__}.",
        "",
        "| setting | entropy | information | predicted | patch entropy | patch predicted | effective rank |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        phantom(folder / "raw", subjects, seed=1, spacing=3)
        prepare("bids", folder / "raw", folder / "data", spacing=3, shape=(48, 64, 64))
        for number, (name, (overlay, ids)) in enumerate(chosen.items()):
            found = pretrain(folder / "data", folder / f"run{number}", overlay, ids, epochs)
            numbers = ("global_teacher_entropy", "global_information", "global_predicted")
            cells = [f"{found[key]:.3f}" for key in (*numbers, "patch_teacher_entropy", "patch_predicted")]
            lines.append(f"| {name} | {' | '.join(cells)} | {found['effective_rank']:.1f} |")
            print(lines[-1], flush=True)
            if output:
                Path(output).parent.mkdir(parents=True, exist_ok=True)
                Path(output).write_text(
                    "\n".join(["# Collapse\n", "`python benchmarks/collapse.py`", "", *lines]) + "\n"
                )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    cyclopts.run(main)
