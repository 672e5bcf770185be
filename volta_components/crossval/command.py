# SPDX-License-Identifier: Apache-2.0
"""Cross-validation of a bundle over folds, inits and fractions: ``volta3d crossval``.

Each run is a ``python -m monai.bundle run`` of its own, so that what crossval does can be done by hand: its settings
are the bundle's ``train.json``, the init's overlay, further overlays, and a small ``run.json`` that crossval writes
beside the run's log. MLflow is the only memory: a run counts as done when MLflow says so.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volta_components.crossval.execute import follow, run_here, submit, visible_gpus
from volta_components.crossval.plan import Run, plan, read_assignments, split_words
from volta_components.crossval.store import finished_runs, tracking_address
from volta_components.downstream.inits import BASE_INIT
from volta_components.errors import InputError
from volta_components.files import atomic_path


def crossval(
    bundle: str,
    datalist: str,
    inits: str | Sequence[str] = (BASE_INIT,),
    folds: int | Sequence[int] = 5,
    fractions: float | Sequence[float] = (1.0,),
    overlays: str | Sequence[str] = (),
    set: str | Mapping[str, Any] | Sequence[str] = (),
    encoder: str | None = None,
    seed: int = 0,
    output: str = "runs",
    tracking_uri: str | None = None,
    experiment: str | None = None,
    executor: str = "local",
    jobs: int = 1,
    gpus_per_run: int | None = None,
    cpus_per_run: int = 4,
    partition: str | None = None,
    account: str | None = None,
    minutes: int = 1440,
    memory_gb: int = 32,
    slurm: str | Mapping[str, Any] | Sequence[str] = (),
    cluster: str | None = None,
    dry_run: bool = False,
    adopt: int | None = None,
) -> int:
    """Train a bundle for every fold, fraction and init; started again, it goes on where it was.

    Runs that MLflow has as finished, with the same datalist, configuration, encoder and settings, are skipped; a
    broken one goes on from its checkpoint. A run that fails does not stop the others: failures are listed at the end.

    Args:
        bundle: the bundle's folder.
        datalist: ``datalist.json`` of the prepared data set.
        inits: names separated by commas; ``volta`` is the bundle's ``train.json`` alone, any other one adds the
            overlay ``configs/NAME.json``.
        folds: how many of the datalist's folds to score, beginning with fold 0, or ``[0,3]`` for these folds.
        fractions: shares of the training part in (0, 1], separated by commas; the scored fold is always whole.
        overlays: further configuration files, separated by commas, merged last: paths, or names in ``configs``.
        set: ids of the bundle to change, as ``"epochs=2,batch_size=4"``.
        encoder: pretrained weights, or a bundle's folder that holds them, instead of the bundle's own ``encoder_path``.
        seed: run seeds are ``1000 * seed + fold``: the same for all inits and fractions of a fold, so that they see
            the same subjects.
        output: folder for logs and checkpoints, and for MLflow's store unless ``tracking_uri`` says otherwise.
        tracking_uri: MLflow's store; otherwise ``MLFLOW_TRACKING_URI``, otherwise ``OUTPUT/mlruns.db``.
        experiment: MLflow's experiment; ``volta3d_BUNDLE`` by default.
        executor: ``local``, or ``slurm`` to submit each run as a job.
        jobs: runs at a time.
        gpus_per_run: GPUs of each run; above 1 it runs under torchrun with the overlay ``multi_gpu_train.json``.
            By default 1 where there are GPUs.
        cpus_per_run: SLURM: cores of a job.
        partition: SLURM: partition.
        account: SLURM: account.
        minutes: SLURM: time limit; a job that reaches it is queued again and goes on.
        memory_gb: SLURM: memory of a job.
        slurm: SLURM: other options of ``sbatch``, as ``"qos=high,constraint=a100"``.
        cluster: submitit's cluster; ``local`` tries the way of SLURM jobs on this machine.
        dry_run: only print each run's state and command.
        adopt: a fold; once all runs are finished, its model (of the first init, the largest fraction) becomes the
            bundle's own, in ``BUNDLE/models``, where ``segment``, ``pack`` and ``inference.json`` look for it.

    Returns:
        0; 1 if a run failed or another process is still working on it; 130 if interrupted.

    Raises:
        InputError: before anything starts, if bundle, overlay, datalist, fold, fraction, id or encoder is wrong, or in
            any of the runs a class is missing from a part or a patient is where it must not be.
    """
    if executor not in {"local", "slurm"}:
        raise InputError(f"--executor {executor}: local or slurm")
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: at least one run at a time")
    if gpus_per_run is None:
        gpus_per_run = min(1, len(visible_gpus())) if executor == "local" else 1
    root = Path(output).resolve()
    store = tracking_address(tracking_uri, root)
    runs = plan(
        bundle=Path(bundle),
        datalist=Path(datalist),
        inits=split_words(inits),
        folds=folds,
        fractions=fractions,
        overlays=split_words(overlays),
        settings=read_assignments(set, "--set"),
        encoder=None if encoder is None else Path(encoder),
        seed=seed,
        root=root,
        tracking_uri=store,
        experiment=experiment,
        processes=gpus_per_run,
    )
    chosen = max((run for run in runs if run.fold == adopt), key=lambda run: run.fraction, default=runs[0])
    if adopt not in (None, chosen.fold):
        folds_run = ", ".join(map(str, sorted({run.fold for run in runs})))
        raise InputError(f"--adopt {adopt}: not one of the folds that are run ({folds_run})")
    done = finished_runs(store, runs[0].experiment)
    todo = [run for run in runs if (run.name, run.settings) not in done]
    if dry_run:
        for run in runs:
            state = "to do" if run in todo else "finished"
            print(f"{run.name}  {state}  {shlex.join(run.command())}")
        return 0
    for run in todo:
        run.folder.mkdir(parents=True, exist_ok=True)
    if todo:
        print(f"Each run's log: {runs[0].folder.parent}/RUN/{runs[0].log.name}")
    if executor == "local":
        outcomes = run_here(todo, jobs, gpus_per_run)
    else:
        parameters = {
            "name": f"crossval_{Path(bundle).resolve().name}",
            "timeout_min": minutes,
            "gpus_per_node": gpus_per_run,
            "cpus_per_task": cpus_per_run,
            "mem_gb": memory_gb,
            "slurm_array_parallelism": jobs,
            "slurm_partition": partition,
            "slurm_account": account,
            "slurm_additional_parameters": read_assignments(slurm, "--slurm") or None,
        }
        outcomes = submit(todo, root / "submitit", cluster or "slurm", parameters)
    status = follow(outcomes, len(runs), len(runs) - len(todo))
    if adopt is not None and status == 0:
        _adopt(chosen, Path(bundle))
    if status == 0:
        print(f"Tables and figures: volta3d report --tracking_uri {store} --output {root / 'report'}")
    return status


def _adopt(run: Run, bundle: Path) -> None:
    """Copy a finished run's model and its record to the bundle's ``models``."""
    models = sorted((run.folder / "models").glob("*.pt"))
    if len(models) != 1:
        raise InputError(f"{run.folder / 'models'}: {len(models)} models instead of one; --adopt cannot tell which")
    is_there = (bundle / "models" / models[0].name).exists()
    for path in (models[0], models[0].with_suffix(".json")):
        with atomic_path(bundle / "models" / path.name) as temporary:
            shutil.copyfile(path, temporary)
    print(f"{bundle / 'models' / models[0].name}: the model of {run.name}{', in place of another' * is_there}")
