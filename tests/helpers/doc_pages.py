# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from doc_blocks import Block, read_blocks

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("bundles/*/docs/README.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


BUNDLES = sorted(path.parents[1].name for path in ROOT.glob("bundles/*/configs/train.json"))


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def all_blocks() -> list[Block]:
    return [block for page, name in zip(PAGES, NAMES, strict=True) for block in read_blocks(page.read_text(), name)]
