# SPDX-License-Identifier: Apache-2.0
"""``volta3d init``: the bundles and the label server that come with the package, copied to where they can be used."""

from __future__ import annotations

import filecmp
from pathlib import Path

import volta_components
from volta_components.errors import InputError
from volta_components.files import copy_file, partial_prefix, remove_partials

# What the wheel holds, by folder; setup.cfg has the same list. Weights that were trained here are not among it.
SHIPPED = {
    "bundles": ("*/LICENSE", "*/large_files.yml", "*/configs/*", "*/docs/*", "*/models/model_starter.*"),
    "label": ("*.py", "*.txt", "*.sh", "standin/*/*.py"),
}
NEXT = (
    "The model cards (bundles/NAME/docs/README.md) say how to train; their commands run from {folder}.",
    "A first try, on phantoms:",
    "  volta3d phantom --subjects 24 --spacing 3 --output data/raw/phantom_pretrain",
    "  volta3d prepare --layout bids --source data/raw/phantom_pretrain --output data/phantom_pretrain"
    " --spacing 3 --shape 48,64,64",
    "  python -m monai.bundle run --config_file"
    " \"['bundles/pretrain/configs/train.json','bundles/pretrain/configs/tiny.json']\"",
    "A MONAI Label server, in an environment of its own; WHEEL is the file that this package was installed from:",
    "  python -m venv .venv-label",
    "  bash label/install.sh .venv-label/bin/python WHEEL",
    "  .venv-label/bin/python label/serve.py --studies SCANS",
)


def init(folder: Path, /) -> int:
    """Copy the bundles (configs, model cards, the starter model) and the label server into a folder, ready to use.

    Files that are there with the same content stay as they are. Nothing is overwritten.

    Args:
        folder: Where they go, as FOLDER/bundles/NAME and FOLDER/label; it is made if it is missing.

    Returns:
        0.

    Raises:
        InputError: if a file is there with other content, or the package came without its bundles.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give one, or a new name")
    source = shipped_root()
    wanted = {path: folder / path.relative_to(source) for path in shipped_files(source)}
    changed = [copy for path, copy in wanted.items() if copy.exists() and not filecmp.cmp(path, copy, shallow=False)]
    if changed:
        raise InputError.many(
            f"{len(changed)} files are there with other content",
            [(str(path),) for path in changed],
            "Nothing was copied. Move them away, or give another folder.",
        )
    missing = {path: copy for path, copy in wanted.items() if not copy.exists()}
    remove_partials(*{copy.parent for copy in wanted.values()})  # of a copying that was killed
    for path, copy in missing.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, copy)
    names = sorted({path.parent.name for path in (source / "bundles").glob("*/LICENSE")})
    counts = f"{len(missing)} files copied, {len(wanted) - len(missing)} were there already"
    print(f"{folder}: bundles {', '.join(names)}, and label; {counts}")
    print("\n".join(NEXT).format(folder=folder))
    return 0


def shipped_root() -> Path:
    """The folder that holds the package's own ``bundles`` and ``label``: the installed package, or its checkout."""
    package = Path(volta_components.__file__).parent
    for folder in (package, package.parent):
        if list(folder.glob("bundles/*/configs/metadata.json")):
            return folder
    raise InputError(f"{package}: the package came without its bundles; install it again, from its wheel")


def shipped_files(root: Path) -> list[Path]:
    """The files below ``root`` that come with the package, in order."""
    places = (f"{name}/{pattern}" for name, patterns in SHIPPED.items() for pattern in patterns)
    found = {path for place in places for path in root.glob(place)}
    return sorted(path for path in found if path.is_file() and not path.name.startswith((".", partial_prefix())))
