# SPDX-License-Identifier: Apache-2.0
"""The ``volta3d`` command: each sub-command is a plain function, imported only when it is called."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import io
import sys
from collections.abc import Callable
from typing import Any

from volta_components._version import __version__
from volta_components.errors import InputError

COMMANDS = {
    "phantom": ("volta_components.data.phantom.dataset:phantom", "grow a BIDS data set of brain phantoms"),
    "prepare": ("volta_components.data.prepare:prepare", "turn a data set into checked volumes and a datalist"),
    "crossval": ("volta_components.crossval.command:crossval", "train a bundle over folds, inits and fractions"),
    "report": ("volta_components.report.command:report", "tables and figures of finished cross-validations"),
    "pack": ("volta_components.sharing.pack:pack", "make a bundle and its weights a zip that can be downloaded"),
    "embed": ("volta_components.inference.commands:embed", "turn scans into embeddings by a pretrained bundle"),
    "segment": ("volta_components.inference.commands:segment", "outline both hippocampi in scans by a trained bundle"),
    "check": ("volta_components.data.overlaps:check", "prove that datalists do not overlap"),
    "merge": ("volta_components.data.overlaps:merge", "join prepared data sets into one datalist"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: volta3d COMMAND [OPTIONS]", "", *rows, "", "volta3d COMMAND --help lists a command's options."]
    )


class _Call:
    """A command with its options, ready to run."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run


def _deferred(function: Callable[..., Any]) -> Callable[..., _Call]:
    """What fire may call instead of a command: it calls first and only then complains of options that do not exist."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> _Call:
        return _Call(functools.partial(function, *args, **kwargs))

    return bind


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: the words after ``volta3d``; the process's own by default.

    Returns:
        Exit status: 0 done, 1 done but something was left out, 2 bad input, 130 interrupted (Ctrl-C).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"volta3d {__version__}")
        return 0
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"volta3d: no command {words[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    flags = [word.partition("=")[0].replace("_", "-") for word in words[1:] if word.startswith("--")]
    if twice := sorted({flag for flag in flags if flags.count(flag) > 1}):
        # fire would take the last one and forget the others.
        print(f"volta3d {words[0]}: {', '.join(twice)} is given twice; separate values by commas", file=sys.stderr)
        return 2
    module, name = COMMANDS[words[0]][0].split(":")
    function = getattr(importlib.import_module(module), name)
    asks_help = bool({"-h", "--help"} & set(words[1:]))
    known = [option.replace("_", "-") for option in inspect.signature(function).parameters]
    accepted = {"", *known, *(f"no{option}" for option in known)}
    if not asks_help and (unknown := [flag for flag in flags if flag.removeprefix("--") not in accepted]):
        near = difflib.get_close_matches(unknown[0].removeprefix("--"), known, n=1)
        guess = f"; did you mean --{near[0]}?" if near else f"; volta3d {words[0]} --help lists them"
        print(f"volta3d {words[0]}: no option {unknown[0]}{guess}", file=sys.stderr)
        return 2
    # Help goes to a pager where there is a terminal; plain output is what users of other commands expect.
    import fire
    import fire.core

    shown = sys.stdout if asks_help else sys.stderr
    fire.core.Display = lambda lines, out: print("\n".join(lines).replace("``", ""), file=shown)
    # What fire says of its own way to show help goes nowhere.
    quiet = contextlib.redirect_stderr(io.StringIO()) if asks_help else contextlib.nullcontext()
    try:
        with quiet:
            call = fire.Fire(
                _deferred(function),
                command=["--help"] if asks_help else words[1:],
                name=f"volta3d {words[0]}",
                serialize=lambda _: None,
            )
        result = call.run()
    except InputError as error:
        print(f"volta3d {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The new line ends that of a progress bar.
        print(f"\nvolta3d {words[0]}: interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
