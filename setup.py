# SPDX-License-Identifier: Apache-2.0
"""What ``setup.cfg`` cannot say: the folder ``bundles`` is installed as a part of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["volta_components*"]), "volta_components.bundles"],
    package_dir={"volta_components.bundles": "bundles"},
)
