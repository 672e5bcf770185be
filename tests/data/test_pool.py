# SPDX-License-Identifier: Apache-2.0
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from volta_components.data.pool import call_with_each


def mark(folder: Path, number: int) -> None:
    (folder / str(number)).write_text(f"{os.getpid()} {os.environ.get('STARTED')}")
    if number == 3:
        raise ValueError("three")
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)


def start() -> None:
    os.environ["STARTED"] = "yes"


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_and_counted_once(tmp_path, workers):
    tasks = [*range(10, 22)]
    with tqdm(total=len(tasks), disable=False) as bar:
        call_with_each(partial(mark, tmp_path), tasks, workers, start, bar)
        assert bar.n == len(tasks)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, tasks))
    processes = {path.read_text() for path in tmp_path.iterdir()}
    if workers == 1:
        assert processes == {f"{os.getpid()} None"}
    else:
        assert all(text.endswith(" yes") and not text.startswith(f"{os.getpid()} ") for text in processes)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_further_task_begins_after_an_error(tmp_path, workers):
    with pytest.raises(ValueError, match="three"), tqdm() as bar:
        call_with_each(partial(mark, tmp_path), [3, *range(100, 200)], workers, start, bar)
    assert len(list(tmp_path.iterdir())) < 20


def test_a_worker_that_was_killed_is_an_error(tmp_path):
    with pytest.raises(BrokenProcessPool), tqdm() as bar:
        call_with_each(partial(mark, tmp_path), [30, 31, 32], 2, start, bar)
