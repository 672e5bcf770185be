# SPDX-License-Identifier: Apache-2.0
"""Two real processes with batch 1 each against one process with batch 2.

Everything that needs two processes runs in one pair of them, which writes what it found to files; the tests compare.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from method_helpers import HIDDEN, PROTOTYPES, record_gradients, tiny_run, tiny_student
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from volta_components.distributed import (
    gather_objects,
    gather_rows,
    join_processes,
    leave_processes,
    local_device,
    mean_over_processes,
    process_count,
    process_rank,
)
from volta_components.errors import InputError
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.losses import (
    CentredTargets,
    GlobalAlignmentLoss,
    PatchAlignmentLoss,
    SinkhornTargets,
)

TARGETS = {
    "centred": lambda: CentredTargets(PROTOTYPES),
    "controlled": lambda: CentredTargets(PROTOTYPES, target_entropy=0.5),
    "sinkhorn": lambda: SinkhornTargets(PROTOTYPES, queue_size=12),
    "one view at a time": lambda: CentredTargets(PROTOTYPES),
}
TRAINED = ("centred", "sinkhorn", "one view at a time")


def train(rank: int, processes: int, kind: str) -> dict[str, Any]:
    """Two epochs of six volumes, windows of two mini-batches (the last of each epoch holds one)."""
    plain = tiny_student()
    student = DistributedDataParallel(plain) if processes > 1 else plain
    parts = tiny_run(
        count=6,
        batch_size=2 // processes,
        num_replicas=processes,
        rank=rank,
        student=student,
        optimizer=torch.optim.SGD(plain.parameters(), lr=0.0),
        global_loss=GlobalAlignmentLoss(TARGETS[kind]()),
        patch_loss=PatchAlignmentLoss(TARGETS[kind]()),
        koleo_loss=None if kind == "one view at a time" else KoLeoLoss(HIDDEN, queue_size=20),
        views_together=kind != "one view at a time",
        learning_rate=lambda _: 0.01,
    )
    gradients = record_gradients(parts.optimizer, plain)
    losses: list[float] = []
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    parts.trainer.run()
    return {
        "gradients": gradients,
        "student": plain.state_dict(),
        "teacher": parts.teacher.state_dict(),
        "terms": parts.loss.state_dict(),
        "loss": losses,
    }


def teacher_logits() -> torch.Tensor:
    return torch.randn(4, 2, 2, PROTOTYPES, generator=torch.Generator().manual_seed(3))


def worker(rank: int, folder: str) -> None:
    """What each process does: the collectives, the targets, KoLeo, and whole trainings."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {
        "count": process_count(),
        "rank": process_rank(),
        "mean": mean_over_processes(torch.tensor([1.0 + rank, 10.0 * rank])),
        "rows": gather_rows(torch.arange(6).view(2, 3) + 100 * rank),
        "objects": gather_objects([("a", rank), ("b", rank)]),
    }
    for kind, make in TARGETS.items():
        module = make()
        found[f"targets {kind}"] = [module(step[:, rank : rank + 1], 0.04) for step in teacher_logits()]
    koleo = KoLeoLoss(HIDDEN, 10)
    found["koleo"] = []
    for step in summaries():
        own = step[:, rank : rank + 1].clone().requires_grad_()
        value = koleo(own)
        value.backward()
        found["koleo"].append((value.item(), own.grad))
    for kind in TRAINED:
        found[f"train {kind}"] = train(rank, 2, kind)
    if rank == 0:
        time.sleep(1)  # what the first process writes at the end
    arrived = time.monotonic()
    leave_processes()
    found["waited"] = time.monotonic() - arrived
    found["initialized"] = dist.is_initialized()
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def summaries() -> torch.Tensor:
    return torch.randn(4, 2, 2, HIDDEN, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_alone_every_collective_is_the_identity() -> None:
    value = torch.randn(3, 2)
    assert (process_count(), process_rank()) == (1, 0)
    assert mean_over_processes(value) is value
    assert gather_rows(value) is value


def test_each_process_has_a_gpu_of_its_own_or_an_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert local_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"process 2 of this machine finds 1 GPUs.*--nproc_per_node 1.*--device cpu"):
        local_device()


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_processes_talk_as_their_device_needs(monkeypatch: pytest.MonkeyPatch, device: str, backend: str) -> None:
    """Also where there is a GPU that is not used."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend: seen.append(backend))
    join_processes(device)
    assert seen == [backend, *([device] if backend == "nccl" else [])]


@pytest.mark.slow
def test_nobody_leaves_before_the_first_process_has_written(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["waited"] > 0.5
    assert not ranks[0]["initialized"] and not ranks[1]["initialized"]


@pytest.mark.slow
def test_collectives(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert (found["count"], found["rank"]) == (2, rank)
        assert found["mean"].tolist() == [1.5, 5.0]
        assert found["objects"] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        assert found["rows"].tolist() == [[0, 1, 2], [3, 4, 5], [100, 101, 102], [103, 104, 105]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_targets_do_not_depend_on_how_the_batch_is_shared(ranks: list[dict[str, Any]], kind: str) -> None:
    module = TARGETS[kind]()
    for step, logits in enumerate(teacher_logits()):
        together = module(logits, 0.04)
        for rank in (0, 1):
            part = ranks[rank][f"targets {kind}"][step]
            torch.testing.assert_close(part, together[:, rank : rank + 1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_koleo_does_not_depend_on_how_the_batch_is_shared(ranks: list[dict[str, Any]]) -> None:
    module = KoLeoLoss(HIDDEN, 10)
    for step, rows in enumerate(summaries()):
        together = rows.clone().requires_grad_()
        value = module(together)
        value.backward()
        parts = [ranks[rank]["koleo"][step] for rank in (0, 1)]
        assert np.mean([part for part, _ in parts]) == pytest.approx(value.item(), rel=1e-5)
        # Distributed training averages over processes, hence the half.
        own = torch.cat([gradient for _, gradient in parts], dim=1) / 2
        torch.testing.assert_close(own, together.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_two_processes_train_as_one_does(ranks: list[dict[str, Any]], kind: str) -> None:
    one = train(0, 1, kind)
    two = [found[f"train {kind}"] for found in ranks]
    assert len(one["gradients"]) == len(two[0]["gradients"]) == 4  # windows of 2 and 1 mini-batches, twice
    for rank in (0, 1):
        for step, expected in enumerate(one["gradients"]):
            actual = two[rank]["gradients"][step]
            assert set(actual) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=1e-4, msg=f"{name} at step {step}")
        for part in ("student", "teacher"):
            for name, value in one[part].items():
                torch.testing.assert_close(two[rank][part][name], value, atol=1e-5, rtol=1e-4, msg=name)
        centres = [name for name in one["terms"] if name.endswith("targets.centre")]
        assert len(centres) == (0 if kind == "sinkhorn" else 2)
        for name in centres:
            torch.testing.assert_close(two[rank]["terms"][name], one["terms"][name], atol=1e-5, rtol=0)
        for name in ("global_loss.previous", "global_loss.marginal", "patch_loss.marginal"):
            torch.testing.assert_close(two[rank]["terms"][name], one["terms"][name], atol=1e-5, rtol=1e-4)
        previous = [terms["patch_loss._extra_state"]["previous"] for terms in (two[rank]["terms"], one["terms"])]
        torch.testing.assert_close(*previous, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(np.mean([part["loss"] for part in two], axis=0), one["loss"], rtol=1e-5)
    # Both processes end as one, to the bit.
    for name, value in two[0]["student"].items():
        assert torch.equal(value, two[1]["student"][name]), name
