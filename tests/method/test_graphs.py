# SPDX-License-Identifier: Apache-2.0
"""What can be known of a recorded function without a GPU; test_gpu.py records and starts a whole step."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from volta_components.method.graphs import GraphedFunction


def test_a_smaller_last_batch_is_computed_by_the_function_itself() -> None:
    """Copied to where a whole batch was recorded, it would be repeated there in silence."""

    def scaled_sum(batch: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return (batch.sum() * factor,)

    graphed = GraphedFunction(scaled_sum)
    graphed._arguments = [torch.zeros(2, 3), torch.zeros(())]  # of a first call with two rows
    assert graphed([torch.ones(1, 3)], [2.0])[0] == 6.0
    assert not graphed._arguments[0].any()


def test_the_warm_up_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not always the current one: the stream of cuda:0 knows nothing of what cuda:1 still computes."""
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str, device: str) -> None:
            self.name, self.device = name, device

        def wait_stream(self, other: Stream) -> None:
            waits.append((f"{self.name} {self.device}", f"{other.name} {other.device}"))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device="cuda:0": Stream("current", device))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    graphed = GraphedFunction(lambda batch: (batch.sum(),))
    graphed._arguments, graphed._stream = [torch.zeros(2)], Stream("side", "cuda:1")  # type: ignore[assignment]
    graphed([torch.ones(2)], [])
    assert waits == [("side cuda:1", "current cuda:1"), ("current cuda:1", "side cuda:1")]
