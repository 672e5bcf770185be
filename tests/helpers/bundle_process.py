# SPDX-License-Identifier: Apache-2.0
"""``python -m monai.bundle`` in processes of their own that can be killed, without importing MONAI for each.

Importing takes most of a tiny run's time. A server process imports once and forks; each child then does what
``python -m monai.bundle ARGUMENTS`` does, in its own working folder, environment and with its own output.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "fire",
        "matplotlib.figure",
        "mlflow",
        "mlflow.store.tracking.sqlalchemy_store",
        "monai.bundle",
        "monai.engines",
        "monai.handlers",
        "monai.transforms",
        "volta_components.method.monitoring",
        "volta_components.inference.probes",
        "volta_components.method.trainer",
        "volta_components.method.views",
    ]
)


def _child(arguments: list[str], folder: str, log: str, environment: Mapping[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["monai.bundle", *arguments]
    status = 0
    try:
        runpy.run_module("monai.bundle", run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        # The interpreter's way with an uncaught error, which multiprocessing would replace by its own.
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class BundleProcess:
    """A started ``python -m monai.bundle ARGUMENTS``.

    Args:
        arguments: what follows ``python -m monai.bundle``.
        folder: where it runs.
        log: file that gets what it prints; appended to.
        environment: variables to set.
    """

    def __init__(
        self, arguments: list[str], folder: Path, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self._process = _CONTEXT.Process(target=_child, args=(arguments, str(folder), str(log), environment or {}))
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def error(self) -> str:
        """The message that it ended with, after ``error: ``; empty when it did not end so."""
        return last_error(self.output)

    def wait(self, timeout: float = 300) -> int:
        """Wait for its end; the exit status."""
        self._process.join(timeout)
        if self.is_alive:
            self.kill()
            raise TimeoutError(f"{self.log} after {timeout} s:\n{self.output[-3000:]}")
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """A signal to this process alone."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self._process.kill()
        self._process.join()

    def kill_when(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """SIGKILL at a moment when ``condition`` holds; it is stopped while that is found out."""
        assert self._process.pid is not None
        deadline = time.monotonic() + timeout
        while self.is_alive:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.log}: the moment did not come\n{self.output[-3000:]}")
            os.kill(self._process.pid, signal.SIGSTOP)
            if condition():
                self.kill()
                return
            os.kill(self._process.pid, signal.SIGCONT)
            time.sleep(0.01)
        raise AssertionError(f"{self.log}: it ended before it could be killed\n{self.output[-3000:]}")


def last_error(output: str) -> str:
    """What stands after the last ``error: `` that begins a line, to the end; torch puts the rank before each line."""
    text = re.sub(r"^\[rank\d+\]: ?", "", output, flags=re.MULTILINE)
    _, mark, error = f"\n{text}".rpartition("\nerror: ")
    return error.strip() if mark else ""
