# SPDX-License-Identifier: Apache-2.0
"""Work in several processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def call_with_each(
    function: Callable[[T], Any],
    tasks: Sequence[T],
    workers: int,
    start_worker: Callable[[], None],
    bar: tqdm[Any],
) -> None:
    """Call a function with each task, in this process or in several, a few tasks in flight a worker.

    After an error no further task begins.

    Args:
        function: of a module, so that another process can find it.
        tasks: in this order.
        workers: processes; with 1, or a single task, this one.
        start_worker: called first in each new process.
        bar: counts the tasks that are done.

    Raises:
        BrokenProcessPool: if a worker was killed.
    """
    if workers == 1 or len(tasks) <= 1:
        for task in tasks:
            function(task)
            bar.update()
        return
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=start_worker)
    queue = iter(tasks)
    running: set[Future[Any]] = set()
    try:
        while True:
            running |= {pool.submit(function, task) for task in islice(queue, 2 * workers - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
