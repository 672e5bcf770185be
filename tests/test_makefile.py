# SPDX-License-Identifier: Apache-2.0
"""``make`` finds a Python that can run the project, or says what it looked for.

Each test runs the real Makefile in a folder of its own. Its PATH holds a few shell tools and Pythons made for the
test: they answer as another version would, and only write down what ``make`` would install.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("basename", "bash", "cat", "chmod", "dirname", "grep", "make", "mkdir", "mktemp", "rm", "touch")
PYENV_SHIM = "#!/bin/sh\necho 'pyenv: python: command not found' >&2\necho 'It exists in: 3.12.1' >&2\nexit 127\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile and what it reads, and ``bin`` with the shell's tools but no Python."""
    folder = tmp_path / "my project"
    locks = [f"locks/{name}.txt" for name in ("build", "torch", "cuda", "setup", "label")]
    read = (
        "tools/find_python.sh",
        "tools/install.sh",
        "setup.cfg",
        "pyproject.toml",
        *locks,
        "volta_components/_version.py",
    )
    for name in ("Makefile", *read):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} is needed for this test"))
    return folder


def fake_python(path: Path, version: str, missing: Iterable[str] = ()) -> Path:
    """A Python that reports ``version``, lacks the ``missing`` modules and logs its environments' commands."""
    numbers = (*map(int, version.split(".")), "final", 0)
    before = f"import sys; sys.version_info = {numbers}; sys.modules.update(dict.fromkeys({list(missing)}))"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"""#!/bin/sh
if [ "$1" = -c ]; then
    exec '{sys.executable}' -I -S -c "{before}; exec(sys.argv[1])" "$2"
fi
test "$1 $2 $3" = "-m venv --clear" || exit 2
mkdir -p "$4/bin"
echo "made by {path}" >> log
printf '#!/bin/sh\\necho "$*" >> log\\n' > "$4/bin/python"
chmod +x "$4/bin/python"
""")
    path.chmod(0o755)
    return path


def make(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": str(project.parent / "bin"), **environment}
    return subprocess.run(
        [project.parent / "bin" / "make", *words], cwd=project, env=variables, capture_output=True, text=True
    )


def makers(project: Path) -> list[str]:
    """The Pythons that made environments."""
    log = project / "log"
    return re.findall(r"^made by (.+)$", log.read_text(), re.MULTILINE) if log.exists() else []


@pytest.mark.parametrize(
    "pythons, expected",
    [
        ({"python3.11": "3.11.7", "python3.12": "3.12.1", "python3": "3.13.0"}, "python3.11"),
        ({"python3.12": "3.12.1", "python3.13": "3.13.0", "python3": "3.9.2"}, "python3.12"),
        ({"python3.13": "3.13.0", "python3": "3.10.12"}, "python3.13"),
        ({"python3": "3.11.0"}, "python3"),
        ({"python3": "3.14.2"}, "python3"),
        ({"python3.11": "3.11.7 without ensurepip", "python3.12": "3.12.1"}, "python3.12"),
        ({"python3.11": "pyenv", "python3.13": "3.13.0"}, "python3.13"),
    ],
)
def test_the_first_python_that_can_be_used_makes_the_environment(
    project: Path, pythons: Mapping[str, str], expected: str
):
    binaries = project.parent / "bin"
    for name, description in pythons.items():
        if description == "pyenv":
            (binaries / name).write_text(PYENV_SHIM)
            (binaries / name).chmod(0o755)
        else:
            version, *missing = description.split(" without ")
            fake_python(binaries / name, version, missing)
    result = make(project, "setup")
    assert result.returncode == 0, result.stderr
    assert makers(project) == [str(binaries / expected)]
    assert f"Found Python {pythons[expected]}: {binaries / expected}" in result.stderr
    installed = (project / "log").read_text()
    words = [line.partition("pip install ")[2] for line in installed.splitlines() if "pip install" in line]
    assert all(("--require-hashes" in line) == ("/locks/" in line) for line in words)
    lists = [f"{project}/locks/{name}.txt" for name in ("build", "torch", "cuda", "setup")]
    assert [line.partition("-r ")[2] or line.rsplit(maxsplit=1)[1] for line in words] == [*lists, "."]
    assert (project / ".venv" / ".ready").exists()


def test_without_a_python_make_says_what_it_looked_for_and_what_to_do(project: Path):
    binaries = project.parent / "bin"
    (binaries / "python3.12").write_text(PYENV_SHIM)
    (binaries / "python3.12").chmod(0o755)
    fake_python(binaries / "python3.13", "3.13.0", ["venv"])
    fake_python(binaries / "python3", "3.9.2")
    result = make(project, "demo")
    assert result.returncode != 0
    for line in (
        "No Python 3.11 or later with venv was found",
        "python3.11: not found",
        f"{binaries}/python3.12: pyenv: python: command not found",
        f"{binaries}/python3.13: Python 3.13.0 without venv (on Debian and Ubuntu: apt install python3.13-venv)",
        f"{binaries}/python3: Python 3.9.2, older than 3.11",
        "apt install",
        "make PYTHON=/path/to/python3",
    ):
        assert line in result.stderr, result.stderr
    assert not (project / ".venv").exists() and not (project / "log").exists()


@pytest.mark.parametrize("place", ["command line", "environment"])
def test_a_python_that_is_named_wins(project: Path, place: str):
    fake_python(project.parent / "bin" / "python3.11", "3.11.7")
    mine = fake_python(project.parent / "my python" / "python", "3.13.1")
    result = (
        make(project, "setup", f"PYTHON={mine}")
        if place == "command line"
        else make(project, "setup", PYTHON=str(mine))
    )
    assert result.returncode == 0, result.stderr
    assert makers(project) == [str(mine)]


def test_a_python_that_is_named_but_cannot_be_used_is_not_replaced(project: Path):
    fake_python(project.parent / "bin" / "python3.11", "3.11.7")
    mine = fake_python(project.parent / "old" / "python", "3.8.10")
    result = make(project, "setup", f"PYTHON={mine}")
    assert result.returncode != 0
    assert f"{mine}: Python 3.8.10, older than 3.11" in result.stderr
    assert makers(project) == []


def test_the_environment_stays_unless_it_is_broken(project: Path):
    python = fake_python(project.parent / "bin" / "python3.11", "3.11.7")
    assert make(project, "setup").returncode == 0
    locked = project / "locks" / "setup.txt"
    locked.write_text(locked.read_text() + "# a change\n")
    (project / ".venv" / ".ready").unlink()
    assert make(project, "setup").returncode == 0
    assert makers(project) == [str(python)], "new requirements go into the environment that is there"
    # As an interrupted start leaves it: a Python without pip.
    (project / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (project / ".venv" / ".ready").unlink()
    assert make(project, "setup").returncode == 0
    assert makers(project) == [str(python)] * 2


def test_the_real_interpreter_of_these_tests_is_accepted():
    found = subprocess.run(
        [ROOT / "tools" / "find_python.sh", sys.executable], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{sys.executable}\n"
    assert f"Found Python {'.'.join(map(str, sys.version_info[:3]))}" in found.stderr


def test_the_oldest_python_is_the_one_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    oldest = config["options"]["python_requires"].removeprefix(">=")
    script = (ROOT / "tools" / "find_python.sh").read_text()
    assert f"candidates=(python{oldest} " in script
    assert f"({oldest.replace('.', ', ')})" in script


@pytest.mark.parametrize("has_torchvision", [True, False])
def test_the_label_servers_needs_go_into_the_environment_that_is_named(tmp_path: Path, has_torchvision: bool):
    """As ``volta3d init`` leaves the folder: no Makefile, the package from a wheel."""
    shutil.copytree(ROOT / "label", tmp_path / "my lab" / "label")
    library, python = tmp_path / "library", tmp_path / "python"
    library.mkdir()
    python.write_text(f"""#!/bin/sh
case "$*" in
    *torchvision*) exit {int(not has_torchvision)} ;;
    *purelib*) echo '{library}' ;;
    *) echo "$*" >> '{tmp_path}/log' ;;
esac
""")
    python.chmod(0o755)
    words = ["bash", "label/install.sh", str(python), "my wheel.whl"]
    subprocess.run(words, cwd=tmp_path / "my lab", check=True)
    place = tmp_path / "my lab" / "label"
    torch = re.findall("^torch==.*", (place / "requirements.txt").read_text(), re.MULTILINE)
    assert [line.removeprefix("-m pip install --quiet ") for line in (tmp_path / "log").read_text().splitlines()] == [
        f"--upgrade -c {place}/constraints.txt pip setuptools wheel",
        *torch,
        f"-r {place}/requirements.txt",
        f"--no-deps -r {place}/requirements-nodeps.txt",
        "--no-deps my wheel.whl",
    ]
    assert (library / "torchvision" / "utils.py").is_file() is not has_torchvision
