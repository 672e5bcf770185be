# SPDX-License-Identifier: Apache-2.0
"""The package as it is published: built, checked, installed from the wheel into a new environment, and used there."""

from __future__ import annotations

import ast
import configparser
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from labelled_scans import centred_affine, head, write_scan
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packed import ROOT, random_weights
from web import serving

import volta_components
from volta_components.inference.commands import segment
from volta_components.sharing.pack import pack_bundle
from volta_components.sharing.shipped import shipped_files

pytestmark = pytest.mark.slow


def run(words: list[str], folder: Path, expect: int = 0) -> str:
    """What a process prints; it starts in ``folder``, and knows nothing of this checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, built from a copy: a build leaves files behind."""
    source, output = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in ("volta_components", "bundles", "label", "tests", "docs"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "models", "runs", "eval")
        )
    models = source / "bundles" / "harp_hippocampus" / "models"
    models.mkdir()
    for path in (ROOT / "bundles" / "harp_hippocampus" / "models").glob("model_starter.*"):
        shutil.copy(path, models)
    (models / "model.pt").write_bytes(b"weights that were trained here")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output)], source)
    return output


def test_sdist_and_wheel_hold_what_belongs_to_them(built: Path) -> None:
    version = volta_components.__version__
    names = [f"volta_components-{version}-py3-none-any.whl", f"volta_components-{version}.tar.gz"]
    assert sorted(path.name for path in built.iterdir()) == names
    wheel = set(zipfile.ZipFile(built / names[0]).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "volta_components").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    shipped = {f"volta_components/{path.relative_to(ROOT).as_posix()}" for path in shipped_files(ROOT)}
    assert "volta_components/bundles/harp_hippocampus/models/model_starter.pt" in shipped
    assert "volta_components/label/serve.py" in shipped
    places = ("data/templates/qc.html", "report/templates/index.html", "sharing/templates/card.md")
    templates = {f"volta_components/{place}.jinja" for place in places}
    assert {"volta_components/py.typed", *templates} <= package
    meta = f"volta_components-{version}.dist-info"
    assert {name for name in wheel if not name.startswith(meta)} == package | shipped
    assert f"{meta}/licenses/LICENSE" in wheel
    with tarfile.open(built / names[1]) as archive:
        sdist = {Path(name).relative_to(f"volta_components-{version}").as_posix() for name in archive.getnames()}
    assert package | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg", "setup.py"} <= sdist
    assert "bundles/pretrain/configs/train.json" in sdist and not [name for name in sdist if name.endswith("/model.pt")]


def test_twine_finds_nothing(built: Path) -> None:
    files = [str(path) for path in sorted(built.iterdir())]
    assert run([sys.executable, "-m", "twine", "check", "--strict", *files], built).count("PASSED") == 2


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment with the wheel; what it depends on is this environment's, by a path file.

    A path file's folder is searched, but path files in it are not read: this checkout's own installation stays out.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", str(wheel)], folder)
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pathlib, pkgutil, volta_components as v\n"
        "names = [m.name for m in pkgutil.walk_packages(v.__path__, 'volta_components.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(len(names), pathlib.Path(v.__file__).parent)"
    )
    count, place = run([str(installed / "python"), "-c", code], tmp_path).split()
    assert Path(place).is_relative_to(installed.parent)
    modules = [
        path for path in (ROOT / "volta_components").rglob("*.py") if path != ROOT / "volta_components/__init__.py"
    ]
    assert int(count) == len(modules)
    code = "import volta_components; print(volta_components.__version__)"
    assert run([str(installed / "python"), "-W", "error", "-c", code], tmp_path).strip() == volta_components.__version__


def test_the_command_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    usage = run([str(installed / "volta3d"), "--help"], tmp_path)
    assert "segment" in usage and "embed" in usage
    help_ = run([str(installed / "volta3d"), "segment", "--help"], tmp_path)
    assert "--source PATH" in help_ and "hippocampi" in help_
    run([str(installed / "volta3d"), "segment", "--source", "nothing.nii", "--output", "out"], tmp_path, expect=2)
    assert list(tmp_path.iterdir()) == []


def test_who_has_only_the_wheel_can_train(installed: Path, tmp_path: Path) -> None:
    """The commands that ``volta3d init`` prints, with fewer heads and epochs."""
    said = run([str(installed / "volta3d"), "init", "lab"], tmp_path)
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  ")]
    assert [words[0] for words in commands[:3]] == ["volta3d", "volta3d", "python"]
    fewer = [["--subjects", "6"], [], ["--epochs", "1", "--num_local", "1"]]
    commands[0] = commands[0][:2] + commands[0][4:]
    for words, more in zip(commands[:3], fewer, strict=True):
        run([str(installed / words[0]), *words[1:], *more], tmp_path / "lab")
    assert (tmp_path / "lab/bundles/pretrain/models/encoder_phantom_tiny.safetensors").is_file()


def imported(path: Path) -> dict[str, bool]:
    """Top names of the modules that a file imports, and whether each is asked for whenever the file is read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {
        node for block in ast.walk(tree) if isinstance(block, ast.FunctionDef | ast.Try) for node in ast.walk(block)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            found[top] = found.get(top, False) or node not in within
    return found


def declared(requirements: Iterable[str]) -> set[str]:
    """Names of distributions in a list of requirements, and of those that the named extras stand for."""
    found: set[str] = set()
    for requirement in map(Requirement, requirements):
        found.add(canonicalize_name(requirement.name))
        for inner in map(Requirement, metadata.requires(requirement.name) or [] if requirement.extras else []):
            if inner.marker and any(inner.marker.evaluate({"extra": extra}) for extra in requirement.extras):
                found.add(canonicalize_name(inner.name))
    return found


def test_everything_that_is_imported_is_declared() -> None:
    """The environment above borrows its packages: what it proves is that code is complete, not its dependencies."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = declared(config["options"]["install_requires"].split())
    optional = declared(" ".join(config["options.extras_require"].values()).split())
    owners = metadata.packages_distributions()
    wrong = []
    for path in sorted((ROOT / "volta_components").rglob("*.py")):
        for name, always in imported(path).items():
            if name in sys.stdlib_module_names or name == "volta_components":
                continue
            names = {canonicalize_name(owner) for owner in owners.get(name, [name])}
            if not names & (needed if always else needed | optional):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []
    # What the walk is about: it sees the ones that only this package asks for.
    seen = {name for path in (ROOT / "volta_components").rglob("*.py") for name in imported(path)}
    assert {"torch", "monai", "safetensors", "sklearn", "ignite", "nibabel", "scipy", "submitit"} <= seen


def test_a_downloaded_bundle_gives_the_repositorys_output_bit_for_bit(installed: Path, tmp_path: Path) -> None:
    """Downloaded from a web server, in an empty folder of the new environment, by its own commands."""
    weights = random_weights("harp_hippocampus", tmp_path / "weights")
    packed = pack_bundle(ROOT / "bundles" / "harp_hippocampus", tmp_path / "site", ["tiny"], model=weights)
    name = packed.path.name.split("_v")[0]
    shape = (36, 44, 30)
    scan = write_scan(tmp_path / "scans", "sub-x", *head(shape, affine := centred_affine(shape)), affine)["image"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with serving(tmp_path / "site") as address:
        words = ["--name", name, "--url", f"{address}/{packed.path.name}", "--bundle_dir", "."]
        run([str(installed / "python"), "-m", "monai.bundle", "download", *words], empty)
    assert (empty / f"{name}.zip").read_bytes() == packed.path.read_bytes()
    words = ["segment", "--source", scan, "--output", "out", "--bundle", name, "--device", "cpu"]
    run([str(installed / "volta3d"), *words], empty)

    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "bundles" / "harp_hippocampus" / "configs", repository / "configs")
    (repository / "models").mkdir()
    for path in weights.parent.iterdir():
        shutil.copy(path, repository / "models")
    ours = tmp_path / "ours"
    assert segment([scan], ours, bundle=repository, overlays=["tiny"], device="cpu") == 0
    names = sorted(path.name for path in ours.iterdir() if path.suffix != ".jsonl")  # a journal has paths in it
    assert names == ["sub-x_T1w_hippocampus.nii.gz", "volumes.csv"]
    for name in names:
        assert (empty / "out" / name).read_bytes() == (ours / name).read_bytes()
