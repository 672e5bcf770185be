# SPDX-License-Identifier: Apache-2.0
"""What a training took: time, memory, on what, and by which versions of the code."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine

from volta_components.training.record import code_version
from volta_components.training.tracking import device_of, hardware


def start_clock(engine: Any, before: Mapping[str, Any]) -> None:
    """Begin to count at the start of a run; ``before`` is what a resumed run has taken already, or empty."""
    engine.state.cost_before = dict(before)
    engine.state.started_at = time.monotonic()


def code_versions(engine: Any) -> list[str]:
    """Versions of the code that have trained a run, in order: several if it was resumed by another one."""
    return list(dict.fromkeys([*engine.state.cost_before.get("code_versions", []), code_version()]))


def time_and_memory(engine: Any) -> dict[str, Any]:
    """What a run has taken so far; empty if its clock was not started.

    Returns:
        ``hours``, without the pauses of a run that was resumed; ``peak_memory_gib``, the most that the first process
        has held: on the GPU when it trains there, otherwise in the host's memory; ``code_versions``.
    """
    started = getattr(engine.state, "started_at", None)
    if started is None:
        return {}
    before = engine.state.cost_before
    hours = (time.monotonic() - started) / 3600
    return {
        "hours": before.get("hours", 0.0) + hours,
        "peak_memory_gib": max(before.get("peak_memory_gib", 0.0), _peak_memory_gib(engine)),
        "code_versions": code_versions(engine),
    }


def training_cost(engine: Engine) -> dict[str, Any]:
    """``time_and_memory`` with the ``hardware``, for the record of a finished run; empty if nothing is known."""
    found = time_and_memory(engine)
    numbers = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    return {**numbers, "hardware": hardware(device_of(engine))} if numbers else {}


def cost_metrics(cost: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of ``training_cost`` by the names that MLflow shows them under."""
    return {f"cost/{name}": value for name, value in cost.items() if isinstance(value, float)}


def _peak_memory_gib(engine: Any) -> float:
    if (device := device_of(engine)).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
