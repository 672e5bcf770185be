# SPDX-License-Identifier: Apache-2.0
"""Bundles that are packed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed import BUNDLES, ROOT, random_weights

from volta_components.sharing.pack import pack_bundle


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of each bundle at the quick start's size; nobody may change them."""
    folder = tmp_path_factory.mktemp("weights")
    return {bundle: random_weights(bundle, folder / bundle) for bundle in BUNDLES}


@pytest.fixture(scope="session")
def packed(weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all four bundles, packed; nobody may change it."""
    output = tmp_path_factory.mktemp("packed")
    for bundle in BUNDLES:
        pack_bundle(
            ROOT / "bundles" / bundle, output, ["tiny"], model=weights[bundle], source="https://host.example/x/"
        )
    return output
