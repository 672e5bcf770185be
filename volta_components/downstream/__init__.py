# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: splits, leak guard, networks, scores and results of the three tasks."""
