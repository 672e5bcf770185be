# SPDX-License-Identifier: Apache-2.0
"""Inits: what a fine-tuning starts from.

A bundle's ``train.json`` alone is the init ``volta``: it starts from pretrained weights. Every other init is an
overlay ``configs/NAME.json``. If the overlay sets the id ``init`` to a name that ends in ``_scratch``, nothing is
loaded. To add an init, write such an overlay; ``volta3d crossval --inits`` takes its name.
"""

from __future__ import annotations

from volta_components.errors import InputError

BASE_INIT = "volta"
SCRATCH = "_scratch"


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
