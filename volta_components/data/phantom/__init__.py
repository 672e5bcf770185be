# SPDX-License-Identifier: Apache-2.0
"""Brain phantoms: synthetic heads with known effects."""
