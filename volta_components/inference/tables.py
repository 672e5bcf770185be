# SPDX-License-Identifier: Apache-2.0
"""Tables of what an evaluator predicts, a row for each volume, kept in a journal as they are made."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.data import MetaTensor

from volta_components.errors import InputError
from volta_components.files import write_csv
from volta_components.inference.journal import Journal


def source_file(image: Any) -> str:
    """The file that a volume was read from; empty where it was not."""
    return str(image.meta.get("filename_or_obj") or "") if isinstance(image, MetaTensor) else ""


def marks_of(image: Any) -> str:
    """What is odd about a scan, as ``LoadScand`` noted it; empty for most."""
    return str(image.meta.get("marks") or "") if isinstance(image, MetaTensor) else ""


def print_marks(rows: Iterable[tuple[str, str]], count: int) -> None:
    """List the scans (file and marks) that are marked, of ``count`` scans, on the error stream."""
    if marked := [row for row in rows if row[1]]:
        headline = f"{len(marked)} of {count} scans are marked; look at them before you use their results"
        print(str(InputError.many(headline, marked, "")).rstrip(), file=sys.stderr)


@dataclass(eq=False)
class ResultTable:
    """Collects a row for each volume and writes the table at the end.

    Attributes:
        path: the table; ``None`` keeps it in memory only.
        journal: keeps rows as they are made; the table then has its rows, of this start and earlier ones.
    """

    path: str | os.PathLike[str] | None = None
    journal: Journal | None = None

    def __post_init__(self) -> None:
        self.path = None if self.path is None else Path(self.path)
        self._made: list[Any] = []

    def result(self, item: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[Any, str, Sequence[Path]]:
        """One volume's row (anything that JSON holds), its file, and the files that were made of it."""
        raise NotImplementedError

    def write(self) -> None:
        """Write the table, and leave the journal to other processes."""
        self.write_table()
        if self.journal is not None:
            self.journal.end()

    def write_table(self) -> None:
        """Write the rows in the form of this table."""
        raise NotImplementedError

    def write_rows(self, columns: Sequence[str], what: str) -> None:
        """Write the rows as a CSV, list the scans that are marked, and print how many rows there are.

        Args:
            columns: their names; the third is the file, the last the marks.
            what: the word for rows in what is printed, such as ``predictions``.
        """
        assert self.path is not None
        write_csv(self.path, columns, self.rows)
        print_marks([(row[2], row[-1]) for row in self.rows], len(self.rows))
        print(f"{len(self.rows)} {what} in {self.path}")

    @property
    def rows(self) -> list[Any]:
        """The rows, in order of the volumes."""
        return self.journal.rows() if self.journal is not None and self.journal.has_begun else self._made

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def _started(self) -> None:
        self._made.clear()

    def _iteration_completed(self, engine: Any) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            row, file, made = self.result(item, output)
            if self.journal is not None and self.journal.has_begun:
                self.journal.add(file, row, made)
            else:
                self._made.append(row)
