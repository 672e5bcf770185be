# SPDX-License-Identifier: Apache-2.0
"""One store of made-up runs, and one report of it, for all tests of the report."""

from __future__ import annotations

import pytest
from fake_runs import Writer

from volta_components.report.command import report


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory):
    writer = Writer(tmp_path_factory.mktemp("store"))
    writer.classification("ixi_sex", (0.2, 1.0), 40)
    writer.classification("aibl_ad", (1.0,), 30)
    writer.segmentation(fractions=(0.4, 1.0))
    return writer.uri


@pytest.fixture(scope="session")
def made(store_uri, tmp_path_factory):
    """The folder of a report of the store."""
    folder = tmp_path_factory.mktemp("report")
    assert report(folder, store_uri, bootstrap=500) == 0
    return folder
