# SPDX-License-Identifier: Apache-2.0
"""The method of the paper: networks, losses, masks, views, trainer, teacher, and exported weights."""
