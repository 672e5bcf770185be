# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test: one thread a process, and no state that leaks from one test into the next."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

# Test processes run side by side (pytest-xdist); more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is expected here is computed on the CPU, also where there is a GPU; ``make test-gpu`` is for that.
if "VOLTA_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# ``volta3d pack`` makes a secret; never the user's own.
os.environ["VOLTA3D_SECRET"] = str(Path(tempfile.gettempdir()) / f"volta3d-tests-{os.getuid()}" / "secret")
torch.set_num_threads(1)
# A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh, seeded source of random numbers."""
    return np.random.default_rng(20240607)


@pytest.fixture(autouse=True)
def _restore_random_state() -> Iterator[None]:
    """Seed PyTorch's generator before a test, and put it back afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def _restore_signals() -> Iterator[None]:
    """A run that a test broke leaves its own way with Ctrl-C behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, as ``initialize`` of the multi-GPU overlay makes it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
