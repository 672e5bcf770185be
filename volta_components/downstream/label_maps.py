# SPDX-License-Identifier: Apache-2.0
"""Label maps of the hippocampus bundle, checked before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import joblib
from tqdm.contrib.concurrent import thread_map

from volta_components.data.datalist import Datalist
from volta_components.data.items import item_name
from volta_components.data.labels import read_labels
from volta_components.data.layouts.common import LabelFile
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import read_volume
from volta_components.downstream.splits import Parts, split_items
from volta_components.errors import InputError


def labelled_parts(
    datalist: Datalist,
    fold: int,
    fraction: float = 1.0,
    validation_fraction: float = 0.2,
    seed: int = 0,
    accept_look_alikes: bool = False,
) -> Parts:
    """Split the datalist by patient; see ``split_items``. An empty datalist has empty parts.

    Raises:
        InputError: if items have no label map, naming them, or the fold cannot be scored.
    """
    items = datalist.items
    without = [item for item in items if not item.get("label")]
    if without:
        raise InputError.many(
            f"{datalist.path}: {len(without)} of {len(items)} items have no label map",
            [(item_name(item), str(item["image"])) for item in without],
            "This bundle needs a label map of both hippocampi for each scan: prepare the data set with "
            "--labels require, which leaves out the others.",
        )
    return split_items(items, fold, fraction, validation_fraction, seed, accept_look_alikes=accept_look_alikes)


def check_label_maps(items: Iterable[Mapping[str, Any]]) -> None:
    """Check every label map before a training starts: there, on its scan's grid, 0/1/2, both sides, each on its side.

    Sides are told from the centroids in world coordinates: the left hippocampus has the smaller x (NIfTI's x points to
    the right), whatever the orientation of the file.

    Raises:
        InputError: listing every item with its file and what is wrong.
    """

    def examine(item: Mapping[str, Any]) -> tuple[str, str, str] | None:
        name = item_name(item) or Path(str(item["image"])).name
        if not item.get("label"):
            return name, "(none)", "has no label map"
        path = Path(str(item["label"]))
        try:
            scan = read_volume(str(item["image"]))
            read_labels([LabelFile(path)], scan, Path(str(item["image"])))
        except UnusableVolume as error:
            return name, error.path, error.reason
        return None

    items = list(items)
    if rows := list(filter(None, thread_map(examine, items, max_workers=joblib.cpu_count(), disable=True))):
        raise InputError.many(
            f"{len(rows)} of {len(items)} label maps cannot be used",
            rows,
            "A label map lies on its scan's grid and has 0 background, 1 left and 2 right hippocampus. Mend the files "
            "and prepare the data set again, or leave these scans out.",
        )
