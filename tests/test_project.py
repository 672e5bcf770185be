# SPDX-License-Identifier: Apache-2.0
"""What several files of the project repeat is the same in all of them."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from volta_components import __version__

ROOT = Path(__file__).parents[1]
METADATA = sorted(ROOT.glob("bundles/*/configs/metadata.json"))
CITATION = ROOT / "CITATION.cff"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def setup_metadata() -> configparser.SectionProxy:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["metadata"]


@pytest.mark.parametrize("path", METADATA, ids=lambda path: path.parents[1].name)
def test_a_bundle_has_the_packages_version_and_says_what_is_new(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["version"] == __version__
    assert content["required_packages_version"]["volta-components"] == __version__
    assert next(iter(content["changelog"])) == __version__


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == __version__


@pytest.mark.parametrize("page", ["README.md", "docs/sharing.md"])
def test_the_pages_download_and_install_this_version(page: str) -> None:
    text = (ROOT / page).read_text()
    versions = re.findall(r"(?:_v|/v|--version |version=\"|volta_components-)(\d+\.\d+\.\d+)", text)
    assert versions and set(versions) == {__version__}


def test_the_citation_names_this_version_and_the_paper_of_the_bundles() -> None:
    citation = read_yaml(CITATION)
    assert citation["version"] == __version__
    assert citation["license"] == setup_metadata()["license"]
    (paper,) = citation["references"]
    authors = ", ".join(
        f"{author['family-names']}, {' '.join(name[0] + '.' for name in author['given-names'].split())}"
        for author in paper["authors"]
    )
    for path in METADATA:
        assert f"{authors} {paper['title']}." in json.loads(path.read_text())["references"], path


def test_the_projects_address_is_the_same_everywhere() -> None:
    address = setup_metadata()["url"]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.*"), CITATION, ROOT / "setup.cfg"]
    found = [url for page in pages for url in re.findall(r"https?://[^/\s]+/[\w.-]+/volta-3d\b", page.read_text())]
    assert len(found) > 3 and set(found) == {address}
    assert read_yaml(CITATION)["repository-code"] == address


@pytest.mark.parametrize(
    "schema, pattern",
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-workflows", ".github/workflows/*.yml"),
    ],
)
def test_files_that_the_host_of_the_repository_reads_are_valid(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_public_ci_runs_the_projects_own_on_pythons_that_the_package_names() -> None:
    job = read_yaml(WORKFLOW)["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    versions = job["strategy"]["matrix"]["python"]
    assert versions and all(
        f"Programming Language :: Python :: {v}" in setup_metadata()["classifiers"] for v in versions
    )


def test_pre_commit_uses_the_ruff_of_the_constraints() -> None:
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    repositories = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["rev"] for repo in repositories if "ruff" in repo["repo"]] == [f"v{pinned}"]


def test_the_files_that_the_guide_for_contributors_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    roots = "bundles|docs|benchmarks|tests|tools|volta_components"
    paths = {path for path in re.findall(rf"`((?:{roots})/[^`\s]*)", text) if not re.search(r"\bNAME\b", path)}
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
