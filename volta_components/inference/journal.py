# SPDX-License-Identifier: Apache-2.0
"""What an inference has already done, kept volume by volume."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from monai.data import Dataset

from volta_components.data.identity import grouped
from volta_components.data.volumes import volume_stem
from volta_components.data.walk import size_and_time
from volta_components.errors import InputError
from volta_components.files import FolderLock, atomic_path, sha256_file, sha256_json
from volta_components.training.record import code_version, plain_settings

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

    One process at a time writes to it: a table has the rows of one process, and those that were there when it began.

    Results have the names of their volumes. Before anything is made, a volume is refused whose result would be written
    over that of another volume, or over one that somebody has edited. A volume that is not given again keeps its row as
    long as the row holds, also when its file is gone; those whose row does not are named.

    Args:
        path: the file, ``.jsonl``.
        settings: whatever results depend on beside weights.
        root: results have the folders that their volumes have below this one (see ``result_root``); empty for none,
            ``None`` where no files are made of volumes.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], root: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path)
        self.settings = plain_settings(settings)
        self.root = root
        self.run = ""
        self._items: dict[str, Item] = {}
        self._lines: dict[str, Line] = {}
        self._others: list[Line] = []
        self._lock = FolderLock(self.path.with_name(f".{self.path.stem}.lock"))
        weakref.finalize(self, self._lock.release)  # of a run that fails, in a process that goes on

    @property
    def has_begun(self) -> bool:
        """Whether rows are kept."""
        return bool(self._items)

    def begin(self, dataset: Dataset, weights: str | os.PathLike[str]) -> None:
        """Leave those items in a dataset whose row is missing or does not hold; do it before an evaluator is built.

        Raises:
            InputError: listing the volumes whose results would be written over others; or if another process is at
                work there.
        """
        self._lock.take("another inference writes its results there; wait for its end, or give another output")
        items: Sequence[Item] = dataset.data
        facts = {"settings": self.settings, "weights": sha256_file(weights), "code_version": code_version()}
        self.run = sha256_json(facts)
        self._items = {_key(item["image"]): item for item in items}
        marks = {key: self._mark(item) for key, item in self._items.items()}
        lines = self._read()
        held = {key for key, mark in marks.items() if key in lines and _holds(lines[key], mark)}
        self._check_results([key for key in marks if key not in held], lines)
        self._lines = {key: line for key, line in lines.items() if key not in marks or key in held}
        lost = {key: reason for key in self._lines.keys() - marks if (reason := self._why_lost(self._lines[key]))}
        self._others = [line for key, line in self._lines.items() if key not in marks and key not in lost]
        if lost:
            headline = f"{len(lost)} scans of earlier commands are not in the table any more (scan, why)"
            remedy = "Give them as well to have them made again; their files stay until then."
            print(InputError.many(headline, sorted(lost.items()), remedy), file=sys.stderr)
        if self.path.is_file():
            with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in self._lines.values())
        dataset.data = [item for item in items if _key(item["image"]) not in self._lines]
        if done := len(items) - len(dataset.data):
            print(f"{done} of {len(items)} volumes are done already, by {self.path}")

    def add(self, file: str | os.PathLike[str], row: Any, outputs: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Keep a volume's row (anything that JSON holds); it holds while its ``outputs`` are what they are now."""
        key = _key(file)
        about = {"file": key, "name": self._name(key), "made": list(map(_made, outputs)), "row": row}
        self._lines[key] = {**self._mark(self._items[key]), **about}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self._lines[key]) + "\n")

    def end(self) -> None:
        """Let other processes write; nothing is added any more."""
        self._lock.release()

    def rows(self) -> list[Any]:
        """The rows that hold: of the run's items, in their order; then of other volumes, which earlier runs made."""
        own = [self._lines[key] for key in self._items if key in self._lines]
        return [line["row"] for line in (*own, *self._others)]

    def _name(self, key: str) -> str | None:
        """What the results of a volume are called, without what is added to it."""
        if self.root is None:
            return None
        path = Path(key)
        folder = os.path.relpath(path.parent, self.root) if self.root else ""
        return os.path.normpath(Path(folder, volume_stem(path)))

    def _check_results(self, files: Sequence[str], lines: Mapping[str, Line]) -> None:
        """Refuse what would be written over results of another volume, or over edited ones."""
        by_name = grouped(lines.values(), itemgetter("name"))
        rows = []
        for file in files:
            for line in by_name.get(self._name(file) or "", ()):
                for made in line["made"]:
                    if line["file"] != file and Path(made[0]).is_file():
                        rows.append((file, made[0], f"is of {line['file']}"))
                    elif Path(made[0]).is_file() and not _as_made(made):
                        rows.append((file, made[0], "was changed after it was made"))
        if rows:
            raise InputError.many(
                f"results of {len(rows)} scans would be written over others (scan, result that is there, why it stays)",
                rows,
                "Give another --output, or all scans of one name in one command: then their results get folders. Move "
                "a result away, or remove it, to have it made again.",
            )

    def _why_lost(self, line: Line) -> str | None:
        """Why the row of a volume that is not given now does not hold; that its file is gone changes nothing."""
        if line["run"] != self.run:
            return "made with other weights, settings or code"
        found = size_and_time(Path(line["file"]))
        if found != (None, None) and found != (line["size"], line["mtime_ns"]):
            return "the scan was changed"
        if not all(map(_as_made, line["made"])):
            return "its result was changed or removed"
        return None

    def _mark(self, item: Item) -> dict[str, Any]:
        """What a row depends on."""
        about = {name: value for name, value in item.items() if name != "image"}
        # Where the file is gone, whoever reads the volume says so.
        return dict(zip(MARK, (self.run, sha256_json(about), *size_and_time(Path(str(item["image"])))), strict=True))

    def _read(self) -> dict[str, Line]:
        """Lines by file; the last one of a killed run may be torn."""
        lines: dict[str, Line] = {}
        if not self.path.is_file():
            return lines
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                lines[line["file"]] = {name: line[name] for name in (*MARK, "file", "name", "made", "row")}
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        return lines


def _holds(line: Line, mark: Mapping[str, Any]) -> bool:
    return all(line[name] == mark[name] for name in MARK) and all(map(_as_made, line["made"]))


def _made(output: str | os.PathLike[str]) -> list[Any]:
    """What is kept of a result: path, size, time of its last change, hash."""
    path = Path(output).absolute()
    return [str(path), *size_and_time(path), sha256_file(path)]


def _as_made(made: Sequence[Any]) -> bool:
    """Whether a result is there as it was made. It is read only where its time is another, as after a copy."""
    path, size, changed, digest = made
    found = size_and_time(Path(path))
    return found[0] == size and (found[1] == changed or sha256_file(path) == digest)


def _key(file: Any) -> str:
    return str(Path(str(file)).absolute())
