# SPDX-License-Identifier: Apache-2.0
"""What several files of the project repeat is the same in all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from volta_components import __version__

ROOT = Path(__file__).parents[1]
METADATA = sorted(ROOT.glob("bundles/*/configs/metadata.json"))


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
