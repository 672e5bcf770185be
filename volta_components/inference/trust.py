# SPDX-License-Identifier: Apache-2.0
"""What in a bundle could run code that is not this project's own.

A bundle is a program: MONAI runs the ``$`` expressions of its configs and calls what ``_target_`` names. So a bundle
that was downloaded is compared, as text, with the project's own bundles before anything of it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import volta_components
from volta_components.errors import InputError
from volta_components.files import read_json

# Made by tools/own_texts.py from the bundles of the repository.
OWN_TEXTS = "own_texts.json"
LOGGING = "logging.conf"
# Files that Python, a shell or a pickle reader would run, and configs that MONAI reads besides JSON.
RUNS = (
    *(".py", ".pyc", ".pyd", ".pyx", ".so", ".dll", ".dylib", ".pth", ".sh", ".bat", ".ipynb"),
    *(".pkl", ".pickle", ".joblib", ".npy", ".ts", ".jit"),
)
YAML = (".yaml", ".yml")
Row = tuple[str, str, str]


def runnable_texts(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Texts of a config that MONAI runs, calls, or takes from another file.

    Args:
        content: what JSON holds.
        place: id of the content.

    Yields:
        Id, as MONAI writes it but without places in lists, and text.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            parts = [part for part in str(key).replace("::", "#").split("#") if not part.isdecimal()]
            yield from runnable_texts(value, "#".join([*filter(None, [place]), *parts]))
    elif isinstance(content, list):
        for value in content:
            yield from runnable_texts(value, place)
    elif isinstance(content, str) and (content.startswith(("$", "%")) or place.rsplit("#", 1)[-1] == "_target_"):
        yield place, content


@cache
def _own_texts() -> dict[str, list[str]]:
    text = files(volta_components).joinpath(OWN_TEXTS).read_text(encoding="utf-8")
    content: dict[str, list[str]] = json.loads(text)
    return content


def foreign_code(root: Path) -> list[Row]:
    """What in a bundle's folder could run code, and is in none of the project's own bundles.

    Nothing is parsed but JSON. Values that are neither expressions nor names of functions may differ.

    Args:
        root: the bundle's folder.

    Returns:
        File, id and text of each; files that run as a whole have no id.
    """
    known, rows = _own_texts(), []
    configs = root / "configs"
    for path in sorted(path for path in root.rglob("*") if path.is_file() or path.is_symlink()):
        name = str(path.relative_to(root))
        if path.suffix.lower() in RUNS or (path.suffix.lower() in YAML and path.parent == configs):
            rows.append((name, "", "would be run, or read as a config"))
        elif path.suffix == ".json" and path.is_relative_to(configs) and not path.name.startswith("."):
            rows += [
                (name, place, text)
                for place, text in runnable_texts(read_json(path))
                if text not in known.get(place, ())
            ]
        elif path.name == LOGGING:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            rows += [(name, "", line) for line in lines if line.strip() and line.strip() not in known[LOGGING]]
    return rows


def is_own(root: Path) -> bool:
    """Whether a bundle's folder is one of the repository that the package itself runs from."""
    return root.resolve().is_relative_to(Path(volta_components.__file__).resolve().parents[1] / "bundles")


def check_trust(root: Path, trust: bool = False) -> None:
    """Refuse a bundle that could run code which is not the project's own.

    Args:
        root: the bundle's folder.
        trust: take it all the same.

    Raises:
        InputError: listing what it could run.
    """
    if trust or is_own(root):
        return
    if rows := foreign_code(root):
        raise InputError.many(
            f"{root}: a bundle is a program, and {len(rows)} parts of it are in none of VolTA-3D's own bundles",
            [(file, place, text if len(text) <= 160 else f"{text[:157]}...") for file, place, text in rows],
            "Read them. If you trust whoever made the bundle, add --trust: then they run with all of your rights.",
        )


def inspect(bundle: Path | str) -> int:
    """List what in a bundle could run code that is not the project's own. Nothing of the bundle is run.

    Use it after a download (python -m monai.bundle download), before MONAI or another program opens the bundle.

    Args:
        bundle: Folder of the bundle.

    Returns:
        0 if there is nothing.

    Raises:
        InputError: listing what it could run, or if it is no bundle.
    """
    root = Path(bundle)
    if not (root / "configs").is_dir():
        raise InputError(f"{root}: no folder configs in it; give a bundle's folder, as downloaded")
    if rows := foreign_code(root):
        raise InputError.many(
            f"{root}: {len(rows)} parts that are in none of VolTA-3D's own bundles",
            rows,
            "Read them before MONAI opens the bundle: they would run with all of your rights.",
            limit=len(rows),
        )
    print(f"{root}: every expression and function in its configs is in VolTA-3D's own bundles; values may differ")
    return 0
