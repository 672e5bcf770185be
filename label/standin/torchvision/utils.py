# SPDX-License-Identifier: Apache-2.0
"""The two names that MONAI Label imports."""

from __future__ import annotations

from typing import Any, NoReturn


def _missing(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("torchvision is needed for this picture; install the release that fits your PyTorch")


make_grid = save_image = _missing
