# SPDX-License-Identifier: Apache-2.0
"""The version, apart, so that packaging can read it without importing torch."""

__version__ = "0.2.0"
