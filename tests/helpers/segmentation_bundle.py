# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle as the tests run it: small sizes, its workflow, a run to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bundle_workflow import configs as configs_of
from bundle_workflow import training_workflow
from labelled_scans import SIDE
from monai.bundle import ConfigWorkflow
from prepared import ROOT

from volta_components.errors import InputError, find_input_error

BUNDLE = ROOT / "bundles" / "harp_hippocampus"
OVERLAYS = ["unetr_scratch", "unet_scratch", "frozen", "full", "gentle", "tiny", "multi_gpu_train"]
# Sizes at which a run takes a few seconds.
NETWORK: dict[str, Any] = {
    "volume_size": [SIDE] * 3,
    "image_size": [32, 32, 16],
    "feature_size": 4,
    "hidden_size": 24,
    "mlp_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_workers": 0,
}
SIZES: dict[str, Any] = {
    **NETWORK,
    "unet_channels": [4, 8, 16],
    "unet_strides": [2, 2],
    "unet_res_units": 0,
    "unfrozen_blocks": 2,
    "epochs": 3,
    "val_interval": 1,
    "crops_per_volume": 1,
    "learning_rate": 0.01,
    "checkpoint_minutes": 0,
}


def configs(*names: str) -> list[str]:
    return configs_of(BUNDLE.name, *names)


def workflow(
    names: tuple[str, ...], data: Path, output: Path, sizes: dict[str, Any] | None = None, **changes: Any
) -> ConfigWorkflow:
    """The bundle's workflow on the small data set."""
    return training_workflow(BUNDLE.name, names, data, output, **{**(SIZES if sizes is None else sizes), **changes})


def run(names: tuple[str, ...], data: Path, output: Path, **changes: Any) -> ConfigWorkflow:
    """Run a workflow to its end."""
    made = workflow(names, data, output, **changes)
    made.initialize()
    made.run()
    made.finalize()
    return made


class Broken(Exception):
    pass


@contextmanager
def input_error(*words: str) -> Iterator[None]:
    """Expect an ``InputError`` with these words; MONAI wraps what an expression raises."""
    with pytest.raises((InputError, RuntimeError)) as caught:
        yield
    error = find_input_error(caught.value)
    assert error is not None, caught.value
    assert [word for word in words if word not in str(error)] == []
