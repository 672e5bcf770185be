# SPDX-License-Identifier: Apache-2.0
"""The one exception that stands for a user's bad input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType


class InputError(ValueError):
    """Something that the user gave cannot be used; the message names it and the remedy."""

    @classmethod
    def many(cls, headline: str, rows: Iterable[Sequence[str]], remedy: str, limit: int = 50) -> InputError:
        """List many bad inputs together, in aligned columns, between a headline and a remedy.

        Args:
            headline: what is wrong, with counts; ends without punctuation.
            rows: one sequence of cells for each bad input, such as (subject, file, reason).
            remedy: what the user can do about it.
            limit: rows shown; the rest are counted.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        shown = cells[:limit]
        widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)] if shown else []
        lines = [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in shown
        ]
        if len(cells) > limit:
            lines.append(f"  ... and {len(cells) - limit} more")
        return cls("\n".join([f"{headline}:", *lines, remedy]))


def check_counts(**counts: object) -> None:
    """Refuse ids of a config that count something and are no whole number of at least 1.

    Raises:
        InputError: naming all that are not.
    """
    rows = [
        (f"--{name}", repr(value))
        for name, value in counts.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if rows:
        raise InputError.many("ids that must be whole numbers of at least 1", rows, "Give another number.")


def find_input_error(error: BaseException | None) -> InputError | None:
    """The bad input behind an error, or None.

    ``monai.bundle`` and Ignite wrap what goes wrong in a configuration into errors of their own.
    """
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def find_missing_id(error: BaseException | None) -> str | None:
    """What ``monai.bundle`` says of an id that no config file has; None if an error is another."""
    while error is not None:
        if isinstance(error, ValueError) and (said := str(error)).endswith("is not defined in the config content."):
            return said.removesuffix(".")
        error = error.__cause__ or error.__context__
    return None


def explain_input_errors() -> None:
    """From now on, bad input, Ctrl-C and configs that lack another one end the process with a message alone.

    ``monai.bundle`` wraps each error in a configuration into errors of its own. The traceback is a hundred lines long,
    with the user's message in the middle.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        cause = find_input_error(error)
        if isinstance(error, KeyboardInterrupt):
            left = str(error) or "started again, a training resumes from its last checkpoint"
            print(f"\ninterrupted: {left}", file=sys.stderr)
        elif cause is not None:
            print(f"\nerror: {cause}", file=sys.stderr)
        elif missing := find_missing_id(error):
            remedy = "evaluate.json, give it after train.json: --config_file \"['.../train.json','.../evaluate.json']\""
            print(f"\nerror: {missing}; check its spelling, or, for {remedy}", file=sys.stderr)
        else:
            default(kind, error, traceback)

    sys.excepthook = hook
