# SPDX-License-Identifier: Apache-2.0
"""Components of VolTA-3D that the bundles refer to."""

from volta_components._version import __version__

__all__ = ["__version__"]
