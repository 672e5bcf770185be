# SPDX-License-Identifier: Apache-2.0
"""What the tests of data share."""

from __future__ import annotations

import pytest
from prepare_helpers import LAYOUTS, OPTIONS

from volta_components.data.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Every layout prepared once: layout -> (exit status, output)."""
    results = {}

    def get(layout):
        if layout not in results:
            make, extra = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp(layout)
            source = make(folder / "source")
            status = prepare(layout, str(source), str(folder / "out"), **{**OPTIONS, **extra})
            results[layout] = status, folder / "out", source
        return results[layout]

    return get
