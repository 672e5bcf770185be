# SPDX-License-Identifier: Apache-2.0
"""From raw data sets to checked volumes and one datalist format."""
