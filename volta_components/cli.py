# SPDX-License-Identifier: Apache-2.0
"""The ``volta3d`` command.

Each sub-command is a plain function: its signature says which options there are, its docstring what they mean. Only the
module of the command that is called is imported.

A word is taken as it was typed: where a text or a path is expected, ``007``, ``1e3`` and ``2024_06_02`` stay what they
are. This module has the rules by which words become the types of a signature.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import App, Argument, CycloptsError, Group, Parameter
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    RepeatArgumentError,
)

from volta_components._version import __version__
from volta_components.errors import InputError, describe, explain_input_errors
from volta_components.files import keep_private

# In the order in which a study uses them.
COMMANDS = {
    "init": (
        "volta_components.sharing.shipped:init",
        "Copy the bundles and the label server into a folder.",
    ),
    "fetch": ("volta_components.data.fetch.command:fetch", "Download open data, checked, with its licence."),
    "phantom": ("volta_components.data.phantom.command:phantom", "Make a BIDS data set of synthetic heads."),
    "prepare": ("volta_components.data.prepare:prepare", "Turn a data set into checked volumes and a datalist."),
    "check": ("volta_components.data.overlaps:check", "Look for patients that are in two datalists."),
    "merge": ("volta_components.data.overlaps:merge", "Join prepared data sets into one datalist."),
    "pack-data": ("volta_components.data.shards:pack_data", "Put prepared volumes into a few large tar files."),
    "crossval": ("volta_components.crossval.command:crossval", "Train a bundle over folds, inits and fractions."),
    "report": ("volta_components.report.command:report", "Make tables and figures of finished cross-validations."),
    "segment": ("volta_components.inference.commands:segment", "Outline both hippocampi in scans."),
    "embed": ("volta_components.inference.commands:embed", "Turn scans into embeddings."),
    "inspect": ("volta_components.inference.trust:inspect", "List code in a bundle that is not the project's own."),
    "pack": ("volta_components.sharing.pack:pack", "Pack a bundle and its weights into a zip to share."),
    "register": ("volta_components.sharing.registry:register", "Put a trained model into MLflow's registry."),
}
COMPLETION = "--install-completion"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Returns:
        Exit status: 0 done, 1 done but something was left out, 2 bad input or a fault, 130 interrupted (Ctrl-C).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    before = keep_private()
    program = f"volta3d {words[0]}" if words and words[0] in COMMANDS else "volta3d"
    try:
        result = read(words)()
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The new line ends that of a progress bar.
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message, is_known = describe(error)
        if not is_known:
            explain_input_errors()  # the traceback, and below it what to do
            raise
        print(f"\n{program}: {message}", file=sys.stderr)
        return 2
    finally:
        os.umask(before)
    return result if isinstance(result, int) else 0


def read(words: Sequence[str]) -> Callable[[], Any]:
    """The command of the words after ``volta3d``, with its options, ready to run; nothing has run yet.

    Raises:
        InputError: if there is no such command or option, a value does not fit, or something is missing or too much.
    """
    app = make_app(words)
    try:
        command, bound, _ = app.parse_args(words)
    except CycloptsError as error:
        raise InputError(_explain(error, app, words)) from None
    return functools.partial(command, *bound.args, **bound.kwargs)


def make_app(words: Sequence[str]) -> App:
    """The command line, with the options of the commands that ``words`` name."""
    app = App(
        name="volta3d",
        version=f"volta3d {__version__}",
        version_flags=["--version", "-V"],
        help="Self-supervised pretraining on brain MRI, and what comes before and after it.\n\n"
        "`volta3d COMMAND --help` explains a command. Exit status: 0 done, 1 done but something was left out, "
        "2 bad input or a fault, 130 interrupted.",
        help_format="markdown",
        group_parameters=Group("Options"),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    app.register_install_completion_command(COMPLETION, help="Install completion for bash, zsh or fish.")
    for number, (name, (place, summary)) in enumerate(COMMANDS.items()):
        if words[:1] in ([name], [COMPLETION]):
            app.command(_with_options(pkgutil.resolve_name(place)), name=name, sort_key=number)
        else:
            app.command(place, name=name, help=summary, sort_key=number)
    return app


# --- from words to the types of a signature --------------------------------------------------------------------------


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the command line sees it: each parameter is an option, read by the rule of its type."""
    hints = get_type_hints(function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            # A word with no option before it is most often the rest of a pattern that the shell has expanded.
            parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
        parameters.append(parameter.replace(annotation=_option(parameter, hints[parameter.name])))

    def command(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option(parameter: inspect.Parameter, hint: Any) -> Any:
    """A parameter's type, with the rule by which words become a value of it."""
    members = _members(hint)
    several = next((kind for kind in members if get_origin(kind) in (Sequence, Mapping)), None)
    of_one = _members(get_args(several)[-1] if several else hint)
    kind = Path if Path in of_one else of_one[0]  # what may be a path or text is a path
    convert: Callable[[Sequence[str]], Any]
    if several is None:
        metavar, convert = _metavar(kind), functools.partial(_read_one, kind)
    elif get_origin(several) is Sequence:
        metavar, convert = f"{_metavar(kind)},...", functools.partial(_read_list, kind, kind in members)
    else:
        metavar, convert = f"NAME={_metavar(kind)},...", functools.partial(_read_table, kind)
    is_flag = kind is bool
    rule = Parameter(
        alias="-o" if parameter.name == "output" else None,
        converter=None if is_flag else lambda _, tokens: convert([token.value for token in tokens]),
        metavar=None if is_flag else metavar,
        n_tokens=None if is_flag else -1 if several else 1,
        negative=(),
        accepts_keys=False,
        json_dict=False,
        json_list=False,
        show_default=_shown if parameter.default or type(parameter.default) in (int, float) else False,
    )
    return Annotated[hint, rule]


def _members(hint: Any) -> list[Any]:
    """The types of a union but for None."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return [kind for kind in kinds if kind is not NoneType]


def _metavar(kind: Any) -> str:
    """What stands after an option in the help."""
    if get_origin(kind) is Literal:
        return "CHOICE"
    return {Path: "PATH", int: "N", float: "X", Any: "VALUE"}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


# Python also reads "1_000" and digits of other scripts, which a person hardly means.
NUMBER = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|nan"),  # nan: the command says its range
}


def _read_one(kind: Any, words: Sequence[str]) -> Any:
    """One word as a value; a ``ValueError`` says what is expected."""
    (word,) = words
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if word not in choices:
            near = _near(word, choices)
            raise ValueError(f"choose one of {', '.join(choices)}{f'; {near}' if near else ''}")
        return word
    if kind is Path:
        if not word:
            raise ValueError("is empty; give a path")
        return Path(word).expanduser()
    if kind in (int, float):
        if not NUMBER[kind].fullmatch(word):
            raise ValueError("give a whole number" if kind is int else "give a number")
        return kind(word)
    return _literal(word) if kind is Any else word


def _read_list(kind: Any, or_one: bool, words: Sequence[str]) -> Any:
    """``a,b`` or ``[a,b]``, once or several times, as a list; with ``or_one``, a single value as itself."""
    parts = [part for word in words for part in _split(kind, word)]
    if or_one and len(parts) == 1 and not words[0].startswith("["):
        return _read_one(kind, parts)
    return [_read_one(kind, [part]) for part in parts]


def _split(kind: Any, word: str) -> list[str]:
    # A path that is there is one word, whatever is in its name.
    if kind is Path and Path(word).expanduser().exists():
        return [word]
    if word.startswith("[") and word.endswith("]"):
        word = word[1:-1]
    return [part.strip() for part in word.split(",") if part.strip()]


def _read_table(kind: Any, words: Sequence[str]) -> dict[str, Any]:
    """``a=1,b=2``, once or several times, as a dictionary."""
    table: dict[str, Any] = {}
    for word in words:
        # A comma ends an assignment only where NAME= follows: commas inside lists stay.
        for part in filter(None, re.split(r",(?=\s*[A-Za-z_][\w#:.]*=)", word)):
            name, sign, value = part.partition("=")
            if not sign or not name.strip():
                raise ValueError("write NAME=VALUE, several of them separated by commas")
            if name.strip() in table:
                raise ValueError(f"{name.strip()} is given twice")
            table[name.strip()] = _read_one(kind, [value])
    return table


def _literal(word: str) -> Any:
    """A value as in JSON or, for lists, quoted text, True, False and None, as in Python; else the word itself."""
    with contextlib.suppress(ValueError):
        return json.loads(word)
    with contextlib.suppress(ValueError):
        if "," in word:
            return json.loads(f"[{word}]")
    if word[:1] in tuple("[({'\"") or word in {"True", "False", "None"}:
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(word)
    return word


# --- what is wrong with a command line -------------------------------------------------------------------------------


def _explain(error: CycloptsError, app: App, words: Sequence[str]) -> str:
    """What is wrong, in one line, with the remedy."""
    name = words[0]
    if name == COMPLETION:
        return str(error)
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        return f"no {kind} {name!r}; {_near(name.lower(), COMMANDS) or 'volta3d --help lists them'}"
    arguments = app[name].assemble_argument_collection()
    known = [option for argument in arguments for option in argument.names]
    given = [found[0].replace("_", "-") for word in words[1:] if (found := re.match(r"--[\w-]+|-[A-Za-z]", word))]
    if unknown := [option for option in given if option not in known]:
        return f"no option {unknown[0]}; {_near(unknown[0], known) or f'volta3d {name} --help lists them'}"
    match error:
        case RepeatArgumentError(token=token):
            return f"{token.keyword} is given twice"
        case CoercionError(argument=Argument() as argument):
            value = " ".join(token.value for token in argument.tokens)
            return f"{argument.name}{f' {value}' * bool(value)}: {error.msg or 'takes no value'}"
        case MissingArgumentError(keyword=str() as option):
            return f"{option} needs a value"
        case _ if error.unused_tokens:
            return _explain_extra(error.unused_tokens, arguments, words)
        case MissingArgumentError():
            absent = [argument.name for argument in arguments if argument.required and not {*argument.names} & {*given}]
            verb = "is" if len(absent) == 1 else "are"
            return f"{' and '.join(absent)} {verb} missing; volta3d {name} --help explains"
    return str(error)


def _explain_extra(extra: Sequence[str], arguments: Iterable[Argument], words: Sequence[str]) -> str:
    """Words that belong to no option: most often the rest of a pattern that the shell has expanded."""
    # The word itself may also be the value of an option, before or behind.
    places = (place for place, word in enumerate(words) if word == extra[0])
    place = max(places, key=lambda place: (not words[place - 1].startswith("-"), place))
    option = next((word for word in reversed(words[:place]) if word.startswith("-")), None)
    if option is None:
        return f"{extra[0]} stands without an option; volta3d {words[0]} --help lists them"
    if words[place - 1] == option:
        return f"{option} takes no value, but {extra[0]} follows"
    values = shlex.join([words[place - 1], *extra[:2]]) + " ..." * (len(extra) > 2)
    takes_list = any(
        option.replace("_", "-") in argument.names and argument.parameter.n_tokens == -1 for argument in arguments
    )
    return f"{option} takes one word, but {len(extra) + 1} follow ({values}). " + (
        "Put a pattern in quotes, so that the shell leaves it as it is; separate several values by commas"
        if takes_list
        else "The shell replaces a pattern without quotes by all that fits it; give a single one"
    )


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
