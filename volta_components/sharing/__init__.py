# SPDX-License-Identifier: Apache-2.0
"""Packed bundles, model cards and annotation servers."""
