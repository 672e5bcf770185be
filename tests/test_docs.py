# SPDX-License-Identifier: Apache-2.0
"""What the documentation says exists: links, commands, options, config ids, quoted messages."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import commands_of, read_blocks
from doc_checker import Checker, checker_of, inline_commands
from doc_pages import NAMES, PAGES, ROOT, without_blocks

from volta_components.cli import COMMANDS


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
        "lies right of label 2 (right)",
        "no orientation: neither sform nor qform is set, so left and right are not known",
        "of the foreground cut at the",
        "no such MLflow store",
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
        ", not plain tensors: loading it could run code",
        ". It is refused: ",
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


def test_the_tracking_server_of_the_page_answers_at_the_pages_addresses() -> None:
    """MLflow compares a host with its port, and has no hosts of its own beside those that are given."""
    from mlflow.server.security_utils import is_allowed_host_header

    page = (ROOT / "docs" / "tracking.md").read_text()
    (given,) = re.findall(r'--allowed-hosts "([^"]+)"', page)
    asked = {*re.findall(r"--tracking_uri http://(\S+)", page), "localhost:5000"}
    assert len(asked) == 2 and all(is_allowed_host_header(given.split(","), host) for host in asked)
    assert not is_allowed_host_header(given.split(","), "evil.example.org:5000")


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
