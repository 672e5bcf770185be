# SPDX-License-Identifier: Apache-2.0
"""The package as it is published: built, checked, installed from the wheel into a new environment, and used there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from labelled_scans import centred_affine, head, write_scan
from packed import ROOT, random_weights

import volta_components
from volta_components.apply import segment
from volta_components.pack import pack_bundle

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
    for name in ("volta_components", "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
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
    assert {"volta_components/py.typed", "volta_components/report/templates/index.html.jinja"} <= package
    meta = f"volta_components-{version}.dist-info"
    assert {name for name in wheel if not name.startswith(meta)} == package
    assert f"{meta}/licenses/LICENSE" in wheel
    with tarfile.open(built / names[1]) as archive:
        sdist = {Path(name).relative_to(f"volta_components-{version}").as_posix() for name in archive.getnames()}
    assert package | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.cfg"} <= sdist


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
    assert "SOURCE" in help_ and "own grid" in help_
    run([str(installed / "volta3d"), "segment", "--source", "nothing.nii", "--output", "out"], tmp_path, expect=2)
    assert list(tmp_path.iterdir()) == []


def test_a_downloaded_bundle_gives_the_repositorys_output_bit_for_bit(installed: Path, tmp_path: Path) -> None:
    weights = random_weights("harp_hippocampus", tmp_path / "weights")
    packed = pack_bundle(ROOT / "bundles" / "harp_hippocampus", tmp_path / "zip", ["tiny"], model=weights)
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path / "downloaded")
    (bundle,) = (tmp_path / "downloaded").iterdir()
    shape = (36, 44, 30)
    scan = write_scan(tmp_path / "scans", "sub-x", *head(shape, affine := centred_affine(shape)), affine)["image"]
    empty = tmp_path / "empty"
    empty.mkdir()
    words = ["segment", "--source", scan, "--output", "out", "--bundle", str(bundle), "--device", "cpu"]
    run([str(installed / "volta3d"), *words], empty)

    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "bundles" / "harp_hippocampus" / "configs", repository / "configs")
    (repository / "models").mkdir()
    for path in weights.parent.iterdir():
        shutil.copy(path, repository / "models")
    ours = tmp_path / "ours"
    assert segment(scan, str(ours), bundle=str(repository), overlays="tiny", device="cpu") == 0
    names = sorted(path.name for path in ours.iterdir())
    assert names == ["sub-x_T1w_hippocampus.nii.gz", "volumes.csv"]
    for name in names:
        assert (empty / "out" / name).read_bytes() == (ours / name).read_bytes()
