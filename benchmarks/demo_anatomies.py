# SPDX-License-Identifier: Apache-2.0
"""Which anatomies of a folder the quick start pretrains on, and which it is scored on: no anatomy is both.

Prints two lines for ``volta3d phantom --leave-out``: what to leave out of the heads to pretrain on, and of those to be
scored on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from volta_components.data.phantom.labels import find_label_maps
from volta_components.errors import InputError

# Two for each of the five folds: with fewer, a training on 40 % of the others could have nobody for inner validation.
SCORED = 10
PRETRAINED = 5  # one for each fold


def leave_out(folder: Path) -> tuple[list[str], list[str]]:
    """Names to leave out of the heads to pretrain on, and of those to be scored on; the latter are evenly spread.

    Raises:
        InputError: if there is no such folder, or it holds too few label maps.
    """
    names = list(find_label_maps(folder))
    if len(names) < SCORED + PRETRAINED:
        raise InputError(
            f"--anatomies {folder}: holds {len(names)} label maps, and the quick start needs {SCORED + PRETRAINED}: "
            f"{SCORED} to be scored on, and {PRETRAINED} others to pretrain on. volta3d fetch anatomies --output DIR "
            "downloads 20"
        )
    scored = [names[number * len(names) // SCORED] for number in range(SCORED)]
    return scored, [name for name in names if name not in scored]


if __name__ == "__main__":
    try:
        for left_out in leave_out(Path(sys.argv[1])):
            print(",".join(left_out))
    except InputError as error:
        sys.exit(f"make demo: {str(error).replace('--anatomies ', 'ANATOMIES=', 1)}")
