# SPDX-License-Identifier: Apache-2.0
"""Cross-validation over folds, inits and fractions."""
