# SPDX-License-Identifier: Apache-2.0
"""The classification bundles as the tests run them: small sizes, their workflow, a run to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bundle_workflow import training_workflow
from monai.bundle import ConfigWorkflow

from volta_components.files import read_json

BUNDLES = ("ixi_sex", "aibl_ad")
SIDE = 32
# Sizes at which a run takes a second or two.
SIZES: dict[str, Any] = {
    "volume_size": [SIDE] * 3,
    "input_extent_mm": [SIDE] * 3,
    "image_size": [SIDE] * 3,
    "hidden_size": 32,
    "mlp_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "summary_heads": 4,
    "swin_embed_dim": 12,
    "swin_window_size": [2] * 3,
    "swin_depths": [1] * 4,
    "num_workers": 0,
    "unfrozen_blocks": 1,
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 4,
    "learning_rate": 0.01,
    "checkpoint_minutes": 0,
}
INFERENCE_ONLY = {key: SIZES[key] for key in list(SIZES)[:8]}


def workflow(
    bundle: str,
    names: tuple[str, ...],
    data: Path,
    encoder: Path,
    output: Path,
    sizes: dict[str, Any] | None = None,
    **changes: Any,
) -> ConfigWorkflow:
    """A bundle's workflow on the small data set."""
    ids = {**(SIZES if sizes is None else sizes), "encoder_path": str(encoder), **changes}
    return training_workflow(bundle, names, data, output, **ids)


def run(*args: Any, **changes: Any) -> dict[str, Any]:
    """Run a workflow to its end; its ``result.json``."""
    made = workflow(*args, **changes)
    made.initialize()
    made.run()
    made.finalize()
    return read_json(args[4] / "result.json")
