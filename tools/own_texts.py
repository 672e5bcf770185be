# SPDX-License-Identifier: Apache-2.0
"""Collect what the project's bundles run: ``python -m tools.own_texts [--check]``.

Writes ``volta_components/own_texts.json``, with which ``volta_components.inference.trust`` compares bundles that were
downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from volta_components.inference.trust import LOGGING, OWN_TEXTS, runnable_texts
from volta_components.sharing.pack import PACKED

ROOT = Path(__file__).parents[1]


def own_texts() -> dict[str, list[str]]:
    """Texts that the configs run, by id, and the lines of the logging configurations."""
    found: dict[str, set[str]] = {}
    for place, text in runnable_texts(PACKED):
        found.setdefault(place, set()).add(text)
    for path in sorted(ROOT.glob("bundles/*/configs/*")):
        if path.suffix == ".json":
            for place, text in runnable_texts(json.loads(path.read_text(encoding="utf-8"))):
                found.setdefault(place, set()).add(text)
        elif path.name == LOGGING:
            lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
            found.setdefault(LOGGING, set()).update(filter(None, lines))
    return {place: sorted(texts) for place, texts in sorted(found.items())}


def main(arguments: list[str]) -> int:
    """Write the file, or with ``--check`` say whether it is up to date."""
    path = ROOT / "volta_components" / OWN_TEXTS
    text = json.dumps(own_texts(), indent=1, ensure_ascii=False) + "\n"
    if "--check" not in arguments:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return 0
    print(f"{path}: not what the bundles have; run python -m tools.own_texts", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
