# SPDX-License-Identifier: Apache-2.0
"""What ``setup.cfg`` cannot say: the folders ``bundles`` and ``label`` are installed as parts of the package."""

from setuptools import find_packages, setup

SHIPPED = ("bundles", "label")

setup(
    packages=[*find_packages(include=["volta_components*"]), *(f"volta_components.{name}" for name in SHIPPED)],
    package_dir={f"volta_components.{name}": name for name in SHIPPED},
)
