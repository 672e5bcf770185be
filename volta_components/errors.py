# SPDX-License-Identifier: Apache-2.0
"""The one exception that stands for a user's bad input."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

_IN_A_LOADER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\n.*\n[\w.]+\.(?:InputError|UnusableVolume): "
    r"(.*?)(?:\n\nThe above exception was the direct cause|\Z)",
    re.DOTALL,
)


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


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_input_error(error: BaseException | None) -> InputError | None:
    """The bad input behind an error, or None.

    ``monai.bundle`` and Ignite wrap what goes wrong in a configuration into errors of their own. PyTorch makes an error
    out of the traceback of one in a loading process, whose last lines are its words.
    """
    for each in chain(error):
        if found := _IN_A_LOADER.match(str(each)):
            return InputError(found[1].rstrip())
        if isinstance(each, InputError):
            return each
    return None


def find_missing_id(error: BaseException | None) -> str | None:
    """What ``monai.bundle`` says of an id that no config file has; None if an error is another."""
    for each in chain(error):
        if isinstance(each, ValueError) and (said := str(each)).endswith("is not defined in the config content."):
            return said.removesuffix(".")
    return None


# What Python says of a word that a class or a function has no parameter for.
_UNKNOWN_WORD = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")


def find_unknown_argument(error: BaseException | None) -> str | None:
    """What a config gives a component that has no such argument, as a misspelt nested id does; None for others."""
    said = [str(each) for each in chain(error)]
    for found in filter(None, map(_UNKNOWN_WORD.search, said)):
        if any(re.match(rf"Failed to instantiate component '(.*\.)?{found[1]}'", text) for text in said):
            return f"{found[1]} has no {found[2]}; check its spelling, in the config files and on the command line"
    return None


AGAIN = "then start the same command again: it goes on from what is done, a training from its last checkpoint"
FULL = f"free space there, {AGAIN}"
READ_ONLY = f"make it writable or give another place, {AGAIN}"
GONE = f"put it back, or connect the drive again, {AGAIN}"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), READ_ONLY),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN), GONE),
    **dict.fromkeys(
        (errno.EEXIST, errno.EISDIR), "move it away, or give another place, and start the same command again"
    ),
    errno.EMFILE: f"allow more open files (ulimit -n 4096), {AGAIN}",
    errno.ENOMEM: f"free memory, {AGAIN}",
}


def find_fault(error: BaseException | None) -> str | None:
    """What a fault of the machine means, with its remedy: a disk, memory, a process that was killed; None for others.

    Args:
        error: anything that was raised; of the errors that it was raised from, the earliest one counts.
    """
    for each in reversed([*chain(error)]):
        if found := _fault(each):
            return found
    return None


def _fault(error: BaseException) -> str | None:
    text, kind = str(error), type(error).__name__
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{(error.strerror or text).lower()}; {REMEDIES[error.errno]}"
    if isinstance(error, MemoryError):
        return f"the memory is full; free some, or lower --batch_size and --num_workers, {AGAIN}"
    if kind == "OperationalError" and "disk is full" in text:  # SQLite's, or SQLAlchemy's of it
        return f"a database cannot grow, as its disk is full; {FULL}"
    if kind == "OutOfMemoryError":  # PyTorch's; importing it here would take seconds
        return "the GPU's memory is full; lower --batch_size, or end what else uses the GPU"
    if _is_of_a_killed_loader(error, text):
        first = (text.splitlines() or [kind])[0]
        return (
            f"a process that loads volumes has ended ({first.rstrip('. ')}), most often because the "
            f"memory was full; free some, or lower --num_workers, {AGAIN}"
        )
    return None


def _is_of_a_killed_loader(error: BaseException, text: str) -> bool:
    """PyTorch's own error, or that of a volume whose sender died while it was handed over."""
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker") and "Caught" not in text
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, (ConnectionError, EOFError)) and any("multiprocessing" in Path(f).parts for f in frames)


def describe(error: BaseException) -> tuple[str, bool]:
    """The last words on any error, and whether it is one of a kind that is known.

    A known one is the user's input, a fault of the machine, or a config that lacks another one.
    """
    if known := find_input_error(error) or find_fault(error) or find_unknown_argument(error):
        return str(known), True
    if missing := find_missing_id(error):
        remedy = "evaluate.json, give it after train.json: --config_file \"['.../train.json','.../evaluate.json']\""
        return f"{missing}; check its spelling, or, for {remedy}", True
    *_, cause = chain(error)
    first = (str(cause).strip().splitlines() or [""])[0]
    return f"{type(cause).__name__}: {first}; this was not foreseen: please report it with the lines above", False


def explain_input_errors() -> None:
    """From now on, the last lines of a process that an error ends say what is wrong and what to do.

    ``monai.bundle`` wraps each error in a configuration into errors of its own. The traceback is a hundred lines long,
    with the user's message in the middle. It is printed only for errors that were not foreseen.
    """
    default = sys.excepthook
    if getattr(default, "explains", False):
        return

    def hook(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            left = str(error) or "started again, a training resumes from its last checkpoint"
            print(f"\ninterrupted: {left}", file=sys.stderr)
            return
        message, is_known = describe(error)
        if not is_known:
            default(kind, error, frames)
        print(f"\nerror: {message}", file=sys.stderr)

    hook.explains = True  # type: ignore[attr-defined]
    sys.excepthook = hook
