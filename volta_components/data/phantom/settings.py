# SPDX-License-Identifier: Apache-2.0
"""What decides how the phantoms of a data set look."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from volta_components.errors import InputError

Contrast = Literal["t1", "any"]

# Between scanners: shift of grey matter and fluid (white matter is about 0.87), gamma, bias field, blur (mm), noise.
SITES: dict[str, dict[str, float]] = {
    "A": {"grey": 0.0, "fluid": 0.0, "gamma": 1.0, "bias": 0.10, "blur": 0.3, "noise": 0.02},
    "B": {"grey": -0.07, "fluid": -0.06, "gamma": 1.2, "bias": 0.18, "blur": 0.6, "noise": 0.03},
    "C": {"grey": 0.05, "fluid": 0.06, "gamma": 0.85, "bias": 0.14, "blur": 0.5, "noise": 0.04},
}


@dataclass(frozen=True)
class Settings:
    """What decides how subject number ``i`` of a cohort looks, whatever the cohort's size.

    Attributes:
        seed: any integer from 0.
        spacing: voxel size, mm: 1, 2 or 3.
        sites: number of sites, 1 to 3.
        ad_share: share of subjects with AD, in [0, 1].
        prefix: what subject ids begin with, after ``sub-``.
        effect_sex: mean difference of log linear head size between men and women.
        effect_age: log volume that the ventricles gain in ten years; the hippocampi lose a third of it.
        effect_hippocampus: log volume that the hippocampi lose at a severity of 1.
        effect_ventricles: log volume that the ventricles gain at a severity of 1.
        anatomies: names of the anatomies that heads grow from; none for the template.
        contrast: ``t1`` or ``any``; with anatomies.
        skull_share: share of subjects whose skull is not taken off, in [0, 1]; with anatomies.
        mirrored_share: share of subjects that are their anatomy's mirror image, in [0, 1]; with anatomies.
        scans: of each subject, by scanners and in poses of their own, each a session.
        variation: how far a head's pose, size and shape differ from its anatomy's, and its scanner from the mean one:
            1 as in one study, 2 and more for training; with anatomies.

    Raises:
        InputError: if a value is out of its range.
    """

    seed: int = 0
    spacing: int = 1
    sites: int = 3
    ad_share: float = 0.5
    prefix: str = "PH"
    effect_sex: float = 0.05
    effect_age: float = 0.1
    effect_hippocampus: float = 0.45
    effect_ventricles: float = 0.75
    anatomies: tuple[str, ...] = ()
    contrast: Contrast = "t1"
    skull_share: float = 0.8
    mirrored_share: float = 0.0
    variation: float = 1.0
    scans: int = 1

    def __post_init__(self) -> None:
        def demand(good: bool, name: str, wanted: str) -> None:
            if not good:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {wanted}")

        demand(self.seed >= 0, "seed", "a whole number from 0")
        demand(self.spacing in (1, 2, 3), "spacing", "1, 2 or 3 (mm)")
        demand(1 <= self.scans <= 9, "scans", "a number of scans from 1 to 9")
        demand(1 <= self.sites <= len(SITES), "sites", f"a number of sites from 1 to {len(SITES)}")
        demand(
            re.fullmatch(r"[A-Za-z0-9]*[A-Za-z]", self.prefix) is not None,
            "prefix",
            "letters and digits that end in a letter, such as PH",
        )
        for name, low, high in (
            ("ad_share", 0.0, 1.0),
            ("effect_sex", 0.0, 0.1),
            ("effect_age", 0.0, 0.3),
            ("effect_hippocampus", 0.0, 0.8),
            ("effect_ventricles", 0.0, 1.0),
            ("skull_share", 0.0, 1.0),
            ("mirrored_share", 0.0, 1.0),
            ("variation", 0.0, 5.0),
        ):
            demand(low <= getattr(self, name) <= high, name, f"a number from {low} to {high}")
            # Equal numbers, such as 1 and 1.0, are the same in the file of parameters.
            object.__setattr__(self, name, float(getattr(self, name)))
        demand(self.contrast in get_args(Contrast), "contrast", " or ".join(get_args(Contrast)))

    def subject_id(self, number: int) -> str:
        """BIDS id of a subject, such as ``sub-PH0001``."""
        return f"sub-{self.prefix}{number:04d}"
