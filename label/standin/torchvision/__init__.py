# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchvision where none fits the installed PyTorch.

MONAI Label imports two of its functions for pictures of 2-D training steps, which nothing here draws. ``make label``
puts this into the environment only where torchvision cannot be imported.
"""
