# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning bundle's workflow, as ``monai.bundle run`` makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow
from prepared import ROOT


def configs(bundle: str, *names: str) -> list[str]:
    return [str(ROOT / "bundles" / bundle / "configs" / f"{name}.json") for name in names]


def training_workflow(bundle: str, names: tuple[str, ...], data: Path, output: Path, **ids: Any) -> ConfigWorkflow:
    """The workflow on a small data set, without progress bars."""
    made = ConfigWorkflow(
        config_file=configs(bundle, *names),
        meta_file=configs(bundle, "metadata")[0],
        logging_file=False,
        workflow_type="train",
        **{
            "bundle_root": str(ROOT / "bundles" / bundle),
            "dataset_dir": str(data),
            "output_dir": f"${str(output)!r}",
            **ids,
        },
    )
    handlers = made.parser["train"]["handlers"]
    made.parser["train"]["handlers"] = [item for item in handlers if "ProgressBar" not in str(item)]
    return made
