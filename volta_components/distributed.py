# SPDX-License-Identifier: Apache-2.0
"""The few collective operations that the project needs; each is the identity in a single process.

``ignite.distributed`` offers the same, but its first call is itself a collective operation: a process that asks for its
rank where the others do not come by waits for ever. In a SLURM job it also overwrites ``LOCAL_RANK`` with
``SLURM_LOCALID``, which is the same in all processes that ``srun torchrun`` starts on a node, and fails where that is
not set, as in an ``salloc`` shell.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from volta_components.errors import InputError

T = TypeVar("T")


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Rank of this process, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes; same shape, no gradient."""
    if process_count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / process_count()


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Rows ``[n, ...]`` of every process, in order of rank: ``[processes * n, ...]``, no gradient."""
    if process_count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(process_count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_objects(objects: list[T]) -> list[T]:
    """The lists of every process, one after the other in order of rank."""
    if process_count() == 1:
        return objects
    parts: list[list[T]] = [[] for _ in range(process_count())]
    dist.all_gather_object(parts, objects)
    return [item for part in parts for item in part]


def unwrapped(module: nn.Module) -> nn.Module:
    """A network without its ``DistributedDataParallel`` wrapper, if it has one."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def local_device() -> torch.device:
    """The device of this process, one of those that ``torchrun`` has started: a GPU of its own, or the CPU.

    Raises:
        InputError: if there are GPUs, but fewer than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= count:
        raise InputError(
            f"process {place + 1} of this machine finds {count} GPUs, and each needs its own: start torchrun with "
            f"--nproc_per_node {count}, or train on the CPU (--device cpu)"
        )
    return torch.device(f"cuda:{place}")


def join_processes(device: torch.device | str) -> None:
    """Join the processes that ``torchrun`` has started, to compute on a device; for ``multi_gpu_train.json``."""
    device = torch.device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend="nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def leave_processes() -> None:
    """Wait for the other processes, then leave their group; for ``multi_gpu_train.json``.

    A process that goes on to its end at once may be aborted there, and ``torchrun`` then stops the others while they
    write what they have learned: a thread of gloo that still drops the tensors of the last reduction needs an
    interpreter that is gone (https://github.com/pytorch/pytorch/pull/179291). That thread ends while this one waits.
    """
    dist.barrier()
    dist.destroy_process_group()
