# SPDX-License-Identifier: Apache-2.0
"""What an inference has already done, kept volume by volume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import Dataset

from volta_components.files import atomic_path, sha256_file, sha256_json
from volta_components.training.record import code_version

Item = dict[str, Any]
Line = dict[str, Any]

# Of a line: run, rest of the item, size and time of the last change of the volume's file.
MARK = ("run", "item", "size", "mtime_ns")


class Journal:
    """Rows of a table as they are made, so that an inference that is started again does not make them twice.

    MONAI's ``PersistentDataset`` keeps inputs, and its handlers write tables when everything is done: after a thousand
    scans, a run that is broken at the last would begin at the first. Here each volume's row is a line of JSON, appended
    when its files are written. A row holds as long as weights, settings, code version, the volume's file (size and time
    of its last change), its item and the files made of it are what they were. Remove the journal to start again.

    Args:
        path: the file, ``.jsonl``.
        settings: whatever results depend on beside weights.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        self.run = ""
        self._items: dict[str, Item] = {}
        self._lines: dict[str, Line] = {}

    @property
    def has_begun(self) -> bool:
        """Whether rows are kept."""
        return bool(self._items)

    def begin(self, dataset: Dataset, weights: str | os.PathLike[str]) -> None:
        """Leave those items in a dataset whose row is missing or does not hold; do it before an evaluator is built."""
        items: Sequence[Item] = dataset.data
        facts = {"settings": self.settings, "weights": sha256_file(weights), "code_version": code_version()}
        self.run = sha256_json(facts)
        self._items = {_key(item["image"]): item for item in items}
        marks = {key: self._mark(item) for key, item in self._items.items()}
        self._lines = {key: line for key, line in self._read().items() if key not in marks or _holds(line, marks[key])}
        if self.path.is_file():
            with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in self._lines.values())
        dataset.data = [item for item in items if _key(item["image"]) not in self._lines]
        if done := len(items) - len(dataset.data):
            print(f"{done} of {len(items)} volumes are done already, by {self.path}")

    def add(self, file: str | os.PathLike[str], row: Any, outputs: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Keep a volume's row (anything that JSON holds); it holds while the ``outputs`` of the volume are there."""
        key = _key(file)
        made = [str(Path(output).absolute()) for output in outputs]
        self._lines[key] = {**self._mark(self._items[key]), "file": key, "outputs": made, "row": row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self._lines[key]) + "\n")

    def rows(self) -> list[Any]:
        """The rows of the run's items that have one, in order of the items."""
        return [self._lines[key]["row"] for key in self._items if key in self._lines]

    def _mark(self, item: Item) -> dict[str, Any]:
        """What a row depends on."""
        about = {name: value for name, value in item.items() if name != "image"}
        try:
            status = Path(str(item["image"])).stat()
        except OSError:  # whoever reads the volume says what is wrong with it
            size = changed = -1
        else:
            size, changed = status.st_size, status.st_mtime_ns
        return dict(zip(MARK, (self.run, sha256_json(about), size, changed), strict=True))

    def _read(self) -> dict[str, Line]:
        """Lines by file; the last one of a killed run may be torn."""
        lines: dict[str, Line] = {}
        if not self.path.is_file():
            return lines
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                lines[line["file"]] = {name: line[name] for name in (*MARK, "file", "outputs", "row")}
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        return lines


def _holds(line: Line, mark: Mapping[str, Any]) -> bool:
    return all(line[name] == mark[name] for name in MARK) and all(Path(path).is_file() for path in line["outputs"])


def _key(file: Any) -> str:
    return str(Path(str(file)).absolute())
