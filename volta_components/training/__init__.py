# SPDX-License-Identifier: Apache-2.0
"""What every training shares: sampling, caches, checkpoints, tracking, schedules."""
