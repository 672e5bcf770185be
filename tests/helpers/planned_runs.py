# SPDX-License-Identifier: Apache-2.0
"""Planned runs of the fake bundle."""

from __future__ import annotations

from pathlib import Path

from volta_components.crossval.plan import Run, plan


def planned(place: Path, **changes) -> list[Run]:
    keywords = {
        "bundle": place / "fake",
        "datalist": place / "datalist.json",
        "inits": ["volta", "linear_scratch"],
        "folds": 2,
        "fractions": (0.5, 1.0),
        "overlays": ["tiny"],
        "settings": {},
        "encoder": None,
        "seed": 3,
        "root": place / "runs",
        "tracking_uri": f"sqlite:///{place}/runs/mlruns.db",
        "experiment": None,
        "processes": 0,
        **changes,
    }
    return plan(**keywords)


def epochs(folder: Path) -> list[str]:
    return folder.joinpath("epochs.txt").read_text().splitlines()
