# SPDX-License-Identifier: Apache-2.0
"""What the paper reports, to be printed beside our numbers and never instead of them, and how things are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """One of the paper's tables.

    Attributes:
        table: its number, or "" for a bundle that is not the paper's.
        title: of the section.
        short: of the link to it.
        positive: what the positive class is; sensitivity is the share of these that is found.
        negative: what the negative class is.
        threshold: the paper's operating point, as the bundles' ``threshold``.
        spread: what the paper's SD is over.
        paper: (mean, SD) by init and metric.
    """

    table: str
    title: str
    short: str = ""
    positive: str = "1"
    negative: str = "0"
    threshold: str = ""
    spread: str = "folds"
    paper: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)


TASKS = {
    "ixi_sex": Task(
        table="I",
        title="Sex from T1 MRI (IXI)",
        short="Sex (IXI)",
        positive="female",
        negative="male",
        threshold="0.5",
        paper={
            "volta": {"auroc": (0.98, 0.01), "sensitivity": (0.92, 0.06), "specificity": (0.80, 0.20)},
            "vit_scratch": {"auroc": (0.94, 0.02), "sensitivity": (0.87, 0.08), "specificity": (0.82, 0.14)},
            "swin_scratch": {"auroc": (0.85, 0.03), "sensitivity": (0.52, 0.33), "specificity": (0.71, 0.22)},
        },
    ),
    "aibl_ad": Task(
        table="II",
        title="Alzheimer's disease against healthy ageing (AIBL)",
        short="AD (AIBL)",
        positive="AD",
        negative="healthy",
        threshold="youden",
        paper={
            "volta": {"auroc": (0.72, 0.10), "sensitivity": (0.72, 0.20), "specificity": (0.72, 0.08)},
            "vit_scratch": {"auroc": (0.67, 0.05), "sensitivity": (0.64, 0.16), "specificity": (0.72, 0.14)},
            "swin_scratch": {"auroc": (0.64, 0.03), "sensitivity": (0.58, 0.12), "specificity": (0.73, 0.11)},
        },
    ),
    "harp_hippocampus": Task(
        table="III",
        title="Left and right hippocampus (HarP)",
        short="Hippocampus (HarP)",
        spread="epochs",
        paper={
            "volta": {"dice": (0.87, 0.01), "hd95": (2.49, 0.96)},
            "unetr_scratch": {"dice": (0.85, 0.01), "hd95": (3.49, 1.28)},
            "unet_scratch": {"dice": (0.83, 0.01), "hd95": (1.82, 0.23)},
        },
    ),
}

NAMES = {
    "volta": "VolTA-3D",
    "vit_scratch": "ViT, from scratch",
    "vit_mean_scratch": "ViT on its mean token, from scratch",
    "swin_scratch": "Swin, from scratch",
    "unetr_scratch": "UNETR, from scratch",
    "unet_scratch": "3-D U-Net, from scratch",
    "frozen": "VolTA-3D, encoder frozen",
    "full": "VolTA-3D, all blocks trained",
    "gentle": "VolTA-3D, all blocks trained gently",
}
# Of Okabe and Ito: people who are colour-blind tell them apart.
COLOURS = {
    "volta": "#0072b2",
    "vit_scratch": "#d55e00",
    "vit_mean_scratch": "#000000",
    "swin_scratch": "#009e73",
    "unetr_scratch": "#d55e00",
    "unet_scratch": "#009e73",
}
OTHER_COLOURS = ("#cc79a7", "#e69f00", "#56b4e9", "#555555")
METRICS = {
    "auroc": "AUROC",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "dice": "Dice",
    "hd95": "HD95 (mm)",
}


def name_of(variant: str) -> str:
    """How an init is called in tables."""
    return NAMES.get(variant, variant)


def colours_of(variants: list[str]) -> dict[str, str]:
    """A colour for each init, the same in all figures."""
    spare = iter(OTHER_COLOURS * len(variants))
    return {variant: COLOURS.get(variant) or next(spare) for variant in variants}


def in_order(names: Iterable[str], known: Iterable[str] = NAMES) -> list[str]:
    """The known ones first, in their order (VolTA-3D, then the paper's baselines), then the rest by name."""
    order = list(known)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
