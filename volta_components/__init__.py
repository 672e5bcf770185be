# SPDX-License-Identifier: Apache-2.0
"""Components of VolTA-3D that the bundles refer to, and what its users call from Python.

PyTorch and MONAI, which take seconds, are imported when something of theirs is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from volta_components._version import __version__

if TYPE_CHECKING:
    from volta_components.method.weights import load_encoder, load_pretrained

__all__ = ["__version__", "load_encoder", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from volta_components.method import weights

    return getattr(weights, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
