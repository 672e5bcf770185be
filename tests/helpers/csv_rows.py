# SPDX-License-Identifier: Apache-2.0
"""Tables that the project wrote, as rows."""

from __future__ import annotations

import csv
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Cells by column of each row; separated by tabs in ``.tsv``, by commas otherwise."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
