# SPDX-License-Identifier: Apache-2.0
"""``volta3d init``: the bundles that come with the package, copied to where they can be changed and trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import volta_components
from volta_components.errors import InputError
from volta_components.files import atomic_path, partial_prefix, sha256_file

# What the wheel holds of a bundle; setup.cfg has the same list. Weights that were trained here are not among it.
SHIPPED = ("LICENSE", "large_files.yml", "configs/*", "docs/*", "models/model_starter.*")
NEXT = (
    "The model cards (bundles/NAME/docs/README.md) say how to train; their commands run from {folder}.",
    "A first try, on phantoms:",
    "  volta3d phantom --subjects 24 --spacing 3 --output data/raw/phantom_pretrain",
    "  volta3d prepare --layout bids --source data/raw/phantom_pretrain --output data/phantom_pretrain"
    " --spacing 3 --shape 48,64,64",
    "  python -m monai.bundle run --config_file"
    " \"['bundles/pretrain/configs/train.json','bundles/pretrain/configs/tiny.json']\"",
)


def init(folder: Path, /) -> int:
    """Copy the bundles (configs, model cards, the starter model) into a folder, ready to train from there.

    Files that are there with the same content stay as they are. Nothing is overwritten.

    Args:
        folder: Where they go, as FOLDER/bundles/NAME; it is made if it is missing.

    Returns:
        0.

    Raises:
        InputError: if a file is there with other content, or the package came without its bundles.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give one, or a new name")
    source = shipped_bundles()
    target = folder / "bundles"
    wanted = {path: target / path.relative_to(source) for path in shipped_files(source)}
    changed = [copy for path, copy in wanted.items() if copy.exists() and not (copy.is_file() and _is_same(path, copy))]
    if changed:
        raise InputError.many(
            f"{len(changed)} files are there with other content",
            [(str(path),) for path in changed],
            "Nothing was copied. Move them away, or give another folder.",
        )
    missing = {path: copy for path, copy in wanted.items() if not copy.exists()}
    for path, copy in missing.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(copy) as temporary:
            shutil.copyfile(path, temporary)
    names = sorted({path.relative_to(source).parts[0] for path in wanted})
    print(f"{target}: {', '.join(names)}; {len(missing)} files copied, {len(wanted) - len(missing)} were there already")
    print("\n".join(NEXT).format(folder=folder))
    return 0


def shipped_bundles() -> Path:
    """The folder of the package's own bundles: within an installed package, beside it in a checkout."""
    package = Path(volta_components.__file__).parent
    for folder in (package / "bundles", package.parent / "bundles"):
        if list(folder.glob("*/configs/metadata.json")):
            return folder
    raise InputError(f"{package}: the package came without its bundles; install it again, from its wheel")


def shipped_files(bundles: Path) -> list[Path]:
    """The files of bundles that come with the package, in order."""
    found = {path for pattern in SHIPPED for path in bundles.glob(f"*/{pattern}")}
    return sorted(path for path in found if path.is_file() and not path.name.startswith((".", partial_prefix())))


def _is_same(path: Path, other: Path) -> bool:
    return path.stat().st_size == other.stat().st_size and sha256_file(path) == sha256_file(other)
