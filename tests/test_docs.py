# SPDX-License-Identifier: Apache-2.0
"""What the documentation says exists and works: links, commands, options, config ids, and blocks that are run.

The marks that blocks can have are in ``doc_blocks.py``.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import RUN_ELSEWHERE, Block, commands_of, read_blocks
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from packed import random_weights

from volta_components.cli import COMMANDS, read
from volta_components.crossval.command import _adopt
from volta_components.crossval.plan import Run
from volta_components.errors import InputError

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("bundles/*/docs/README.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Which test a target of make runs.
MAKE_TESTS = {"make test-label": "tests/integration/test_monai_label.py"}
NEEDS = {"data", "GPU", "network", "cluster", "display"}
BUNDLES = sorted(path.parents[1].name for path in ROOT.glob("bundles/*/configs/train.json"))


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def all_blocks() -> list[Block]:
    return [block for page, name in zip(PAGES, NAMES, strict=True) for block in read_blocks(page.read_text(), name)]


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def broken_links(page: Path) -> list[str]:
    text = without_blocks(page.read_text())
    links = re.findall(r"\[[^]]*\]\(([^)\s]+)[^)]*\)", re.sub(r"`[^`]*`", "", text)) + re.findall(
        r'src="([^"]+)"', text
    )
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One & two\n[x](b.md) [y](#one--two) [z](#three) ![p](p.svg) [w](https://e.org)\n")
    assert broken_links(tmp_path / "a.md") == ["b.md", "#three", "p.svg"]


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    for path in ROOT.glob("docs/**/*.md"):
        if path != ROOT / "docs" / "README.md":
            assert f"({path.relative_to(ROOT / 'docs')})" in text, path


# --- commands --------------------------------------------------------------------------------------------------------


def options_of(words: list[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value``; the value is empty where another option follows."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            after = words[place + 1] if place + 1 < len(words) else ""
            found[name] = value if sign else "" if after.startswith("--") else after
    return found


# For options that running text leaves out.
PLACEHOLDERS = {"--layout": "bids", "--subjects": "1", "--bundle": "NONE"}


class Checker:
    """Checks the commands of a page; ``files`` are those that the page tells its reader to write."""

    def __init__(self, files: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.files = dict(files or {})

    def faults(self, words: list[str], whole: bool = False) -> list[str]:
        """What is wrong with a command; ``whole`` where nothing is left out of it."""
        if words[0] == "volta3d":
            return self._volta3d(words[1:], whole)
        if words[:3] == ["python", "-m", "monai.bundle"]:
            return self._bundle(words[3:])
        if words[0] == "torchrun":
            return self._torchrun(words[1:])
        if words[0] == "make":
            return [f"make: no target {word}" for word in words[1:] if word not in make_targets() and "=" not in word]
        if words[0] == "mlflow":
            return self._mlflow(words[1:])
        if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            return [] if (ROOT / words[1]).is_file() else [f"no file {words[1]}"]
        return []

    def _volta3d(self, words: list[str], whole: bool) -> list[str]:
        # What may be left out stands in brackets.
        words = [re.sub(r"^\[(?=--)|(?<=[a-z])\]$", "", word) for word in words]
        try:
            call = read(words)
        except InputError as error:
            if not whole and str(error) == f"--{words[-1].lstrip('-')} needs a value":
                return self._volta3d(words[:-1], whole)
            absent, says_so, _ = str(error).partition(" missing; ")
            if whole or not says_so:
                return [f"volta3d: {error}"]
            filled = [f"{option}={PLACEHOLDERS.get(option, 'x')}" for option in re.findall("--[a-z-]+", absent)]
            return self._volta3d([*words, *filled], whole=True)
        options = getattr(call, "keywords", {})
        return self._crossval(options) if words[:1] == ["crossval"] else []

    def _crossval(self, options: Mapping[str, Any]) -> list[str]:
        bundle = str(options["bundle"])
        if bundle == PLACEHOLDERS["--bundle"]:
            return []
        names = [*(name for name in options.get("inits", []) if name != "volta"), *options.get("overlays", [])]
        files = [f"{bundle}/configs/{name}.json" for name in ("train", *names)]
        found = [f"no config {file}" for file in files if self._config(file) is None]
        return found or [f"no id {name} in {bundle}" for name in options.get("set", {}) if not self._has(files, name)]

    def _bundle(self, words: list[str]) -> list[str]:
        import monai.bundle.__main__ as entry

        if not words or words[0].startswith("-"):
            return []
        function = getattr(entry, words[0], None)
        if not inspect.isfunction(function):
            return [f"monai.bundle has no command {words[0]}"]
        options = options_of(words[1:])
        parameters = inspect.signature(function).parameters
        rest = [name for name in options if name not in parameters and name != "help"]
        if "override" not in parameters:
            return [f"monai.bundle {words[0]} has no --{name}" for name in rest]
        given = options.get("config_file", "")
        files = ast.literal_eval(given) if given.startswith("[") else [given]
        found = [f"no config {file}" for file in files if file and self._config(file) is None]
        tracked = DEFAULT_MLFLOW_SETTINGS["configs"] if "tracking" in options else {}
        if options.get("tracking", "mlflow") not in {"mlflow", ""} and self._config(options["tracking"]) is None:
            found.append(f"no config {options['tracking']}")
        return found or [
            f"no id {name} in {files}" for name in rest if name not in tracked and not self._has(files, name)
        ]

    def _torchrun(self, words: list[str]) -> list[str]:
        from torch.distributed.run import get_args_parser

        module = words.index("-m")
        known = {option for action in get_args_parser()._actions for option in action.option_strings}
        found = [f"torchrun has no --{name}" for name in options_of(words[:module]) if f"--{name}" not in known]
        return found + self.faults(["python", *words[module:]])

    def _mlflow(self, words: list[str]) -> list[str]:
        import click
        from mlflow.cli import cli

        command = cli.get_command(click.Context(cli), words[0])
        if command is None:
            return [f"mlflow has no command {words[0]}"]
        known = {option for parameter in command.params for option in parameter.opts}
        return [f"mlflow {words[0]} has no --{name}" for name in options_of(words[1:]) if f"--{name}" not in known]

    def _config(self, file: str) -> dict[str, Any] | None:
        if file in self.files:
            return self.files[file]
        # From within a downloaded bundle, which has the same configs as the repository's; NAME stands for any.
        paths = [ROOT / file, *(ROOT / "bundles" / name / file for name in BUNDLES)]
        paths += [ROOT / file.replace("NAME", name) for name in BUNDLES if "NAME" in file]
        path = next((path for path in paths if path.is_file()), None)
        return None if path is None else json.loads(path.read_text())

    def _has(self, files: list[str], name: str) -> bool:
        """Whether the merged configuration has an id; a path's entries count where an id is set by path."""
        merged: dict[str, Any] = {}
        for file in files:
            merged |= self._config(file) or {}
        place: Any = merged
        for part in re.split("#|::", name):
            try:
                place = place[int(part) if isinstance(place, list) else part]
            except (LookupError, TypeError, ValueError):
                return name in merged
        return True


@functools.cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def inline_commands(text: str) -> list[str]:
    """Commands in the running text, between single backticks; an ellipsis stands for what is left out."""
    spans = re.findall(r"`([^`]+)`", without_blocks(text))
    joined = [re.sub(r"\s+", " ", span).replace("...", " ") for span in spans]
    starts = ("volta3d ", "python -m monai.bundle ", "torchrun ", "make ", "mlflow ")
    return [span for span in joined if span.startswith(starts) and "COMMAND" not in span]


def checker_of(page: str) -> Checker:
    blocks = read_blocks((ROOT / page).read_text(), page)
    return Checker({block.marks["file"]: json.loads(block.text) for block in blocks if "file" in block.marks})


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_right(name: str) -> None:
    checker = checker_of(name)
    text = (ROOT / name).read_text()
    found = []
    for block in read_blocks(text, name):
        if block.language == "bash":
            commands = commands_of(block.text)
            found += [f"{block.where}: {fault}" for words in commands for fault in checker.faults(words, whole=True)]
    for span in inline_commands(text):
        found += [f"{name}: `{span}`: {fault}" for words in commands_of(span) for fault in checker.faults(words)]
    assert found == []


TRAIN = "bundles/pretrain/configs/train.json"


@pytest.mark.parametrize(
    "command, fault",
    [
        ("volta3d prepair --source x", "volta3d: no command 'prepair'; did you mean prepare?"),
        ("volta3d prepare --sauce x", "volta3d: no option --sauce; did you mean --source?"),
        ("volta3d prepare --layout nifti", "volta3d: --layout nifti: choose one of bids"),
        ("volta3d crossval --folds some", "volta3d: --folds some: give a whole number"),
        (
            "volta3d crossval --bundle bundles/ixi_sex --inits volta,unet_scratch",
            "no config bundles/ixi_sex/configs/unet",
        ),
        ("volta3d crossval --bundle bundles/ixi_sex --set 'epoch=2'", "no id epoch in"),
        ("python -m monai.bundle run --config_file bundles/pretrain/configs/trian.json", "no config"),
        (f"python -m monai.bundle run --config_file {TRAIN} --batchsize 2", "no id batchsize"),
        (f"python -m monai.bundle run --config_file {TRAIN} --views#mask#cells 2", "no id views#mask#cells"),
        (f"python -m monai.bundle run --config_file {TRAIN} --tracking_uri http://x", "no id tracking_uri"),
        ("python -m monai.bundle push_to_hf_hub --repo x", "monai.bundle has no command push_to_hf_hub"),
        ("python -m monai.bundle download --repos x", "monai.bundle download has no --repos"),
        (f"srun torchrun --nproc 2 -m monai.bundle run --config_file {TRAIN}", "torchrun has no --nproc"),
        (f"X=1 torchrun --nnodes 2 -m monai.bundle run --config_file {TRAIN} --sed 1", "no id sed"),
        ("cd x && make demos", "make: no target demos"),
        ("mlflow ui --store x", "mlflow ui has no --store"),
    ],
)
def test_wrong_commands_are_found(command: str, fault: str) -> None:
    (found,) = [fault for words in commands_of(command) for fault in Checker().faults(words)]
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "command",
    [
        f"python -m monai.bundle run --config_file {TRAIN} --views#mask#cell 2 --tracking mlflow --tracking_uri http://x",
        "volta3d crossval --bundle bundles/ixi_sex --set 'epochs=2,image_size=[96,96,96]' --overlays tiny --dry-run",
    ],
)
def test_right_commands_are_taken(command: str) -> None:
    assert [fault for words in commands_of(command) for fault in Checker().faults(words)] == []


# --- blocks ----------------------------------------------------------------------------------------------------------


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


def test_each_new_page_has_something_that_runs() -> None:
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


# --- facts -----------------------------------------------------------------------------------------------------------

# Messages that the pages quote, up to what differs from case to case.
MESSAGES = {
    "troubleshooting": [
        "is it an encoder of this project, and the prefix right ('vit.' for UNETR)?",
        "weights of another size (name, file, network)",
        "holds weights of another network",
        "it was changed or cut: fetch it again",
        "not a file of plain weights",
        "branch: the teacher's output is uniform",
        "every volume has the same",
        "is expected; prepare it with --",
        "a worker was killed, most likely because memory ran out; use fewer --workers",
        "left and right are swapped",
        "no orientation: neither sform nor qform is set, so left and right are not known",
        "of the foreground cut at the",
        "no such MLflow store; run volta3d crossval first",
        "belongs to a run with other settings (name, there, here)",
        "is of a finished run with other settings",
        "holds a data set prepared with",
        "another process works on it",
        "scored patients",
        "the scored fold has no scan labelled",
        "is too small",
    ],
    "sharing": [
        "it was changed or cut: fetch it again",
        "damaged, or loading it could run code, so it is refused.",
    ],
}


@pytest.mark.parametrize("page", MESSAGES)
def test_quoted_messages_are_the_projects_own(page: str) -> None:
    source = "\n".join(path.read_text() for path in sorted((ROOT / "volta_components").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    text = re.sub(r"\s+", " ", (ROOT / "docs" / f"{page}.md").read_text())
    for message in MESSAGES[page]:
        assert message in text, f"the page no longer quotes: {message}"
        assert message in source, f"nothing says: {message}"


def test_the_index_of_equations_names_what_exists() -> None:
    """Every class and config id in the table of docs/method.md."""
    train = json.loads((ROOT / TRAIN).read_text())
    text = (ROOT / "docs" / "method.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    start = rows.index(["paper", "code", "config ids"])
    checked = 0
    for row in rows[start + 2 :]:
        if len(row) != 3 or not row[1].startswith("`"):
            break
        _, code, ids = row
        for name in re.findall(r"`([^`]+)`", code):
            wing, module, *parts = name.split(".")
            found: Any = importlib.import_module(f"volta_components.{wing}.{module}")
            for part in parts:
                found = getattr(found, part)
            assert callable(found), name
            checked += 1
        for name in re.findall(r"`([^`]+)`", ids):
            there = Checker()._has([TRAIN], name) or fnmatch.filter(train, name)
            assert there, f"{name}: no such id in {TRAIN}"
            checked += 1
    assert checked > 40, "the table was not read"


def test_config_ids_in_the_running_text_exist() -> None:
    """Options such as ``--num_local 4`` that pages name without a command."""
    known = {name for path in ROOT.glob("bundles/*/configs/*.json") for name in json.loads(path.read_text())}
    for module, function in (target.split(":") for target, _ in COMMANDS.values()):
        known |= set(inspect.signature(getattr(importlib.import_module(module), function)).parameters)
    import monai.bundle.__main__ as entry

    for name in ("run", "download", "download_large_files"):
        known |= set(inspect.signature(getattr(entry, name)).parameters)
    known |= {"help", "standalone", "nproc_per_node", "tracking_uri", "shm_size", "ipc", "check", "label", "signal"}
    for page in ("variants", "scaling", "tracking", "sharing", "troubleshooting"):
        text = without_blocks((ROOT / "docs" / f"{page}.md").read_text())
        for option in re.findall(r"`[^`]*?--([A-Za-z][\w-]*)", text):
            assert option.replace("-", "_") in known, f"docs/{page}.md: --{option}"
