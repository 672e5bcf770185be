# SPDX-License-Identifier: Apache-2.0
"""Cross-validation of a bundle over folds, inits and fractions: ``volta3d crossval``.

Each run is a ``python -m monai.bundle run`` of its own, so that what crossval does can be done by hand: its settings
are the bundle's ``train.json``, the init's overlay, further overlays, and a small ``run.json`` that crossval writes
beside the run's log. MLflow is the only memory: a run counts as done when MLflow says so.
"""

from __future__ import annotations

import ast
import itertools
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.cores import cores
from volta_components.data.datalist import load_datalist
from volta_components.errors import InputError
from volta_components.files import atomic_path, read_json, sha256_file, sha256_json, write_json
from volta_components.weights import find_encoder

TAG = "crossval_settings"
RECIPE_TAG = "crossval_recipe"
BASE_INIT = "volta"
OWN_IDS = ("fold", "fraction", "seed", "run_name", "output_dir", "datalist_path")
# Ids of a bundle that say who is trained on and scored, and check it without reading a volume.
CHECKS = ("parts", "origin", "checks")
LOG_LINES = 12


@dataclass(frozen=True)
class Run:
    """One training: what ``execute`` needs to start it anywhere.

    Attributes:
        name: MLflow's run name.
        variant: the init's overlay.
        fold: which fold is scored.
        fraction: share of the training part.
        folder: log, checkpoints, ``run.json``.
        configs: the configuration files, later ones win.
        tracking_uri: MLflow's store.
        experiment: MLflow's experiment.
        settings: hash of everything that decides the result.
        processes: above 1, torchrun starts so many, one for each GPU.
        recipe: hash of the settings that all runs of an init share, whatever their fold, fraction and seed.
    """

    name: str
    variant: str
    fold: int
    fraction: float
    folder: Path
    configs: tuple[Path, ...]
    tracking_uri: str
    experiment: str
    settings: str
    processes: int = 1
    recipe: str = ""

    @property
    def log(self) -> Path:
        """Everything that the run prints."""
        return self.folder / "log.txt"

    def command(self) -> list[str]:
        """The command line, the same that a user would type."""
        launcher = [sys.executable, "-m"]
        if self.processes > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", "-m"]
        files = repr([str(path) for path in self.configs])
        return [*launcher, "monai.bundle", "run", "--config_file", files, "--tracking", "mlflow"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished``, ``failed`` or ``busy`` (another process works on it)."""

    run: Run
    status: str
    detail: str = ""


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
        gpus_per_run = min(1, len(_visible_gpus())) if executor == "local" else 1
    root = Path(output).resolve()
    store = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlruns.db"
    runs = plan(
        bundle=Path(bundle),
        datalist=Path(datalist),
        inits=_words(inits),
        folds=folds,
        fractions=fractions,
        overlays=_words(overlays),
        settings=_assignments(set, "--set"),
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
    done = _finished(store, runs[0].experiment)
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
        outcomes = _run_here(todo, jobs, gpus_per_run)
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
            "slurm_additional_parameters": _assignments(slurm, "--slurm") or None,
        }
        outcomes = _submit(todo, root / "submitit", cluster or "slurm", parameters)
    status = _follow(outcomes, len(runs), len(runs) - len(todo))
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


def plan(
    bundle: Path,
    datalist: Path,
    inits: Sequence[str],
    folds: int | Sequence[int],
    fractions: float | Sequence[float],
    overlays: Sequence[str],
    settings: Mapping[str, Any],
    encoder: Path | None,
    seed: int,
    root: Path,
    tracking_uri: str,
    experiment: str | None,
    processes: int,
) -> list[Run]:
    """Check everything that can be checked before training, and write each run's ``run.json``.

    Returns:
        The runs: fold by fold, so that an unfinished cross-validation can already be compared.

    Raises:
        InputError: see ``crossval``.
    """
    bundle = bundle.resolve()
    configs = bundle / "configs"
    if not (configs / "train.json").is_file():
        raise InputError(f"{bundle}: not a bundle: it has no configs/train.json")
    content = load_datalist(datalist)
    available = list(range(content.n_folds))
    wanted = list(range(folds)) if isinstance(folds, int) else [int(fold) for fold in folds]
    absent = [fold for fold in wanted if fold not in available]
    if absent or not wanted:
        raise InputError(f"{content.path} has the folds {available}, not {absent}; choose --folds among them")
    shares = [float(share) for share in ([fractions] if isinstance(fractions, (int, float)) else fractions)]
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong or not shares:
        raise InputError(f"--fractions {wrong}: shares of the training part in (0, 1], such as 0.2,1.0")
    for name, values in {"--inits": inits, "--fractions": shares, "--folds": wanted}.items():
        if len({*values}) < len(values) or not values:
            raise InputError(f"{name} {','.join(map(str, values))}: name each one once")
    if not re.fullmatch(r"[\w.-]+", experiment or "x"):
        raise InputError(f"--experiment {experiment}: letters, digits, '_', '-' and '.' only")

    last = [_overlay(name, configs) for name in [*overlays, *(["multi_gpu_train.json"] if processes > 1 else [])]]
    runs = []
    for init in inits:
        files = [configs / "train.json", *([] if init == BASE_INIT else [_overlay(init, configs)]), *last]
        merged = _merged(files)
        _check_ids(merged, settings, shares, files[0])
        changes = dict(settings)
        if encoder is not None and "encoder_path" in merged:
            suffix = str({**merged, **changes}.get("suffix") or "")
            changes["encoder_path"] = str(find_encoder(encoder.resolve(), suffix, required=False))
        identity = {
            "config": merged,
            "changes": {key: value for key, value in changes.items() if key != "encoder_path"},
            "datalist": content.hash,
            "encoder": _encoder_hash(merged, changes, bundle),
        }
        for fold, share in itertools.product(wanted, shares):
            run_seed = 1000 * seed + fold
            name = f"{init}_fold{fold}_frac{share:g}_seed{run_seed}"
            fingerprint = sha256_json({**identity, "fold": fold, "fraction": share, "seed": run_seed})
            # The settings are part of the folder's name: a checkpoint is only ever found by the run that it belongs to.
            folder = root / bundle.name / f"{name}-{fingerprint[:8]}"
            experiment_name = experiment or f"volta3d_{bundle.name}"
            ids = {
                **changes,
                "bundle_root": str(bundle),
                "fold": fold,
                **({"fraction": share} if "fraction" in merged else {}),
                "seed": run_seed,
                "run_name": name,
                # monai.bundle logs the configuration as an artifact only where output_dir is an expression.
                "output_dir": f"${str(folder)!r}",
                # Runs side by side must not write to one models folder.
                **({"ckpt_dir": str(folder / "models")} if "ckpt_dir" in merged else {}),
                "dataset_dir": str(content.path.resolve().parent),
                "datalist_path": str(content.path.resolve()),
                "experiment_name": experiment_name,
                "tracking_uri": tracking_uri,
            }
            runs.append(
                Run(
                    name=name,
                    variant=init,
                    fold=fold,
                    fraction=share,
                    folder=folder,
                    configs=(*files, _write_once(folder / "run.json", ids)),
                    tracking_uri=tracking_uri,
                    experiment=experiment_name,
                    settings=fingerprint,
                    processes=max(1, processes),
                    recipe=sha256_json(identity),
                )
            )
    runs.sort(key=lambda run: (wanted.index(run.fold), shares.index(run.fraction)))
    for run in runs:
        _check_parts(run)
    return runs


def _check_parts(run: Run) -> None:
    """Let the bundle itself say what is wrong with a run's subjects, as it would when the run starts.

    Raises:
        InputError: with the run's name, if labels or classes are missing, a fraction is too small (also for as many
            processes), or there is a leak.
    """
    from monai.bundle import ConfigParser

    from volta_components.finetune import Parts, check_shares

    parser = ConfigParser()
    parser.read_config([str(path) for path in run.configs])
    try:
        for name in CHECKS:
            if name in parser:
                found = parser.get_parsed_content(name)
                # Here is one process; the run has its own number of them.
                if isinstance(found, Parts):
                    check_shares(found.in_use, run.processes)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise InputError(f"{run.name}: {cause}") from error


def execute(run: Run, gpus: str | None = None) -> Outcome:
    """Start one run's process, wait for it, and ask MLflow whether it finished.

    Args:
        run: the run.
        gpus: value of ``CUDA_VISIBLE_DEVICES``; unchanged when None.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with _lock(run.folder / "lock") as lock:
        if lock is None:
            return Outcome(run, "busy", "another process works on it; start the same command again when it has ended")
        run_id = _claim(run)
        if run_id is None:
            return Outcome(run, "finished")
        # The environment variable wins over tracking_uri in MONAI's MLflow handler: say the same in both.
        environment = {**os.environ, "MLFLOW_TRACKING_URI": run.tracking_uri, "PYTHONUNBUFFERED": "1"}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        with run.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(run.command())}\n".encode())
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
            try:
                status = process.wait()
            finally:
                _CHILDREN.discard(process)
                _stop([process])
        client = _client(run.tracking_uri)
        if client.get_run(run_id).data.tags.get("finished") == "true":
            # Whatever happened afterwards: everything is written.
            client.set_terminated(run_id, "FINISHED")
            return Outcome(run, "finished")
        client.set_terminated(run_id, "FAILED")
        reason = f"exit status {status}" if status else "it ended without marking itself finished in MLflow"
        return Outcome(run, "failed", reason)


_CHILDREN: set[subprocess.Popen[bytes]] = set()


class _Job:
    """What submitit runs on the node; told that its time is up, it is queued again and goes on from its checkpoint."""

    def __call__(self, run: Run) -> Outcome:
        return execute(run)

    def checkpoint(self, run: Run) -> Any:
        import submitit

        _stop(_CHILDREN)
        return submitit.helpers.DelayedSubmission(self, run)


def _words(value: Any) -> list[str]:
    """Names separated by commas, as fire gives them: a string, or a tuple when it saw the comma itself."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (tuple, list)) else [value]
    return [str(part).strip() for part in parts if str(part).strip()]


def _assignments(value: Any, option: str) -> dict[str, Any]:
    """``"epochs=2,size=[96,96,96]"`` as a dictionary; values are Python or JSON literals, otherwise text."""
    if isinstance(value, Mapping):
        return dict(value)
    text = value if isinstance(value, str) else ",".join(map(str, value))
    result = {}
    # A comma ends an assignment only where NAME= follows: commas inside lists stay.
    for part in filter(None, re.split(r",(?=\s*[A-Za-z_][\w#:.]*=)", text)):
        name, sign, literal = part.partition("=")
        if not sign or not name.strip():
            raise InputError(f"{option} {part!r}: write NAME=VALUE, several of them separated by commas")
        try:
            result[name.strip()] = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            result[name.strip()] = {"true": True, "false": False, "null": None}.get(literal, literal)
    return result


def _overlay(name: str, configs: Path) -> Path:
    """An overlay by path, or by its name in the bundle's ``configs``."""
    stem = name if name.endswith(".json") else f"{name}.json"
    for path in (configs / stem, Path(stem)):
        if path.is_file():
            return path.resolve()
    others = {"train", "evaluate", "inference", "metadata"}
    known = sorted(path.stem for path in configs.glob("*.json") if path.stem not in others)
    raise InputError(
        f"{configs / stem}: no such overlay; this bundle has {', '.join(known) or 'none'} (and {BASE_INIT})"
    )


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    """The configuration as ``monai.bundle`` merges it, without its comments."""
    from monai.bundle import ConfigParser

    for path in files:
        read_json(path)
    merged = ConfigParser.load_config_files([str(path) for path in files])
    return {key: value for key, value in merged.items() if key != "_desc_"}


def _check_ids(merged: Mapping[str, Any], settings: Mapping[str, Any], shares: Sequence[float], train: Path) -> None:
    """A misspelt id would be accepted by ``monai.bundle`` and change nothing."""
    own = [name for name in OWN_IDS if name in settings]
    if own:
        raise InputError(f"--set {own[0]}: crossval sets this id itself; see --folds, --fractions, --seed and --output")
    needed = [name for name in OWN_IDS if name not in merged and not (name == "fraction" and {*shares} == {1.0})]
    if needed:
        raise InputError(f"{train} has no id {', '.join(needed)}, which a cross-validation changes from run to run")
    for name in settings:
        place: Any = merged
        for part in re.split(r"#|::", name):
            try:
                place = place[int(part) if isinstance(place, list) else part]
            except (LookupError, TypeError, ValueError) as error:
                raise InputError(f"--set {name}: {train} has no such id") from error


def _encoder_hash(merged: Mapping[str, Any], changes: Mapping[str, Any], bundle: Path) -> str:
    """Hash of the weights that a run starts from; empty for inits that start from scratch.

    Raises:
        InputError: if the file is not there.
    """
    if "encoder_path" not in merged or str(changes.get("init", merged.get("init", ""))).endswith("_scratch"):
        return ""
    from monai.bundle import ConfigParser

    ids = {**merged, **changes, "bundle_root": str(bundle)}
    parser = ConfigParser({key: ids[key] for key in ids if isinstance(ids[key], (str, int, float)) or key == "imports"})
    path = parser.get_parsed_content("encoder_path")
    if not path:
        return ""
    path = find_encoder(path, str(ids.get("suffix") or ""), required=False)
    if not path.is_file():
        raise InputError(
            f"{path}: no such encoder; pretrain one (python -m monai.bundle run --config_file "
            "bundles/pretrain/configs/train.json), give another with --encoder, or leave out the inits that need it"
        )
    return sha256_file(path)


def _write_once(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON unless the same is there."""
    if not path.is_file() or read_json(path) != content:
        write_json(path, content)
    return path


def _visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` allows, or every GPU."""
    import torch

    count = torch.cuda.device_count()
    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return named[:count] if named else [str(index) for index in range(count)]


def _client(tracking_uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def _experiment_id(tracking_uri: str, name: str) -> str:
    """The experiment's id; made, with its store, before the first run, so that parallel runs do not race to do it."""
    from mlflow.exceptions import MlflowException

    location = None
    if tracking_uri.startswith("sqlite:///"):
        database = Path(tracking_uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        location = (database.parent.resolve() / "mlruns").as_uri()
    try:
        client = _client(tracking_uri)
        found = client.get_experiment_by_name(name)
        return found.experiment_id if found else client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        raise InputError(f"--tracking-uri {tracking_uri}: MLflow cannot use it ({error})") from error


def _search(client: Any, experiment_id: str, query: str) -> Iterator[Any]:
    token: str | None = None
    while token != "":
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def _finished(tracking_uri: str, experiment: str) -> set[tuple[str, str]]:
    """Names and settings of the finished runs."""
    runs = _search(_client(tracking_uri), _experiment_id(tracking_uri, experiment), "tags.finished = 'true'")
    return {(run.info.run_name, run.data.tags.get(TAG, "")) for run in runs}


def _claim(run: Run) -> str | None:
    """Make sure that MLflow holds exactly one open run of this name, which MONAI's handler then takes up.

    Returns:
        The run's id, or None if it is finished.
    """
    client = _client(run.tracking_uri)
    experiment_id = _experiment_id(run.tracking_uri, run.experiment)
    known = list(_search(client, experiment_id, f"tags.`mlflow.runName` = '{run.name}'"))
    ours = [item for item in known if item.data.tags.get(TAG) == run.settings]
    if any(item.data.tags.get("finished") == "true" for item in ours):
        return None
    for item in known:
        # An open run of this name but of other settings would be taken up instead.
        if item not in ours[:1] and item.info.status != "FINISHED":
            client.set_tag(item.info.run_id, "superseded", "true")
            client.set_terminated(item.info.run_id, "FINISHED")
    if ours:
        client.update_run(ours[0].info.run_id, status="RUNNING")
        return str(ours[0].info.run_id)
    tags = {TAG: run.settings, RECIPE_TAG: run.recipe, "variant": run.variant}
    return str(client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id)


@contextmanager
def _lock(path: Path) -> Iterator[int | None]:
    """An exclusive lock that ends with the last process that holds it; None if somebody else has it."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


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


def _run_here(runs: Sequence[Run], jobs: int, gpus_per_run: int) -> Generator[Outcome, None, None]:
    """Run on this machine, ``jobs`` at a time, GPUs dealt in turn."""
    slots: queue.Queue[str | None] = queue.Queue()
    gpus = _visible_gpus() if gpus_per_run else []
    if len(gpus) < gpus_per_run:
        raise InputError(f"--gpus-per-run {gpus_per_run}: this machine shows {len(gpus)} GPUs")
    for job in range(jobs):
        dealt = [gpus[(job * gpus_per_run + place) % len(gpus)] for place in range(gpus_per_run)]
        slots.put(",".join(dealt) if gpus else None)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))

    def work(run: Run) -> Outcome:
        slot = slots.get()
        try:
            return execute(run, slot)
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


def _submit(
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


def _follow(outcomes: Generator[Outcome, None, None], total: int, done: int) -> int:
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
        print("\nInterrupted. The same command, started again, does what is left.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{total - len(bad)} of {total} runs are finished, {done} of them from before.")
    for outcome in bad:
        lines = [f"\n{outcome.run.name}: {outcome.status}, {outcome.detail}"]
        if outcome.status == "failed":
            lines += [f"  {outcome.run.log} ends with:", *(f"  | {line}" for line in _tail(outcome.run.log))]
        print("\n".join(lines), file=sys.stderr)
    if bad:
        print("\nThe same command, started again, does what is left.", file=sys.stderr)
    return 1 if bad else 0


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
