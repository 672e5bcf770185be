# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``volta3d prepare`` share: its options, its layouts, what it leaves."""

from __future__ import annotations

from pathlib import Path

import tiny_datasets as tiny
from csv_rows import read_rows

OPTIONS = {"spacing": 1.0, "shape": (28, 30, 32), "workers": 1}


def findings(output):
    return read_rows(Path(output) / "qc/findings.csv")


def tree(folder):
    """Content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


LAYOUTS = {
    "bids": (tiny.make_bids, {}),
    "ixi": (tiny.make_ixi, {}),
    "brats": (tiny.make_brats, {}),
    "harp": (tiny.make_harp, {"shape": (20, 20, 20)}),
    "dicom": (tiny.make_dicom, {"sessions": ["all"]}),
}
