# SPDX-License-Identifier: Apache-2.0
"""Which runs a cross-validation needs, checked before anything is trained."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.data.datalist import load_datalist
from volta_components.downstream.inits import BASE_INIT, SCRATCH, find_overlay
from volta_components.downstream.tracking import run_name
from volta_components.errors import InputError, find_input_error
from volta_components.files import read_json, sha256_file, sha256_json, write_json
from volta_components.method.weights import find_encoder
from volta_components.training.tracking import command_line
from volta_components.training.values import wrong_values

OWN_IDS = ("fold", "fraction", "seed", "run_name", "output_dir", "datalist_path")
# What crossval sets, and the option that says how.
OPTIONS = {
    "fold": "--folds",
    "fraction": "--fractions",
    "seed": "--seed",
    **dict.fromkeys(("run_name", "output_dir", "ckpt_dir", "model_path"), "--output"),
    **dict.fromkeys(("datalist_path", "dataset_dir"), "--datalist"),
    "bundle_root": "--bundle",
    "experiment_name": "--experiment",
    "tracking_uri": "--tracking-uri",
}

# Ids of a bundle that say who is trained on and scored, and check it without reading a volume.
CHECKS = ("parts", "origin", "checks")


@dataclass(frozen=True)
class Run:
    """One training: what ``execute`` needs to start it anywhere.

    Of the configs, later ones win. ``settings`` is a hash of everything that decides the result, ``recipe`` one of what
    all runs of an init share, whatever their fold, fraction and seed. Above one process, torchrun starts one for each
    GPU. ``made_by`` is the command line of the cross-validation; ``plan`` has its inits, fractions and folds, as JSON.
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
    made_by: str = ""
    bundle: str = ""
    plan: str = "{}"

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


def plan(
    bundle: Path,
    datalist: Path,
    inits: Sequence[str],
    folds: int | Sequence[int],
    fractions: Sequence[float],
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
    wanted = list(range(folds)) if isinstance(folds, int) else list(folds)
    absent = [fold for fold in wanted if fold not in available]
    if absent or not wanted:
        none = f"--folds {folds}: no fold at all; a single fold is written [0], and 3 means the first three"
        some = f"{content.path} has the folds {available}, not {absent}; choose --folds among them"
        raise InputError(some if absent else none)
    shares = [float(share) for share in fractions]
    if outside := [share for share in shares if not 0 < share <= 1]:
        raise InputError(f"--fractions {outside}: shares of the training part in (0, 1], such as 0.2,1.0")
    for name, values in {"--inits": inits, "--fractions": shares, "--folds": wanted}.items():
        if len({*values}) < len(values) or not values:
            raise InputError(f"{name} {','.join(map(str, values))}: name each one once")
    if seed < 0:
        raise InputError(f"--seed {seed}: a whole number of at least 0")
    if not re.fullmatch(r"[\w.-]+", experiment or "x"):
        raise InputError(f"--experiment {experiment}: letters, digits, '_', '-' and '.' only")

    last = [find_overlay(configs, name) for name in [*overlays, *(["multi_gpu_train.json"] if processes > 1 else [])]]
    runs = []
    for init in inits:
        files = [configs / "train.json", *([] if init == BASE_INIT else [find_overlay(configs, init)])]
        own, files = _merged(files), [*files, *last]
        merged = _merged(files) if last else own
        _check_ids(merged, settings, shares, files[0])
        if wrong := wrong_values({**merged, **settings}):
            raise InputError.many(f"the config of {init} has values that cannot be", wrong, "Give others by --set.")
        _check_init(init, {**merged, **settings}, own)
        changes = dict(settings)
        if encoder is not None and "encoder_path" in settings:
            raise InputError("--set encoder_path and --encoder: give --encoder alone")
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
            name = run_name(init, fold, share, run_seed)
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
                    made_by=command_line([Path(sys.argv[0]).name, *sys.argv[1:]]),
                    bundle=str(merged.get("bundle", bundle.name)),
                    plan=json.dumps({"inits": [*inits], "fractions": shares, "folds": wanted}),
                )
            )
    runs.sort(key=lambda run: (wanted.index(run.fold), shares.index(run.fraction)))
    for run in runs:
        _check_parts(run)
    return runs


def _check_parts(run: Run) -> None:
    """Let the bundle itself say what is wrong with a run's subjects, as it would when the run starts."""
    from monai.bundle import ConfigParser

    from volta_components.downstream.splits import Parts, check_shares

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
        cause = find_input_error(error)
        if cause is None:
            raise
        raise InputError(f"{run.name}: {cause}") from error


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    """The configuration as ``monai.bundle`` merges it, without its comments."""
    from monai.bundle import ConfigParser

    for path in files:
        read_json(path)
    merged = ConfigParser.load_config_files([str(path) for path in files])
    return {key: value for key, value in merged.items() if key != "_desc_"}


def _check_ids(merged: Mapping[str, Any], settings: Mapping[str, Any], shares: Sequence[float], train: Path) -> None:
    """A misspelt id would be accepted by ``monai.bundle`` and change nothing."""
    rows = [(f"--set {name}", f"give {OPTIONS[name]}") for name in settings if name in OPTIONS]
    if rows:
        raise InputError.many("crossval sets these ids itself", rows, "Nothing was trained.")
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


def _check_init(name: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """A run that starts from something else must not be reported as that of the init."""
    if given.get("init") != own.get("init"):
        raise InputError(
            f"--overlays or --set changes init: the runs of {name} would start from {given['init']!r}; name it in "
            "--inits instead"
        )


def _encoder_hash(merged: Mapping[str, Any], changes: Mapping[str, Any], bundle: Path) -> str:
    """Hash of the weights that a run starts from, which are there; empty for inits that start from scratch."""
    if "encoder_path" not in merged or str(changes.get("init", merged.get("init", ""))).endswith(SCRATCH):
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
