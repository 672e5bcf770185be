# SPDX-License-Identifier: Apache-2.0
"""Scans in, results out: embeddings, masks and probabilities of new scans."""
