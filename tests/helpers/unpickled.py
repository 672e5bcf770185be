# SPDX-License-Identifier: Apache-2.0
"""Files of weights that would run code."""

from __future__ import annotations

from typing import Any


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call
