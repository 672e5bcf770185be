# SPDX-License-Identifier: Apache-2.0
"""Format JSON files in the house style: ``python -m tools.format_json [--check] FILE ...``.

The style is that of MONAI's model zoo, four spaces to a level, with one difference: a list of numbers or words
stands on one line if it fits there. A list with two Python expressions (``"$..."``) or more has one item per line.
Order of keys and spelling of numbers (``1e-05``) stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

INDENT = "    "
LINE_LENGTH = 120


class _Number(str):
    """A number as it is written in the file."""


def format_json(text: str) -> str:
    """Return a JSON document in the house style, with a newline at the end.

    Raises:
        ValueError: if the text is not JSON, or an object has the same key twice.
    """
    document = json.loads(
        text, parse_int=_Number, parse_float=_Number, parse_constant=_refuse_constant, object_pairs_hook=_object
    )
    return _format(document, prefix="", suffix="", level=0) + "\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key: readers of JSON silently keep its last value."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{repeated}" appears twice in one object')
    return result


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _format(value: Any, prefix: str, suffix: str, level: int) -> str:
    """Return ``prefix`` (a key or nothing), the value and ``suffix`` (a comma or nothing), indented to ``level``."""
    start = INDENT * level + prefix
    if not isinstance(value, (dict, list)) or not value:
        return start + _one_line(value) + suffix
    if isinstance(value, list) and _is_short(value):
        line = start + _one_line(value) + suffix
        if len(line) <= LINE_LENGTH:
            return line
    if isinstance(value, dict):
        opening, closing = "{", "}"
        items = [(f"{_one_line(key)}: ", item) for key, item in value.items()]
    else:
        opening, closing = "[", "]"
        items = [("", item) for item in value]
    last = len(items) - 1
    lines = [_format(item, key, "," if number < last else "", level + 1) for number, (key, item) in enumerate(items)]
    return "\n".join([start + opening, *lines, INDENT * level + closing + suffix])


def _is_short(values: list[Any]) -> bool:
    """Whether a list may stand on one line: plain values and lists of them, with at most one Python expression."""
    expressions = sum(isinstance(value, str) and value.startswith("$") for value in values)
    return expressions <= 1 and all(
        _is_short(value) if isinstance(value, list) else not isinstance(value, dict) for value in values
    )


def _one_line(value: Any) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(_one_line(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def main(arguments: list[str] | None = None) -> int:
    """Format the files, or only list them with ``--check``. The exit status is 1 if one was not formatted."""
    parser = argparse.ArgumentParser(prog="python -m tools.format_json", description="Format JSON files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not formatted")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.files:
        try:
            text = path.read_bytes().decode()
            formatted = format_json(text)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if text == formatted:
            continue
        failed = True
        if options.check:
            print(f"{path}: not formatted; run `python -m tools.format_json {path}`", file=sys.stderr)
        else:
            path.write_bytes(formatted.encode())
            print(f"{path}: formatted")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
