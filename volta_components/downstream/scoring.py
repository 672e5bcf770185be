# SPDX-License-Identifier: Apache-2.0
"""The evaluator that scores a fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator

from volta_components.downstream.splits import Item
from volta_components.training.cache import KeyedCacheDataset
from volta_components.training.sampling import KeyedDataLoader


def like_validation(
    validation: SupervisedEvaluator,
    items: Sequence[Item],
    key_val_metric: Mapping[str, Metric],
    cache: bool = False,
) -> SupervisedEvaluator:
    """Make the evaluator of the scored fold: network, transforms, inferer and loading are those of the validation.

    Each process has a share of the items. ``cache`` keeps volumes in memory, for more than one scoring.
    """
    loader: Any = validation.data_loader
    return SupervisedEvaluator(
        device=validation.state.device,
        val_data_loader=KeyedDataLoader(
            KeyedCacheDataset(items, loader.dataset.transform, cache=cache),
            batch_size=loader.batch_size,
            num_workers=loader.num_workers,
        ),
        network=validation.network,
        inferer=validation.inferer,
        key_val_metric=dict(key_val_metric),
        decollate=False,
        amp=validation.amp,
        amp_kwargs=validation.amp_kwargs,
    )
