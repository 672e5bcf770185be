# SPDX-License-Identifier: Apache-2.0
"""What patch tokens know of their patch, beyond where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import adaptive_avg_pool3d

from volta_components.inference.tables import ResultTable, source_file


@dataclass(kw_only=True, eq=False)
class TokenTable(ResultTable):
    """Collects the tokens of labelled volumes, and which share of each patch the hippocampi fill.

    Volumes are on one grid, as those of a prepared data set are. Those without ``label`` are passed over.

    Attributes:
        key: of the evaluator's prediction, ``tokens`` or ``voxels``; see ``EmbeddingInferer``.
        limit: volumes that are kept at most: at the paper's size, each takes 2 MB.
    """

    key: str = "tokens"
    limit: int = 400

    def result(self, item: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[Any, str, list[Path]]:
        """Tokens ``[N, D]`` and shares ``[N]``, or ``None``."""
        if "label" not in item or sum(row is not None for row in self.rows) >= self.limit:
            return None, source_file(item["image"]), []
        tokens = output["pred"][self.key]
        shares = adaptive_avg_pool3d((torch.as_tensor(item["label"]) > 0).float(), tokens.shape[1:])
        row = tokens.half().flatten(1).T.cpu().numpy(), shares.flatten().cpu().numpy()
        return row, source_file(item["image"]), []

    def write_table(self) -> None:
        """Nothing: tokens stay in memory."""

    @property
    def known(self) -> np.ndarray:
        """``[volumes]`` bool: which ones were kept."""
        return np.array([row is not None for row in self.rows], dtype=bool)

    @property
    def tokens(self) -> np.ndarray:
        """``[kept, N, D]`` float16."""
        return np.stack([row[0] for row in self.rows if row is not None])

    @property
    def shares(self) -> np.ndarray:
        """``[kept, N]`` float32, in [0, 1]."""
        return np.stack([row[1] for row in self.rows if row is not None])


def errors_beyond_position(tokens: np.ndarray, shares: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well a linear map of a token tells what fills its patch, where the position alone says nothing.

    At each position, the means of the other folds are taken from tokens and shares: what is left of a token that knows
    its position alone is 0. Positions that no hippocampus of the other folds reaches are left out.

    Args:
        tokens: ``[n, N, D]``.
        shares: ``[n, N]``.
        folds: ``[n]``, by patient.

    Returns:
        ``[n]`` squared errors of a ridge regression fitted on the other folds, and ``[n]`` of the position's mean. One
        minus the ratio of their sums is the share of variance that tokens explain.
    """
    errors, naive = np.zeros(len(tokens)), np.zeros(len(tokens))
    for fold in np.unique(folds):
        fitted, scored = folds != fold, folds == fold
        reached = (shares[fitted] > 0).any(axis=0)
        near, truth = tokens[:, reached].astype(float), shares[:, reached].astype(float)
        near, truth = near - near[fitted].mean(axis=0), truth - truth[fitted].mean(axis=0)
        model = make_pipeline(StandardScaler(with_mean=False), RidgeCV(np.logspace(-1, 6, 15), fit_intercept=False))
        model.fit(near[fitted].reshape(-1, near.shape[2]), truth[fitted].ravel())
        predicted = model.predict(near[scored].reshape(-1, near.shape[2])).reshape(truth[scored].shape)
        errors[scored] = np.square(predicted - truth[scored]).sum(axis=1)
        naive[scored] = np.square(truth[scored]).sum(axis=1)
    return errors, naive
