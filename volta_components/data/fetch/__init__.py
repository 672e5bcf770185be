# SPDX-License-Identifier: Apache-2.0
"""Open data by one command: manifests, downloads and archives."""
