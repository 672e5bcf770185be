# SPDX-License-Identifier: Apache-2.0
"""Cross-validation of a bundle over folds, inits and fractions: ``volta3d crossval``.

Each run is a ``python -m monai.bundle run`` of its own, so that what crossval does can be done by hand: its settings
are the bundle's ``train.json``, the init's overlay, further overlays, and a small ``run.json`` that crossval writes
beside the run's log. MLflow is the only memory: a run counts as done when MLflow says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volta_components.downstream.inits import BASE_INIT, SCRATCH
from volta_components.errors import InputError
from volta_components.files import copy_file

if TYPE_CHECKING:
    from volta_components.crossval.plan import Run


def crossval(
    bundle: Path | str,
    datalist: Path | str,
    inits: Sequence[str] = (BASE_INIT,),
    folds: int | Sequence[int] = 5,
    fractions: Sequence[float] = (1.0,),
    overlays: Sequence[str] = (),
    set: Mapping[str, Any] | None = None,
    encoder: Path | str | None = None,
    seed: int = 0,
    output: Path | str = "runs",
    tracking_uri: str | None = None,
    experiment: str | None = None,
    executor: Literal["local", "slurm"] = "local",
    jobs: int = 1,
    gpus_per_run: int | None = None,
    cpus_per_run: int = 4,
    partition: str | None = None,
    account: str | None = None,
    minutes: int = 1440,
    memory_gb: int = 32,
    slurm: Mapping[str, Any] | None = None,
    cluster: str | None = None,
    dry_run: bool = False,
    adopt: int | None = None,
) -> int:
    """Train a bundle for every fold, fraction and init.

    Each run is a `python -m monai.bundle run` of its own. Finished runs (in MLflow, with the same datalist,
    configuration, encoder and settings) are skipped; an interrupted one resumes from its checkpoint. A run that fails
    does not stop the others: failures are listed at the end.

    Args:
        bundle: Folder of the bundle.
        datalist: Datalist (datalist.json) of the prepared data set.
        inits: What training starts from: "volta" is the bundle's train.json alone, any other name adds the overlay
            configs/NAME.json.
        folds: How many folds of the datalist to score, from fold 0 on; or which, as 0,3. A single one is written [3].
        fractions: Shares of the training part, above 0 and up to 1. The scored fold is always whole.
        overlays: More configuration files, merged last: names in the bundle's configs, or paths.
        set: Ids of the bundle to change, such as epochs=2,batch_size=4.
        encoder: Pretrained weights, or the folder of a bundle that holds them, instead of the bundle's encoder_path.
        seed: The seed of a run is 1000 times this, plus the fold. All inits and fractions of a fold share it, so they
            see the same subjects.
        output: Folder for logs and checkpoints, and for MLflow's store unless --tracking-uri names another.
        tracking_uri: MLflow's store; by default that of MLFLOW_TRACKING_URI, or else OUTPUT/mlruns.db.
        experiment: MLflow's experiment; volta3d_BUNDLE by default.
        executor: "slurm" submits each run as a job.
        jobs: Number of runs at a time.
        gpus_per_run: Number of GPUs of each run; above 1 it runs under torchrun with the overlay multi_gpu_train.json.
            1 by default where there are GPUs.
        cpus_per_run: SLURM: cores of a job.
        partition: SLURM: partition.
        account: SLURM: account.
        minutes: SLURM: time limit. A job that reaches it is queued again and resumes.
        memory_gb: SLURM: memory of a job, in GB.
        slurm: SLURM: other options of sbatch, such as qos=high,constraint=a100.
        cluster: SLURM: cluster of submitit. "local" tries the jobs on this machine.
        dry_run: Only write each run's settings, and print its state and command.
        adopt: A fold whose model becomes the bundle's own once all runs are finished (of the first init, a pretrained
            one, and the largest fraction). It is copied to BUNDLE/models, where segment, pack and inference.json look.

    Returns:
        0; 1 if a run failed or another process is still working on it; 130 if interrupted.

    Raises:
        InputError: before anything starts, if bundle, overlay, datalist, fold, fraction, id or encoder is wrong, or in
            any of the runs a class is missing from a part or a patient is where it must not be.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: at least one run at a time")
    # Here, since they import torch: help and mistakes should not wait for it.
    from volta_components.crossval.execute import follow, run_here, submit, visible_gpus
    from volta_components.crossval.plan import plan
    from volta_components.crossval.store import finished_runs, pages_hint, renew_plan, tracking_address

    if gpus_per_run is None:
        gpus_per_run = min(1, len(visible_gpus())) if executor == "local" else 1
    root = Path(output).resolve()
    store = tracking_address(tracking_uri, root)
    runs = plan(
        bundle=Path(bundle),
        datalist=Path(datalist),
        inits=inits,
        folds=folds,
        fractions=fractions,
        overlays=overlays,
        settings=set or {},
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
    if adopt is not None and chosen.variant.endswith(SCRATCH):
        raise InputError(
            f"--adopt {adopt}: the first of --inits, {chosen.variant}, is from scratch, and segment, pack and "
            f"inference.json look for the model of a pretrained init. Name one first, or leave --adopt out: "
            f"{chosen.folder / 'models'} will have the model"
        )
    done = finished_runs(store, runs[0].experiment)
    todo = [run for run in runs if (run.name, run.settings) not in done]
    if dry_run:
        for run in runs:
            state = "to do" if run in todo else "finished"
            print(f"{run.name}  {state}  {shlex.join(run.command())}")
        return 0
    for run in runs:
        if run in todo:
            run.folder.mkdir(parents=True, exist_ok=True)
        else:
            renew_plan(run, done[run.name, run.settings])
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
            "slurm_additional_parameters": slurm or None,
        }
        outcomes = submit(todo, root / "submitit", cluster or "slurm", parameters)
    status = follow(outcomes, len(runs), len(runs) - len(todo))
    if adopt is not None and status == 0:
        _adopt(chosen, Path(bundle))
    if status == 0:
        print(f"Curves: {pages_hint(store, runs[0].experiment)}")
        print(f"Tables and figures: volta3d report --tracking_uri {store} --output {root / 'report'}")
    return status


def _adopt(run: Run, bundle: Path) -> None:
    """Copy a finished run's model, its record and its picture to the bundle's ``models``."""
    from volta_components.method.weights import keep_other_weights, read_record  # imports torch

    models = sorted(path for path in (run.folder / "models").glob("*.pt") if not path.name.startswith("."))
    if len(models) != 1:
        raise InputError(f"{run.folder / 'models'}: {len(models)} models; --adopt needs exactly one")
    target = bundle / "models" / models[0].name
    kept = keep_other_weights(target, read_record(models[0]))
    beside = [models[0].with_suffix(suffix) for suffix in (".json", ".png")]
    for path in (models[0], *(path for path in beside if path.exists())):
        copy_file(path, target.with_name(path.name))
    print(f"{target}: the model of {run.name}{f'; the one before is kept as {kept.name}' if kept else ''}")
