# SPDX-License-Identifier: Apache-2.0
"""The kernels of a mini-batch started all at once, by a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from volta_components.errors import InputError


class GraphedFunction:
    """A function whose kernels are recorded once, and started together from then on.

    With one volume a mini-batch, a GPU computes faster than Python can start some 2,500 kernels one by one. PyTorch's
    ``make_graphed_callables`` records a module's passes; here forward and backward passes, losses and what they move
    are recorded as one. The function has to do the same in every call: settings and the tensors that it changes must
    not differ, and nothing may wait for the GPU. Arguments of other shapes than the first ones are computed without a
    record.

    Args:
        function: of tensors of fixed shapes and of numbers, which are tensors ``[]`` there too; gives tensors.

    Raises:
        InputError: at the first call after these, if the function waits for the GPU.

    Source: PyTorch's notes on CUDA graphs (whole-network capture).
    """

    WARM_UP = 3  # calls before the recording, in which libraries choose their kernels

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._arguments: list[Tensor] = []
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[Tensor, ...]:
        """The function's results; they hold until the next call."""
        if not self._arguments:
            device = tensors[0].device
            self._arguments = [torch.empty_like(one) for one in tensors]
            self._arguments += [torch.zeros((), device=device) for _ in numbers]
            self._stream = torch.cuda.Stream(device)
        count = len(tensors)
        for place, number in zip(self._arguments[count:], numbers, strict=True):
            place.fill_(number)
        if any(place.shape != one.shape for place, one in zip(self._arguments, tensors)):
            # Such as the last mini-batch of an epoch, which may be smaller.
            return self.function(*tensors, *self._arguments[count:])
        for place, one in zip(self._arguments, tensors):
            place.copy_(one)
        self._calls += 1
        if self._calls <= self.WARM_UP:
            # Of the arguments' device, which need not be the current one.
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._results = self.function(*self._arguments)
            current.wait_stream(self._stream)
            return self._results
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()
        return self._results

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # What loads data may use the GPU meanwhile: threads that pin memory do.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._results = self.function(*self._arguments)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"a mini-batch cannot be recorded as a CUDA graph ({error}); give --train#trainer#cuda_graph False"
            ) from error
        return graph
