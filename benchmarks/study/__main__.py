# SPDX-License-Identifier: Apache-2.0
"""What pretraining is worth on synthetic heads: ``python -m benchmarks.study ANATOMIES [--size tiny] [--plan]``.

Pretrains on heads of four fifths of the anatomies, trains three tasks on them with shares of the labels, from the
encoder and from scratch, and scores all of it on heads of the anatomies that are left. Every step is a command that a
user would type. Started again, it resumes where it stopped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cyclopts

from benchmarks.study.plan import Size, Study, split_anatomies
from volta_components.data.phantom.labels import read_label_maps
from volta_components.errors import InputError


def main(
    anatomies: Path | None = None,
    /,
    size: str = "cores",
    output: Path | None = None,
    jobs: int = 2,
    longer: int = 1,
    held_back: bool = False,
    plan: bool = False,
) -> int:
    """Run the study.

    Args:
        anatomies: Folder of label maps (volta3d fetch anatomies).
        size: tiny, small, cores or paper: see sizes.json.
        output: Folder of all that is made; runs/study/SIZE by default.
        jobs: Fine-tunings at a time.
        longer: Fine-tune for so many times the epochs, beside what is there, from the same encoders.
        held_back: Train without a quarter of the people, whose curves are drawn: choose by them how long to train an
            init.
        plan: Only print the plan and what it will take.
    """
    try:
        if anatomies is None:
            raise InputError("give a folder of label maps, ANATOMIES=DIR; volta3d fetch anatomies downloads 20")
        if longer < 1:
            raise InputError(f"--longer {longer}: give a whole number from 1")
        study = Study(output or Path("runs") / "study" / size, anatomies, Size.named(size), jobs, longer, held_back)
        training, scored = split_anatomies(anatomies)
        steps = study.steps()
        read_label_maps(anatomies)  # all of them can be used
    except InputError as error:
        print(f"make study: {str(error).replace('--anatomies ', 'ANATOMIES=', 1)}", file=sys.stderr)
        return 2
    study.write_overlays()
    print(f"{len(training)} anatomies to train on; scored: {', '.join(scored)}\n")
    _print_cost(study)
    print()
    for number, step in enumerate(steps, 1):
        print(f"{number:3d} {step.title}")
    if plan:
        return 0
    started = time.monotonic()
    for number, step in enumerate(steps, 1):
        print(
            f"\n\033[1m[{time.monotonic() - started:5.0f} s] {number} of {len(steps)}: {step.title}\033[0m", flush=True
        )
        print(shlex.join(step.words), flush=True)
        done = subprocess.run(step.words, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
        if done.returncode:
            print(
                f"\nmake study: step {number} ended with {done.returncode}; started again, it resumes there",
                file=sys.stderr,
            )
            return done.returncode
    from benchmarks.study.results import write_results

    try:
        page = write_results(study)
    except InputError as error:
        print(f"make study: {error}", file=sys.stderr)
        return 2
    report = study.root / f"report{study.tag}" / "index.html"
    print(f"\n{page.read_text(encoding='utf-8')}\n{page.resolve()}\n{report.resolve()}")
    return 0


def _print_cost(study: Study) -> None:
    from benchmarks.study.cost import table

    rows = table(study)
    print("what                                  runs   core hours (on a GPU, hours), by steps timed just now")
    for what, runs, hours in rows:
        print(f"{what:<36} {runs:5d} {hours:7.2f}")
    print(f"{'all':<36} {sum(row[1] for row in rows):5d} {sum(row[2] for row in rows):7.2f}")
    print("Each run also takes some 15 seconds to start and to end.", flush=True)


if __name__ == "__main__":
    sys.exit(cyclopts.run(main))
