# SPDX-License-Identifier: Apache-2.0
"""The documentation's blocks are run, or marked with why not. The marks are in ``doc_blocks.py``."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import RUN_ELSEWHERE, read_blocks
from doc_checker import Checker, make_targets, options_of
from doc_pages import BUNDLES, NAMES, ROOT, all_blocks
from monai.bundle import ConfigParser
from packed import random_weights

from volta_components.crossval.command import _adopt
from volta_components.crossval.plan import Run

# Which test a target of make runs.
MAKE_TESTS = {"make test-label": "tests/helpers/label_server.py"}
NEEDS = {"data", "GPU", "network", "cluster", "display"}


def test_every_block_is_run_or_marked() -> None:
    """Marks are known ones, and what they say runs a block exists."""
    wrong = [f"{page}: {test} does not read it" for page, test in RUN_ELSEWHERE.items() if not _reads(test, page)]
    for block in all_blocks():
        for kind, value in block.marks.items():
            if kind == "needs" and value not in NEEDS:
                wrong.append(f"{block.where}: needs {value}?")
            if kind == "runs":
                words = value.split()
                there = words[1] in make_targets() if words[0] == "make" else _reads(words[0], block.page)
                wrong += [] if there else [f"{block.where}: {value} does not exist, or does not read the page"]
                if value in MAKE_TESTS and not _reads(MAKE_TESTS[value], block.page):
                    wrong.append(f"{block.where}: {MAKE_TESTS[value]} does not read the page")
            if kind == "file" and block.language != "json":
                wrong.append(f"{block.where}: only configs are written")
        if block.is_code and block.calls_make and not {"needs", "runs"} & block.marks.keys():
            wrong.append(f"{block.where}: make is not run from here; say what it needs or what runs it")
        if block.language not in {"bash", "python", "json", "text"}:
            wrong.append(f"{block.where}: language {block.language}")
    assert wrong == []


def _reads(test: str, page: str) -> bool:
    path = ROOT / test
    return path.is_file() and Path(page).name in path.read_text()


def test_python_and_json_can_be_read() -> None:
    for block in all_blocks():
        if block.language == "python":
            compile(block.text, block.where, "exec")
        elif block.language == "json":
            json.loads(block.text)


def test_overlays_on_the_pages_change_ids_that_exist() -> None:
    for block in all_blocks():
        if "file" not in block.marks:
            continue
        train = Path(block.marks["file"]).parent / "train.json"
        base = ConfigParser.load_config_files([str(ROOT / train)])
        overlay = json.loads(block.text)
        merged = Checker({block.marks["file"]: overlay})
        unknown = [name for name in overlay if name != "_desc_" and not merged._has([str(train)], name)]
        assert base and unknown == [], f"{block.where}: {unknown}"


def test_how_to_pages_have_something_that_runs() -> None:
    for page in ("variants", "scaling", "tracking", "sharing", "troubleshooting"):
        blocks = read_blocks((ROOT / "docs" / f"{page}.md").read_text(), page)
        assert any(block.is_run_here and block.language == "bash" for block in blocks), page


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, with small phantoms at the places that the quick start uses, and random weights."""
    folder = tmp_path_factory.mktemp("repository")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    small = "--spacing 3 --workers 1"
    # Nobody is in both: a page's pretraining must not have seen whom another page scores.
    for name, options in {"phantom_pretrain": "--seed 1 --prefix PT", "phantom": "--seed 2"}.items():
        run(f"volta3d phantom --output data/raw/{name} --subjects 10 {options} {small}", folder)
        prepare = f"volta3d prepare --layout bids --source data/raw/{name} --output data/{name}"
        run(f"{prepare} --shape 48,64,64 {small}", folder)
    (folder / "scans").mkdir()
    scan = next((folder / "data" / "raw" / "phantom").glob("sub-*/*/anat/*_T1w.nii.gz"))
    shutil.copy(scan, folder / "scans" / "sub-01_T1w.nii.gz")
    # What the quick start leaves, where it leaves it: the encoder by its own training, the rest by --adopt.
    random_weights("pretrain", folder / "bundles" / "pretrain" / "models")
    for bundle, fold in demo_adopts().items():
        trained = folder / "runs" / "demo" / bundle / "volta"
        random_weights(bundle, trained / "models")
        _adopt(Run("volta", "volta", fold, 1.0, trained, (), "", "", ""), folder / "bundles" / bundle)
    return folder


def demo_adopts() -> dict[str, int]:
    """The folds whose models become the bundles' own in the quick start, by its script."""
    found = {}
    script = (ROOT / "benchmarks" / "demo.sh").read_text().replace("\\\n", " ")
    for line in filter(lambda line: " volta3d crossval " in line, script.splitlines()):
        if "adopt" in (options := options_of(shlex.split(line))):
            found[Path(options["bundle"]).name] = int(options["adopt"])
    return found


def test_the_quick_start_leaves_models_where_the_pages_look_for_them() -> None:
    """For ``segment``, ``pack`` and ``make label``; under the name that the training's config gives them."""
    assert sorted(demo_adopts()) == [bundle for bundle in BUNDLES if bundle != "pretrain"]
    for bundle in demo_adopts():
        configs = ROOT / "bundles" / bundle / "configs"
        parser = ConfigParser()
        parser.read_config([str(configs / "train.json"), str(configs / "tiny.json")])
        assert Path(parser.get_parsed_content("model_path")).name == "model_phantom_tiny.pt"


def run(command: str, folder: Path, python: bool = False) -> str:
    """Run a block to its end; what it printed.

    Raises:
        AssertionError: if it fails.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    words = [sys.executable, "-c", command] if python else ["bash", "-euo", "pipefail", "-c", command]
    made = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, f"{command}\n{made.stdout[-3000:]}"
    return made.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_commands_run(name: str, request: pytest.FixtureRequest) -> None:
    """Block after block; those that say so are written to files first."""
    blocks = [
        block for block in read_blocks((ROOT / name).read_text(), name) if block.is_run_here or "file" in block.marks
    ]
    if not any(block.is_run_here for block in blocks):
        pytest.skip("nothing to run on this page")
    repository: Path = request.getfixturevalue("repository")
    for block in blocks:
        if "file" in block.marks:
            (repository / block.marks["file"]).write_text(block.text)
        else:
            run(block.text, repository, python=block.language == "python")


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["pretrain", "ixi_sex", "harp_hippocampus"])  # aibl_ad has the commands of ixi_sex
def test_the_commands_of_a_packed_card_run_in_its_folder(bundle: str, repository: Path) -> None:
    """As they stand, but for the names in capitals and a training's length."""
    run(f"volta3d pack --bundle bundles/{bundle} --overlays tiny --output packed", repository)
    (packed,) = (repository / "packed").glob(f"{bundle}_*.zip")
    run(f"unzip -q -o packed/{packed.name} -d unpacked", repository)
    folder = repository / "unpacked" / f"{bundle}_phantom_tiny"
    names = {"DATA": "../../data/phantom", "SCANS": "../../scans", "OUT": "predicted"}
    names["ENCODER"] = "../../bundles/pretrain/models/encoder_phantom_tiny.safetensors"
    kinds = []
    for block in read_blocks((folder / "docs" / "README.md").read_text(), "README.md"):
        if not block.text.startswith("python -m monai.bundle run"):
            continue
        text = re.sub(r"\b(DATA|SCANS|OUT|ENCODER)\b", lambda name: names[name[0]], block.text).rstrip("\n")
        kinds.append(re.findall(r"configs/(\w+)\.json", text)[-1])
        run(text + (" --epochs 1" if kinds[-1] == "train" else ""), folder)
    assert sorted(kinds) == ["evaluate", *(["inference"] if bundle != "pretrain" else []), "train"]
    assert list((folder / "retrained").glob("encoder.safetensors" if bundle == "pretrain" else "model.pt"))
