# SPDX-License-Identifier: Apache-2.0
"""Readers of the data sets' layouts: each turns a folder as users have it into a :class:`Listing` of scans.

A reader looks at names and tables only; voxels are read later, in parallel. It never raises for one bad subject: what
it leaves out, or keeps with a reservation, is a :class:`Finding`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal, get_args

from volta_components.data.layouts.common import Finding, LayoutOptions, Listing, Scan
from volta_components.errors import InputError

Layout = Literal["bids", "ixi", "brats", "harp", "dicom", "folder"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

__all__ = ["LAYOUTS", "Finding", "Layout", "LayoutOptions", "Listing", "Scan", "reader"]


def reader(layout: str) -> Callable[[LayoutOptions], Listing]:
    """The reader of a layout.

    Raises:
        InputError: if there is no layout of that name.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    return importlib.import_module(f"volta_components.data.layouts.{layout}").read
