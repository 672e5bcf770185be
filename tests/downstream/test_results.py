# SPDX-License-Identifier: Apache-2.0
"""Rows by item, however the evaluator goes through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ignite.engine import Engine

from volta_components.downstream.results import FoldResults, ItemRows
from volta_components.downstream.splits import Item, Parts


class Doubled(ItemRows):
    def batch_rows(self, output: Mapping[str, Any], items: Sequence[Item]) -> list[tuple[str, float]]:
        return [(item["subject_id"], 2 * value) for item, value in zip(items, output["pred"].tolist(), strict=True)]


def test_rows_come_in_the_order_of_the_items() -> None:
    table = Doubled([{"subject_id": name} for name in "abc"])
    # The evaluator's batches are in an order of their own; a key is (epoch, index).
    batches = [{"key": torch.tensor([[0, 2], [0, 0]])}, {"key": torch.tensor([[0, 1]])}]
    engine = Engine(lambda _, batch: {"pred": batch["key"][:, 1].double()})
    table.attach(engine)
    engine.run(batches[:1], max_epochs=1)
    with pytest.raises(RuntimeError, match="2 of 3 items"):
        _ = table.rows
    engine.run(batches, max_epochs=1)
    assert table.rows == [("a", 0.0), ("b", 2.0), ("c", 4.0)]
    assert table.epoch == 1


def test_scores_say_who_they_are_of(tmp_path: Path) -> None:
    items: list[Item] = [{"subject_id": "sub-1", "patient_id": "p1", "age": 71.5}, {"subject_id": "sub-2", "sex": "F"}]
    results = FoldResults(parts=Parts(items, [], items), scoring=None, output_dir=tmp_path)
    results.write_scores(tmp_path / "scores.csv", ["dice", "hd95"], items, [[0.5, float("nan")], [0.25, 3.0]])
    frame = pd.read_csv(tmp_path / "scores.csv")
    assert list(frame) == ["subject_id", "patient_id", "session", "site", "sex", "age", "dice", "hd95"]
    assert frame.loc[0, "age"] == 71.5 and frame.loc[1, "sex"] == "F"
    assert frame["dice"].tolist() == [0.5, 0.25] and frame["hd95"].isna().tolist() == [True, False]
    assert results.subjects == {"training": 2, "validation": 0, "scored": 2, "unused": 0}
    assert results.finished({}, "scores.csv", {}).artifacts == [("scores.csv", "predictions")]
    (tmp_path / "pretrained.txt").touch()
    assert results.finished({}, "scores.csv", {}).artifacts[1:] == [("pretrained.txt", "")]
