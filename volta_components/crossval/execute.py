# SPDX-License-Identifier: Apache-2.0
"""Starts runs here or on SLURM and follows them."""

from __future__ import annotations

import itertools
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib

from volta_components.crossval.plan import Run
from volta_components.crossval.store import claim, mlflow_client, run_lock
from volta_components.errors import InputError
from volta_components.training.tracking import RUN_ID

LOG_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished``, ``failed`` or ``busy`` (another process works on it).

    ``has_log`` is whether this attempt came as far as to write one.
    """

    run: Run
    status: str
    detail: str = ""
    has_log: bool = True


def execute(run: Run, gpus: str | None = None) -> Outcome:
    """Start one run's process on ``gpus`` (``CUDA_VISIBLE_DEVICES``), wait for it, and ask MLflow how it ended."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with run_lock(run.folder / "lock") as lock:
        if lock is None:
            return Outcome(run, "busy", "another process works on it; start the same command again when it has ended")
        run_id = claim(run)
        if run_id is None:
            return Outcome(run, "finished")
        # The environment variable wins over tracking_uri in MONAI's MLflow handler: say the same in both.
        tracking = {"MLFLOW_TRACKING_URI": run.tracking_uri, RUN_ID: run_id}
        environment = {**os.environ, **tracking, "PYTHONUNBUFFERED": "1"}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        with run.log.open("ab") as log:
            log.write(f"\n$ {RUN_ID}={run_id} {shlex.join(run.command())}\n".encode())
            log.flush()
            # The child holds the lock too: should this process die and the child live on, the run stays taken.
            process = subprocess.Popen(
                run.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
            )
            _CHILDREN.add(process)
            # In a thread: on this one, a signal's handler that stops the child would wait for the lock of this wait.
            waiter = threading.Thread(target=process.wait, daemon=True)
            try:
                waiter.start()
                waiter.join()
            finally:
                _CHILDREN.discard(process)
                _stop([process])
        client = mlflow_client(run.tracking_uri)
        if client.get_run(run_id).data.tags.get("finished") == "true":
            # Whatever happened afterwards: everything is written.
            client.set_terminated(run_id, "FINISHED")
            return Outcome(run, "finished")
        client.set_terminated(run_id, "FAILED")
        reason = (
            f"exit status {process.returncode}"
            if process.returncode
            else "it ended without marking itself finished in MLflow"
        )
        return Outcome(run, "failed", reason)


_CHILDREN: set[subprocess.Popen[bytes]] = set()


class _Job:
    """What submitit runs on the node. At its time limit it is queued again and resumes from its checkpoint."""

    def __call__(self, run: Run) -> Outcome:
        return execute(run)

    def checkpoint(self, run: Run) -> Any:
        import submitit

        _stop(_CHILDREN)
        return submitit.helpers.DelayedSubmission(self, run)


def visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` allows, or every GPU."""
    import torch

    count = torch.cuda.device_count()
    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return named[:count] if named else [str(index) for index in range(count)]


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End our own child processes: ask first, then insist."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_here(runs: Sequence[Run], jobs: int, gpus_per_run: int) -> Generator[Outcome, None, None]:
    """Run on this machine, ``jobs`` at a time, GPUs dealt in turn."""
    slots: queue.Queue[str | None] = queue.Queue()
    gpus = visible_gpus() if gpus_per_run else []
    if len(gpus) < gpus_per_run:
        raise InputError(f"--gpus-per-run {gpus_per_run}: this machine shows {len(gpus)} GPUs")
    for job in range(jobs):
        dealt = [gpus[(job * gpus_per_run + place) % len(gpus)] for place in range(gpus_per_run)]
        slots.put(",".join(dealt) if gpus else None)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, joblib.cpu_count() // jobs)))

    def work(run: Run) -> Outcome:
        slot, before = slots.get(), _size(run.log)
        try:
            return execute(run, slot)
        except Exception as error:  # of MLflow or the disk: the other runs go on
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            return Outcome(run, "failed", text, has_log=_size(run.log) != before)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        for future in as_completed([pool.submit(work, run) for run in runs]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _stop([*_CHILDREN])
        pool.shutdown(wait=True)


def submit(
    runs: Sequence[Run], folder: Path, cluster: str, parameters: Mapping[str, Any]
) -> Generator[Outcome, None, None]:
    """Submit each run as a job and yield outcomes as they come."""
    import submitit

    if not runs:
        return
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise InputError(f"--executor slurm: {error}; run it where sbatch is, or use --executor local") from error
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    with executor.batch():
        jobs = [executor.submit(_Job(), run) for run in runs]
    by_id = {job.job_id: run for job, run in zip(jobs, runs, strict=True)}
    try:
        for job in submitit.helpers.as_completed(jobs, poll_frequency=1 if cluster == "local" else 10):
            trouble = job.exception()
            failed = Outcome(by_id[job.job_id], "failed", f"job {job.job_id}: {trouble}")
            yield job.result() if trouble is None else failed
    except BaseException:
        for job in jobs:
            job.cancel(check=False)
        raise


def follow(outcomes: Generator[Outcome, None, None], total: int, done: int) -> int:
    """Show progress, then what failed, with the end of its log."""
    from tqdm import tqdm

    bad: list[Outcome] = []
    # A scheduler's SIGTERM ends as Ctrl-C does: children are stopped, and what to do is said.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with closing(outcomes), tqdm(total=total, initial=done, unit="run", desc="crossval") as bar:
            for outcome in outcomes:
                if outcome.status == "finished":
                    bar.update()
                else:
                    bad.append(outcome)
                    bar.write(f"{outcome.run.name}: {outcome.status} ({outcome.detail})", file=sys.stderr)
                bar.set_postfix(failed=len(bad))
    except KeyboardInterrupt:
        print("\nInterrupted. Start the same command again to do what is left.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{total - len(bad)} of {total} runs are finished, {done} of them from before.")
    for outcome in bad:
        lines = [f"\n{outcome.run.name}: {outcome.status}, {outcome.detail}"]
        # MLflow or the disk may have failed before the attempt had a log.
        if outcome.status == "failed" and outcome.has_log:
            lines += [f"  {outcome.run.log} ends with:", *(f"  | {line}" for line in _tail(outcome.run.log))]
        print("\n".join(lines), file=sys.stderr)
    if bad:
        print("\nStart the same command again to do what is left.", file=sys.stderr)
    return 1 if bad else 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _tail(path: Path) -> list[str]:
    """The cause and the last lines of a run's last attempt, as a terminal would show them."""
    if not path.is_file():
        return ["(no log)"]
    text = path.read_bytes().decode("utf-8", errors="replace").rsplit("\n$ ", 1)[-1]
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    # monai.bundle wraps what a configuration raises in errors of its own: the first one of the chain is the cause.
    start = next((number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), None)
    cause = [] if start is None else list(itertools.takewhile(bool, lines[start : start + 4 * LOG_LINES]))
    last = [line for line in lines if line][-LOG_LINES:]
    return last if not cause or cause[-1] in last else [*cause, "...", *last[-3:]]
