# SPDX-License-Identifier: Apache-2.0
"""The command line: words become values as typed, what is wrong is said in one line, exit status, help, completion."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from volta_components import __version__, cli
from volta_components.errors import InputError

PROGRAM = Path(sys.executable).with_name("volta3d")


def greet(
    name: str,
    output: Path | str = "out",
    times: int = 1,
    weight: float = 0.5,
    tone: Literal["warm", "cold"] = "warm",
    gifts: Sequence[str] = (),
    rooms: Sequence[Path | str] = (),
    moods: Sequence[Literal["glad", "sad"]] = ("glad",),
    folds: int | Sequence[int] = 5,
    set: Mapping[str, Any] | None = None,
    masks: Mapping[str, Path | str] | None = None,
    fail: bool = False,
    left_out: bool = False,
) -> int | None:
    """Greet somebody.

    Args:
        name: Who.
        output: Where.
        times: How often.
        weight: How much.
        tone: How.
        gifts: With what.
        rooms: In which rooms.
        moods: In which moods.
        folds: Folds.
        set: Settings.
        masks: Masks.
        fail: Whether the input is bad.
        left_out: Whether something was left out.
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
    monkeypatch.setitem(cli.COMMANDS, "greet", ("greeting:greet", "Greet somebody."))


# --- running a command -----------------------------------------------------------------------------------------------


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


def test_the_words_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["volta3d", "greet", "--name", "Ada"])
    assert cli.main() == 0
    assert capsys.readouterr().out == "hello Ada\n"


# --- words to values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["2024_06_02", "007", "1e3", "1_000", "0x10", "7", "none", "null", "True", "a b", "ä"])
def test_a_word_stays_as_it_was_typed(word: str) -> None:
    words = ["greet", "--name", word, "--gifts", word, "--rooms", word, "--masks", f"fs={word}", "-o", word]
    given = cli.read(words).keywords  # type: ignore[attr-defined]
    assert given == {
        "name": word,
        "gifts": [word],
        "rooms": [Path(word)],
        "masks": {"fs": Path(word)},
        "output": Path(word),
    }


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--output x", "output", Path("x")),
        ("-o x", "output", Path("x")),
        ("-o ~/x", "output", Path.home() / "x"),
        ("--output=a=b", "output", Path("a=b")),
        ("--times -2", "times", -2),
        ("--weight 1e-3", "weight", 0.001),
        ("--tone cold", "tone", "cold"),
        ("--gifts a,b", "gifts", ["a", "b"]),
        ("--gifts a --gifts b,c", "gifts", ["a", "b", "c"]),
        ("--gifts [a,b]", "gifts", ["a", "b"]),
        ("--gifts ''", "gifts", []),
        ("--moods sad,glad", "moods", ["sad", "glad"]),
        ("--folds 3", "folds", 3),
        ("--folds 0,3", "folds", [0, 3]),
        ("--folds [0,3]", "folds", [0, 3]),
        ("--folds [3]", "folds", [3]),
        ("--folds 0 --folds 3", "folds", [0, 3]),
        ("--set epochs=2,batch_size=4", "set", {"epochs": 2, "batch_size": 4}),
        ("--set epochs=2 --set lr=1e-4", "set", {"epochs": 2, "lr": 0.0001}),
        ("--set size=[96,96,96],name=a", "set", {"size": [96, 96, 96], "name": "a"}),
        ("--set size=96,96,96", "set", {"size": [96, 96, 96]}),
        ("--set a#b=true,c::d=False,e=null,f=None", "set", {"a#b": True, "c::d": False, "e": None, "f": None}),
        ("--set \"a=['x','y'],b='7'\"", "set", {"a": ["x", "y"], "b": "7"}),
        (
            "--set a=2024_06,b=007,c=1-00:00,path=/x=y",
            "set",
            {"a": "2024_06", "b": "007", "c": "1-00:00", "path": "/x=y"},
        ),
        ("--masks a=/x,y,b=z", "masks", {"a": Path("/x,y"), "b": Path("z")}),
        ("--left-out", "left_out", True),
        ("--left_out", "left_out", True),
    ],
)
def test_values(words: str, name: str, value: Any) -> None:
    given = cli.read(["greet", "--name", "Ada", *shlex.split(words)]).keywords  # type: ignore[attr-defined]
    assert given == {"name": "Ada", name: value}
    assert type(given[name]) is type(value)


def test_a_path_that_is_there_may_have_a_comma(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    words = ["greet", "--name", "Ada", "--rooms", f"{tmp_path}/a,b", "--rooms", f"{tmp_path}/c,{tmp_path}/d"]
    given = cli.read(words).keywords  # type: ignore[attr-defined]
    assert given["rooms"] == [tmp_path / "a,b", tmp_path / "c", tmp_path / "d"]


# --- what is wrong with a command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gret", "volta3d: no command 'gret'; did you mean greet?"),
        ("segmnt --source x", "volta3d: no command 'segmnt'; did you mean segment?"),
        ("xyz", "volta3d: no command 'xyz'; volta3d --help lists them"),
        ("--name Ada", "volta3d: no option '--name'; volta3d --help lists them"),
        ("greet", "volta3d greet: --name is missing; volta3d greet --help explains"),
        ("segment", "volta3d segment: --source and --output are missing; volta3d segment --help explains"),
        ("segment -o x", "volta3d segment: --source is missing; volta3d segment --help explains"),
        ("greet --name", "volta3d greet: --name needs a value"),
        ("greet --name --times 2", "volta3d greet: --name needs a value"),
        ("greet --colour red", "volta3d greet: no option --colour; volta3d greet --help lists them"),
        ("greet --left-ou=1", "volta3d greet: no option --left-ou; did you mean --left-out?"),
        ("greet --name Ada -x", "volta3d greet: no option -x; volta3d greet --help lists them"),
        ("greet --name Ada --name Eve", "volta3d greet: --name is given twice"),
        ("greet --name Ada -o a --output b", "volta3d greet: --output is given twice"),
        ("greet --name Ada --fail --fail", "volta3d greet: --fail is given twice"),
        ("greet --name Ada --times 2.5", "volta3d greet: --times 2.5: give a whole number"),
        ("greet --name Ada --times many", "volta3d greet: --times many: give a whole number"),
        ("greet --name Ada --weight x", "volta3d greet: --weight x: give a number"),
        ("greet --name Ada --folds 1,x", "volta3d greet: --folds 1,x: give a whole number"),
        ("greet --name Ada --tone wram", "volta3d greet: --tone wram: choose one of warm, cold; did you mean warm?"),
        ("greet --name Ada --moods glad,x", "volta3d greet: --moods glad,x: choose one of glad, sad"),
        ("greet --name Ada -o ''", "volta3d greet: --output: is empty; give a path"),
        (
            "greet --name Ada --set epochs",
            "volta3d greet: --set epochs: write NAME=VALUE, several of them separated by commas",
        ),
        ("greet --name Ada --set a=1 --set a=2", "volta3d greet: --set a=1 a=2: a is given twice"),
        ("greet --name Ada --fail=perhaps", "volta3d greet: --fail: takes no value"),
        ("greet --name Ada --fail True", "volta3d greet: --fail takes no value, but True follows"),
        ("greet Ada --name Ada", "volta3d greet: Ada stands without an option; volta3d greet --help lists them"),
        ("greet Ada", "volta3d greet: Ada stands without an option; volta3d greet --help lists them"),
        (
            "greet --name Ada --rooms a.nii b.nii c.nii d.nii",
            "volta3d greet: --rooms takes one word, but 4 follow (a.nii b.nii c.nii ...). Put a pattern in quotes, so "
            "that the shell leaves it as it is; separate several values by commas",
        ),
        (
            "greet --name Ada Eve",
            "volta3d greet: --name takes one word, but 2 follow (Ada Eve). The shell replaces a pattern without quotes "
            "by all that fits it; give a single one",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(words)) == 2
    assert capsys.readouterr() == ("", message + "\n")


def test_a_pattern_that_the_shell_has_expanded_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.nii.gz").touch()
    for command, option in (("segment", "--source"), ("prepare --layout folder", "--source")):
        line = f"{shlex.quote(str(PROGRAM))} {command} -o {tmp_path}/out {option} {tmp_path}/*.nii.gz"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"volta3d {command.split()[0]}: --source takes one word, but 3 follow")
        assert "quotes" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- version, help, completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["greet", "--version"]])
def test_the_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"volta3d {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_usage_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()  # where a pager or grep would look for it
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in out
        assert summary in out
    assert err == ""


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--name", "Ada", "--help"]])
def test_help_of_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", *words]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "hello" not in out
    for text in (
        "How often. [default: 1]",
        "How. [choices: warm, cold] [default: warm]",
        "In which moods. [choices: glad, sad]",
        "--output -o PATH",
        "--rooms PATH,...",
        "--set NAME=VALUE,...",
    ):
        assert text in out
    assert "None" not in out and "False" not in out


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "greet"])
def test_every_option_of_every_command_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    app = cli.make_app([name])
    arguments = app[name].assemble_argument_collection(parse_docstring=True)
    assert arguments and [argument.name for argument in arguments if not argument.parameter.help] == []
    outputs = [argument for argument in arguments if argument.name == "--output"]
    assert [argument.names for argument in outputs] == [("--output", "-o")] or name in (
        "init",
        "check",
        "inspect",
        "register",
    )
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: volta3d {name} ")
    assert "Raises" not in out and "Returns" not in out and "``" not in out


def test_the_default_of_the_report_is_that_of_the_statistics() -> None:
    from volta_components.downstream.metrics import BOOTSTRAP
    from volta_components.report.command import report

    assert inspect.signature(report).parameters["bootstrap"].default == BOOTSTRAP


def test_help_and_mistakes_wait_for_no_heavy_library() -> None:
    lines = ["--help", *(f"{name} --help" for name in cli.COMMANDS if name != "greet"), "segment --sauce x", "crossval"]
    code = (
        "import sys; from volta_components.cli import main; [main(line.split()) for line in sys.argv[1:]]; "
        "print([m for m in ('torch', 'monai', 'pandas', 'mlflow', 'fire') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage:") == len(lines) - 2 and done.stderr.count("\n") == 2
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_ends_quietly_when_nobody_reads_on() -> None:
    line = f"{shlex.quote(str(PROGRAM))} prepare --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Usage: volta3d prepare") and done.stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_completion_in_bash(tmp_path: Path) -> None:
    script = tmp_path / "volta3d"
    words = [str(PROGRAM), "--install-completion", "--shell", "bash", "--output", str(script)]
    subprocess.run(words, check=True, stdout=subprocess.PIPE, env=os.environ | {"HOME": str(tmp_path)})

    def complete(*words: str) -> list[str]:
        line = f"""
            source {shlex.quote(str(script))}
            COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}
            $(complete -p volta3d | sed 's/.*-F \\([^ ]*\\).*/\\1/') volta3d
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
        return [word.strip() for word in done.stdout.split()]

    assert complete("volta3d", "seg") == ["segment"]
    assert complete("volta3d", "prepare", "--exc") == ["--exclude-patients-of"]
    assert complete("volta3d", "prepare", "--layout", "b") == ["bids", "brats"]
    assert complete("volta3d", "segment", "--source", "vol") == ["volta3d"]  # the file there
