# SPDX-License-Identifier: Apache-2.0
"""The command line: exit status, messages, help."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from volta_components import __version__, cli
from volta_components.errors import InputError


def greet(name: str, times: int = 1, fail: bool = False, left_out: bool = False) -> int | None:
    """Greet somebody.

    Args:
        name: who.
        times: how often.
        fail: whether the input is bad.
        left_out: whether something was left out.
    """
    if fail:
        raise InputError(f"{name}: cannot be greeted; choose another")
    print(" ".join([f"hello {name}"] * times))
    return 1 if left_out else None


@pytest.fixture(autouse=True)
def _greet_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("greeting")
    module.greet = greet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "greeting", module)
    monkeypatch.setitem(cli.COMMANDS, "greet", ("greeting:greet", "greet somebody"))


def test_a_command_that_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "--name", "Ada", "--times", "2"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("hello Ada hello Ada\n", "")


def test_a_command_that_left_something_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "--name=Ada", "--left_out"]) == 1
    assert capsys.readouterr().out == "hello Ada\n"


def test_bad_input_is_printed_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "--name", "Ada", "--fail"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "volta3d greet: Ada: cannot be greeted; choose another\n"


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["greeting"], "greet", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["greet"])


def test_ctrl_c_ends_a_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        print("half", end="")
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["greeting"], "greet", interrupted)
    assert cli.main(["greet"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("half", "\nvolta3d greet: interrupted\n")


@pytest.mark.parametrize("words", [["greet"], ["greet", "Ada", "2", "no", "no", "red"]])
def test_too_few_or_many_words_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "hello" not in out  # a long command must not run before its options are known to be right
    assert "greet" in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--colour", "volta3d greet: no option --colour; volta3d greet --help lists them\n"),
        ("--left-ou=1", "volta3d greet: no option --left-ou; did you mean --left-out?\n"),
    ],
)
def test_an_unknown_option(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "--name", "Ada", option, "red"]) == 2
    assert capsys.readouterr() == ("", message)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"volta3d {__version__}\n"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gret"]) == 2
    err = capsys.readouterr().err
    assert "no command 'gret'" in err
    assert "phantom" in err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_usage_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in out
        assert summary in out


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--name", "Ada", "--help"]])
def test_help_of_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["greet", *words])
    assert caught.value.code == 0
    out, err = capsys.readouterr()  # where a pager or grep would look for it
    assert err == ""
    assert "how often" in out
    assert "hello" not in out


def test_the_words_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["volta3d", "greet", "--name", "Ada"])
    assert cli.main() == 0
    assert capsys.readouterr().out == "hello Ada\n"


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "greet"])
def test_every_command_exists_and_explains_its_options(name: str) -> None:
    module, function = cli.COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), function)
    assert "Args:" in (command.__doc__ or "")


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    import subprocess

    code = (
        "import sys, volta_components.cli; print([m for m in ('torch', 'monai', 'fire', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]"
