# SPDX-License-Identifier: Apache-2.0
"""A downloaded bundle runs nothing of its own before its user says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from packed import ROOT

from tools.own_texts import main as own_texts
from volta_components.cli import main
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.inference.trust import check_trust, foreign_code, is_own

BUNDLES = ("pretrain", "ixi_sex", "aibl_ad", "harp_hippocampus")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The hippocampus bundle as somebody else may have changed it."""
    return Path(shutil.copytree(ROOT / "bundles" / "harp_hippocampus", tmp_path / "downloaded"))


def changed(bundle: Path, name: str, **values: Any) -> None:
    path = bundle / "configs" / name
    write_json(path, (read_json(path) if path.is_file() else {}) | values)


def test_the_list_is_that_of_the_bundles() -> None:
    assert own_texts(["--check"]) == 0


@pytest.mark.parametrize("name", BUNDLES)
def test_own_bundles_ask_nothing(name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ROOT / "bundles" / name, tmp_path / name))
    assert foreign_code(copy) == [] and is_own(ROOT / "bundles" / name) and not is_own(copy)
    # Plain values may differ, and what an overlay sets may stand in the config itself.
    changed(copy, "train.json", **read_json(copy / "configs" / "tiny.json"), note="plain")
    check_trust(copy)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("inference.json", {"run": ["$__import__('os').system('x')"]}, "run  $__import__"),
        (
            "inference.json",
            {"network_def": {"_target_": "os.system", "command": "x"}},
            "network_def#_target_  os.system",
        ),
        (
            "inference.json",
            {"preprocessing#transforms#0": {"_target_": "x.Y"}},
            "preprocessing#transforms#_target_  x.Y",
        ),
        ("inference.json", {"preprocessing::transforms::0::_target_": "x.Y"}, "preprocessing#transforms#_target_  x.Y"),
        ("inference.json", {"imports": ["$import scripts"]}, "imports  $import scripts"),
        ("inference.json", {"_desc_": "$print()"}, "_desc_  $print()"),
        # Known, but not in this place.
        ("inference.json", {"source": "$@evaluator.run()"}, "source  $@evaluator.run()"),
        ("inference.json", {"source": "%/elsewhere.json#run"}, "source  %/elsewhere.json#run"),
        ("metadata.json", {"version": "$1"}, "version  $1"),
        ("overlay.json", {"+initialize": "$2"}, "+initialize  $2"),
        ("train.json", {"train#trainer": {"_target_": "a.b", "_mode_": "callable"}}, "train#trainer#_target_  a.b"),
    ],
)
def test_what_a_config_could_run_is_listed(bundle: Path, file: str, values: dict[str, Any], said: str) -> None:
    changed(bundle, file, **values)
    with pytest.raises(InputError) as caught:
        check_trust(bundle)
    assert f"  configs/{file}  {said}" in str(caught.value) and "--trust" in str(caught.value)
    check_trust(bundle, trust=True)


@pytest.mark.parametrize("name", ["scripts/__init__.py", "models/x.pkl", "configs/inference.yaml", "lib.so"])
def test_files_that_run_are_listed(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    assert [row[0] for row in foreign_code(bundle)] == [name]


def test_the_logging_configuration_is_evaluated_by_python(bundle: Path) -> None:
    path = bundle / "configs" / "logging.conf"
    path.write_text(path.read_text().replace("args=(sys.stdout,)", "args=(__import__('os'),)"))
    assert [row[2] for row in foreign_code(bundle)] == ["args=(__import__('os'),)"]


@pytest.mark.parametrize("command", ["segment", "pack", "inspect"])
def test_commands_run_nothing_before_they_ask(
    bundle: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    code = f"$__import__('os').mkdir({str(mark)!r})"
    for name in ("inference.json", "starter.json"):
        changed(bundle, name, imports=[code], bundle_root=code, device=code, model_path=code)
    words = [command, "--bundle", str(bundle)]
    words += [] if command == "inspect" else ["--output", str(tmp_path / "out")]
    words += ["--source", str(tmp_path)] if command == "segment" else []
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "imports" in error and "mkdir" in error and not mark.exists()
    if command == "segment":  # it is what would have run
        assert main([*words, "--trust"]) == 2 or mark.exists()


def test_embed_asks_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(ROOT / "bundles" / "pretrain", tmp_path / "downloaded"))
    changed(copy, "inference.json", network_def={"_target_": "os.system"})
    assert main(["embed", "--bundle", str(copy), "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "os.system" in capsys.readouterr().err
    assert main(["inspect", "--bundle", str(ROOT / "bundles" / "pretrain")]) == 0
