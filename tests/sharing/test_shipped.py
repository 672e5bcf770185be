# SPDX-License-Identifier: Apache-2.0
"""Bundles that come with the package; ``tests/integration/test_package.py`` does the same from a wheel."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from packed import BUNDLES, ROOT

from volta_components.errors import InputError
from volta_components.sharing.shipped import SHIPPED, init, shipped_files, shipped_root


def test_the_bundles_are_copied_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "lab") == 0
    made = {path.relative_to(tmp_path / "lab"): path for path in (tmp_path / "lab").rglob("*") if path.is_file()}
    assert {path.relative_to(ROOT) for path in shipped_files(ROOT)} == {*made}
    assert {path.parts[1] for path in made if path.parts[0] == "bundles"} == {*BUNDLES}
    label = {path.name for path in (ROOT / "label").iterdir() if path.is_file()}
    assert {path.name for path in made if path.parent == Path("label")} == label >= {"serve.py", "install.sh"}
    assert all(path.read_bytes() == (ROOT / name).read_bytes() for name, path in made.items())
    assert Path("bundles/harp_hippocampus/models/model_starter.pt") in made
    assert f"{len(made)} files copied, 0 were there already" in capsys.readouterr().out


def test_a_second_time_fills_gaps_and_leaves_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(tmp_path)
    kept, gone = (tmp_path / "bundles/pretrain/configs" / name for name in ("train.json", "tiny.json"))
    before = kept.stat()
    content = gone.read_bytes()
    gone.unlink()
    capsys.readouterr()
    init(tmp_path)
    assert "1 files copied" in capsys.readouterr().out
    assert gone.read_bytes() == content
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_a_killed_copying_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "bundles" / "pretrain" / "configs"
    folder.mkdir(parents=True)
    lines = 'import sys; from volta_components.files import partial_prefix as p; open(f"{sys.argv[1]}/{p()}x", "w")'
    subprocess.run([sys.executable, "-c", lines, str(folder)], check=True, cwd=ROOT)
    assert len([*folder.glob(".partial-*")]) == 1
    init(tmp_path)
    assert [*tmp_path.rglob(".partial-*")] == []


def test_changed_files_are_named_and_kept(tmp_path: Path) -> None:
    config = tmp_path / "bundles" / "ixi_sex" / "configs" / "train.json"
    config.parent.mkdir(parents=True)
    config.write_text("mine")
    with pytest.raises(InputError, match=r"(?s)1 files are there with other content.*train\.json.*Move them away"):
        init(tmp_path)
    assert config.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [config]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "lab").touch()
    with pytest.raises(InputError, match="lab: not a folder"):
        init(tmp_path / "lab")


def test_a_package_without_bundles_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volta_components.__file__", str(tmp_path / "volta_components" / "__init__.py"))
    with pytest.raises(InputError, match="install it again"):
        shipped_root()


def test_weights_that_were_trained_here_stay_here(tmp_path: Path) -> None:
    for name in ("configs/train.json", "models/model_starter.pt", "models/model.pt", "runs/a/result.json", "docs/.x"):
        path = tmp_path / "bundles" / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [path.relative_to(tmp_path / "bundles" / "own").as_posix() for path in shipped_files(tmp_path)]
    assert names == ["configs/train.json", "models/model_starter.pt"]


def test_the_wheel_takes_the_same_files() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for name, patterns in SHIPPED.items():
        assert tuple(config["options.package_data"][f"volta_components.{name}"].split(", ")) == patterns
