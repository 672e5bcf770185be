# SPDX-License-Identifier: Apache-2.0
"""The ``volta3d`` command: each sub-command is a plain function, imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from volta_components.errors import InputError

COMMANDS = {
    "phantom": ("volta_components.data.phantom:phantom", "grow a BIDS data set of brain phantoms"),
    "prepare": ("volta_components.data.prepare:prepare", "turn a data set into checked volumes and a datalist"),
    "crossval": ("volta_components.crossval:crossval", "train a bundle over folds, inits and fractions"),
    "report": ("volta_components.report.command:report", "tables and figures of finished cross-validations"),
    "check": ("volta_components.data.datalist:check", "prove that datalists do not overlap"),
    "merge": ("volta_components.data.datalist:merge", "join prepared data sets into one datalist"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: volta3d COMMAND [OPTIONS]", "", *rows, "", "volta3d COMMAND --help lists a command's options."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: the words after ``volta3d``; the process's own by default.

    Returns:
        Exit status: 0 done, 1 done but something was left out, 2 bad input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"volta3d: no command {words[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    module, function = COMMANDS[words[0]][0].split(":")
    # Help goes to a pager where there is a terminal; plain output is what users of other commands expect.
    import fire
    import fire.core

    fire.core.Display = lambda lines, out: print("\n".join(lines), file=out)
    try:
        result = fire.Fire(
            getattr(importlib.import_module(module), function),
            command=words[1:],
            name=f"volta3d {words[0]}",
            serialize=lambda value: None if isinstance(value, int) else value,
        )
    except InputError as error:
        print(f"volta3d {words[0]}: {error}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
