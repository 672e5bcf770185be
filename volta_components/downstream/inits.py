# SPDX-License-Identifier: Apache-2.0
"""Inits: what a fine-tuning starts from.

A bundle's ``train.json`` alone is the init ``volta``: it starts from pretrained weights. Every other init is an
overlay ``configs/NAME.json``. If the overlay sets the id ``init`` to a name that ends in ``_scratch``, nothing is
loaded. To add an init, write such an overlay; ``volta3d crossval --inits`` takes its name.
"""

from __future__ import annotations

from pathlib import Path

from volta_components.errors import InputError

BASE_INIT = "volta"
SCRATCH = "_scratch"
NO_OVERLAYS = {"train", "inference", "metadata"}


def is_pretrained(init: str) -> bool:
    """Whether an init starts from pretrained weights.

    Raises:
        InputError: if it is neither ``volta`` nor ends in ``_scratch``.
    """
    if init == BASE_INIT:
        return True
    if init.endswith(SCRATCH):
        return False
    raise InputError(f"init {init!r}: choose {BASE_INIT!r}, or one that ends in {SCRATCH!r} through its overlay")


def find_overlay(configs: Path, name: str) -> Path:
    """The file of an overlay, absolute: a name in the folder ``configs``, with or without ``.json``, or a path.

    Raises:
        InputError: if there is none, naming those that there are.
    """
    file = name if name.endswith(".json") else f"{name}.json"
    for path in (configs / file, Path(file)):
        if path.is_file():
            return path.resolve()
    known = sorted(path.stem for path in configs.glob("*.json") if path.stem not in NO_OVERLAYS)
    raise InputError(f"{configs / file}: no such overlay; this bundle has {', '.join(known) or 'none'}, or give a path")
