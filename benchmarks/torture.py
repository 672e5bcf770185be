# SPDX-License-Identifier: Apache-2.0
"""Kills at random moments, bad inputs and faults: does everything end well, or say what is wrong?

    python benchmarks/torture.py --kills 100 [--only pretrain --only crossval] [--folder runs/torture]
    python benchmarks/torture.py --faults [--only "NaN weights"]

Kills: a command is started as a process group of its own, killed by SIGKILL at a random moment of the time that it
takes, and the same command is started again. It has to end with status 0 and with the same bytes (volumes, weights,
tables, zip) as a run that was never killed; with MLflow tracking on, with one finished run of a name; and without
unfinished files. Faults: see ``torture_faults.py``; a command has to end with another status, and the last lines on the
screen have to be one message that names the file or the option.

What has been done is kept in ``--folder``: the same command resumes there. The table is printed and written to
``benchmarks/results/torture.md``. A kill takes about half a minute on one core, a fault ten seconds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cyclopts
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT)]

from labelled_scans import make_labelled  # noqa: E402
from packed import random_weights  # noqa: E402
from prepared import TINY_SIZES, make_prepared  # noqa: E402
from torture_faults import FAULTS, FORKS, PATIENCE, Place, judge, kill, start  # noqa: E402

from volta_components.data.datalist import make_content  # noqa: E402
from volta_components.files import read_json, sha256_file, write_json, write_text  # noqa: E402
from volta_components.training.record import code_version  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "torture.md"
BUNDLES = ROOT / "bundles"
NETWORK = {name: TINY_SIZES[name] for name in ("hidden_size", "mlp_dim", "num_layers", "num_heads", "summary_heads")}
STORE = "whole/crossval/runs/mlruns.db"  # which two commands use
BUSY: dict[str, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        words: after ``python -m``, as in a shell.
        outputs: what must be the same, as patterns below the folder in which it runs.
        store: MLflow's database there; empty where there is no tracking.
        runs: names of runs that it must hold.
    """

    words: str
    outputs: Sequence[str]
    store: str = ""
    runs: int = 1


def environment() -> dict[str, str]:
    """One thread, no GPU, and nothing of MLflow's that this process may have."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    return {**keep, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def set_up(folder: Path) -> None:
    """Inputs of all commands: phantoms, a prepared data set, weights, overlays."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["volta_components.cli", "phantom", "--output", str(folder / "raw"), "--subjects", "4", "--spacing", "3"]
    subprocess.run([sys.executable, "-m", *words], env=environment(), check=True, capture_output=True)
    make_prepared(folder / "data")
    make_labelled(folder / "labelled", count=6, folds=3)
    whole = read_json(folder / "data" / "datalist.json")
    for name, part in (("first", slice(6)), ("second", slice(6, None))):
        items = whole["training"][part]
        content = make_content("fake", whole["spacing"], whole["shape"], 0, whole["n_folds"], items, [])
        write_json(folder / "data" / f"{name}.json", content)
    shutil.copytree(folder / "raw", folder / "served")
    from volta_components.method.networks import VoltaViT
    from volta_components.method.weights import save_encoder

    side = TINY_SIZES["global_size"]
    network = VoltaViT(img_size=side, decoder=False, **NETWORK)
    save_encoder(folder / "encoder.safetensors", network, {"datalist_hash": "0" * 64, "patient_ids": []})
    for bundle in ("pretrain", "ixi_sex", "harp_hippocampus"):
        random_weights(bundle, folder / "weights" / bundle)
    shared = {"dataset_dir": str(folder / "data"), "num_workers": 0, "device": "$torch.device('cpu')", "epochs": 3}
    pretrain = {"warmup_epochs": 1, "teacher_temperature_epochs": 1, "accumulation_steps": 2, "checkpoint_minutes": 0}
    places = {"ckpt_dir": "models", "output_dir": "$'run'", "run_name": "run"}
    pretrain |= {"validation_fold": 0, "picture_interval": 2, "encoder_path": "models/encoder.safetensors"}
    write_json(folder / "pretrain.json", {**shared, **places, **TINY_SIZES, **pretrain})
    task = {"image_size": side, "volume_size": side, "input_extent_mm": side, "spacing": 1.0, "unfrozen_blocks": 1}
    task |= {"batch_size": 2, "warmup_epochs": 1, "checkpoint_minutes": 0, **NETWORK}
    write_json(folder / "task.json", {**shared, **task})
    write_json(folder / "sizes.json", {**task, "dataset_dir": "data"})
    write_json(folder / "finetune.json", {**places, "encoder_path": str(folder / "encoder.safetensors")})
    segmentation = {"volume_size": side, "image_size": [32, 32, 16], "feature_size": 4, "unet_channels": [4, 8, 16]}
    segmentation |= {"unet_strides": [2, 2], "unet_res_units": 0, "val_interval": 1, "crops_per_volume": 1}
    segmentation |= {"batch_size": 2, "warmup_epochs": 1, "checkpoint_minutes": 0, **places}
    write_json(folder / "segmentation.json", {**shared, **segmentation, "dataset_dir": str(folder / "labelled")})
    (folder / "ready").touch()


def bundle_run(bundle: str, *overlays: Path | str) -> str:
    """``python -m monai.bundle run`` with tracking; overlays lie in the bundle, or where a path says."""
    configs = BUNDLES / bundle / "configs"
    files = [str(configs / overlay) for overlay in ("train.json", *overlays)]
    return shlex.join(["monai.bundle", "run", "--config_file", str(files), "--tracking", "mlflow"])


def cases(folder: Path) -> dict[str, Case]:
    """The commands, by name."""
    cli, weights = "volta_components.cli", folder / "weights"
    scans = f"--device cpu --overlays tiny --output out --source {folder}/raw"
    encoder, model = "encoder_phantom_tiny.safetensors", "model_phantom_tiny.pt"
    # What the unkilled cross-validation leaves, which it does before these two commands are tried.
    store = f"sqlite:///{folder}/{STORE}"
    trained = next(folder.glob("whole/crossval/runs/ixi_sex/*volta*/models/model.pt"), "none")
    return {
        "init": Case(f"{cli} init study", ["study/**/*"]),
        "fetch": Case(f"{cli} fetch {folder}/served.json --output out", ["out/*/**/*.nii.gz"]),
        "phantom": Case(f"{cli} phantom --output raw --subjects 6 --spacing 3 --seed 1 --workers 1", ["raw/**/*"]),
        "prepare": Case(
            f"{cli} prepare --layout bids --source {folder}/raw --output data --spacing 3 --shape 48,64,64 --workers 1",
            ["data/**/*.nii*", "data/datalist.json"],
        ),
        "merge": Case(
            f"{cli} merge {folder}/data/first.json {folder}/data/second.json --output both.json", ["both.json"]
        ),
        "pretrain": Case(
            bundle_run("pretrain", folder / "pretrain.json"), ["models/*", "run/pictures/*"], "run/mlruns.db"
        ),
        "fine-tune": Case(
            bundle_run("ixi_sex", folder / "task.json", folder / "finetune.json"),
            ["models/model.pt", "run/predictions.csv"],
            "run/mlruns.db",
        ),
        "segmentation": Case(
            bundle_run("harp_hippocampus", "unet_scratch.json", folder / "segmentation.json"),
            ["models/*.pt", "run/predictions/scores.csv", "run/predictions/masks/*"],
            "run/mlruns.db",
        ),
        "crossval": Case(
            f"{cli} crossval --bundle {BUNDLES}/ixi_sex --datalist {folder}/data/datalist.json "
            f"--inits volta,vit_scratch --folds 1 --overlays {folder}/task.json "
            f"--encoder {folder}/encoder.safetensors --output runs",
            ["runs/ixi_sex/*/models/*.pt", "runs/ixi_sex/*/predictions.csv"],
            "runs/mlruns.db",
            2,
        ),
        "report": Case(
            f"{cli} report --output report --bootstrap 100 --tracking-uri {store}",
            ["report/tables/*.csv", "report/figures/*.png"],
        ),
        "embed": Case(
            f"{cli} embed {scans} --attention --bundle {BUNDLES}/pretrain --weights {weights}/pretrain/{encoder}",
            ["out/embeddings.csv", "out/embeddings.npz", "out/attention/**/*.nii.gz"],
        ),
        "segment": Case(
            f"{cli} segment {scans} --bundle {BUNDLES}/harp_hippocampus --weights {weights}/harp_hippocampus/{model}",
            ["out/**/*.nii.gz", "out/*.csv"],
        ),
        "pack": Case(
            f"{cli} pack --bundle {BUNDLES}/ixi_sex --overlays tiny --output out --model {weights}/ixi_sex/{model}",
            ["out/*.zip"],
        ),
        "register": Case(
            f"{cli} register --bundle {BUNDLES}/ixi_sex --overlays {folder}/sizes.json --model {trained} "
            f"--tracking-uri {store}",
            ["../../whole/crossval/runs/mlruns/*/artifacts/model/artifacts/**/*"],
            f"../../{STORE}",
            2,
        ),
    }


@contextlib.contextmanager
def served(folder: Path) -> Iterator[None]:
    """Serve scans on loopback for ``fetch``, a quarter of a second each, and write the manifest that names them."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def do_GET(self) -> None:
            time.sleep(0.25)
            super().do_GET()

    handler = functools.partial(Handler, directory=str(folder / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scans = sorted((folder / "served").rglob("*.nii.gz"))
        address = f"http://127.0.0.1:{server.server_port}"
        names = [path.relative_to(folder / "served").as_posix() for path in scans]
        facts = {"name": "toys", "title": "Toys", "homepage": address, "licence": "CC0 1.0", "citation": "None"}
        files = [
            {"path": name, "url": f"{address}/{name}", "sha256": sha256_file(path)}
            for name, path in zip(names, scans, strict=True)
        ]
        write_json(folder / "served.json", {**facts, "files": files})
        yield
        server.shutdown()


def work(process: BaseProcess, most: float = float("inf")) -> float:
    """Let a command run to its end, or until it and its children have worked for so long; seconds of CPU time.

    Not the clock's time, which follows what else the machine does. One that hangs is killed.
    """
    began, used = time.monotonic(), 0.0
    while process.exitcode is None and used < most:
        process.join(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
            used = max(used, sum(t.user + t.system + t.children_user + t.children_system for t in times))
        if time.monotonic() - began > PATIENCE:
            kill(process)
    return used


def hashes(case: Case, place: Path) -> dict[str, str]:
    """SHA-256 of what must be the same, by path; code versions, hours and memory may differ between two runs."""
    files = {path for pattern in case.outputs for path in place.glob(pattern) if path.is_file()}
    contents = {str(path.relative_to(place)): path.read_bytes() for path in sorted(files)}
    return {
        name: hashlib.sha256(re.sub(rb'"code_version": "[^"]*"|"cost": \{[^}]*\}', b"", content)).hexdigest()
        for name, content in contents.items()
    }


def run_problems(case: Case, place: Path) -> list[str]:
    """What is wrong with MLflow's runs: each name has to be there once, and finished."""
    if not case.store:
        return []
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place / case.store}")
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
    counted = [run for run in runs if run.data.tags.get("superseded") != "true"]
    names = Counter(run.info.run_name for run in counted)
    wrong = [f"{count} runs {name}" for name, count in names.items() if count != 1]
    wrong += [f"{run.info.run_name} is {run.info.status}" for run in counted if run.info.status != "FINISHED"]
    return wrong if len(names) == case.runs else [*wrong, f"{len(names)} names instead of {case.runs}"]


def whole(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Hashes and duration of a run that is not killed; made once."""
    place, record = folder / "whole" / name, folder / f"whole-{name}.json"
    if not record.exists():
        shutil.rmtree(place, ignore_errors=True)
        process = start(shlex.split(case.words), place)
        seconds, status = work(process), process.exitcode
        found = hashes(case, place)
        problems = run_problems(case, place)
        if status or not found or problems:
            raise SystemExit(f"{name} does not work unkilled: status {status}, {problems}, see {place / 'log.txt'}")
        write_json(record, {"seconds": seconds, "hashes": found})
    return dict(json.loads(record.read_text()))


def kill_once(name: str, case: Case, folder: Path, seed: str) -> dict[str, Any]:
    """Start, kill, start again; what came of it."""
    with BUSY["whole"]:
        expected = whole(name, case, folder)
    with BUSY[STORE if STORE in case.words else seed]:
        return _kill_once(name, case, folder, expected, seed)


def _kill_once(name: str, case: Case, folder: Path, expected: Mapping[str, Any], seed: str) -> dict[str, Any]:
    dice = random.Random(seed)
    place = folder / "trial" / seed.replace(" ", "-")  # as deep as the unkilled one: some files hold relative paths
    shutil.rmtree(place, ignore_errors=True)
    moment = dice.uniform(0.05, 0.98) * expected["seconds"]
    process = start(shlex.split(case.words), place)
    work(process, moment)
    was_alive = process.exitcode is None
    if was_alive:
        kill(process)
    process = start(shlex.split(case.words), place)
    work(process)
    status = process.exitcode
    now = hashes(case, place)
    other = sorted(
        path for path in expected["hashes"].keys() | now.keys() if expected["hashes"].get(path) != now.get(path)
    )
    row = {
        "case": name,
        "moment": round(moment, 2),
        "alive": was_alive,
        "status": status,
        "other": other,
        "runs": run_problems(case, place),
        "partial": [str(path.relative_to(place)) for path in place.rglob(".partial-*")],
    }
    if status or other or row["runs"] or row["partial"]:
        kept = folder / "failed" / f"{name}-{time.time():.0f}"
        shutil.copytree(place, kept)
        row["kept"] = str(kept)
    shutil.rmtree(place)
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What has been tried already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Keep what has been tried."""
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def kill_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of each command, and of all."""
    lines = [
        "| command | kills | finished by the same command | same bytes | one run a run | no unfinished files |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    names = list(dict.fromkeys(row["case"] for row in rows))
    for name in [*names, "all"]:
        own = [row for row in rows if name in (row["case"], "all")]
        good = [sum(not row[key] for row in own) for key in ("status", "other", "runs", "partial")]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(map(str, good)) + " |")
    return lines


def write_report(folder: Path) -> None:
    """Print the tables and write them with command, version and date."""
    kills, faults = read_rows(folder / "kills.jsonl"), read_rows(folder / "faults.jsonl")
    lines = ["# Kills, bad inputs and faults", "", f"{datetime.now():%Y-%m-%d}, {code_version()}, CPU.", ""]
    if kills:
        late = sum(not row["alive"] for row in kills)
        lines += [
            f"`python benchmarks/torture.py --kills {len(kills)}`: SIGKILL to the whole process group after a random "
            "share of the CPU time that a run takes; then the same command again. Expected: status 0, the bytes of a "
            "run that was never killed, one finished run of a name in MLflow. "
            f"{late} of the {len(kills)} had ended before the kill.",
            "",
            *kill_table(kills),
            "",
        ]
        keys = ("status", "other", "runs", "partial")
        bad = [row for row in kills if any(row[key] for key in keys)]
        shown = [
            f"- {row['case']} after {row['moment']} s: { ({key: row[key] for key in keys if row[key]}) }" for row in bad
        ]
        lines += shown + [""] * bool(bad)

    if faults:
        good = sum(not row["problem"] for row in faults)
        lines += [
            f"`python benchmarks/torture.py --faults`: {good} of {len(faults)} bad inputs and faults end with a status "
            "other than 0 and, as the last lines on the screen, one message that names the file or option.",
            "",
            "| what is wrong | last lines begin with | |",
            "|---|---|---|",
        ]
        lines += [f"| {row['name']} | {row['said']} | {row['problem'] or 'ok'} |" for row in faults] + [""]
    write_text(RESULTS, "\n".join(lines))
    print("\n".join(lines))


def torture(
    kills: int = 0,
    faults: bool = False,
    only: Sequence[str] = (),
    folder: Path = ROOT / "runs" / "torture",
    seed: int = 0,
    workers: int = 1,
) -> None:
    """Kill, spoil, and report.

    Args:
        kills: Number of kills, in turn over the commands; those of earlier calls count.
        faults: Try the bad inputs and faults.
        only: Names of commands or faults.
        folder: Where inputs, trials and what came of them are kept.
        seed: Of the moments.
        workers: Kills or faults at a time.
    """
    folder = folder.resolve()
    os.environ.update(environment())
    FORKS.set_forkserver_preload(["__main__", "torch", "monai.bundle", "mlflow", "volta_components.bundle"])
    set_up(folder)
    known = cases(folder)
    done = read_rows(folder / "kills.jsonl")
    if kills:
        whole("crossval", known["crossval"], folder)
        known = cases(folder)
    chosen = {name: case for name, case in known.items() if not only or name in only}
    with served(folder) if kills else contextlib.nullcontext():

        def once(number: int) -> None:
            name = list(chosen)[number % len(chosen)]
            row = kill_once(name, chosen[name], folder, f"{seed} {number}")
            add_row(folder / "kills.jsonl", row)
            print(json.dumps(row), flush=True)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(once, range(len(done), kills)))
    if faults:
        tried = {row["name"] for row in read_rows(folder / "faults.jsonl")}

        def one(name: str) -> None:
            place = Place(folder, folder / "fault" / re.sub(r"\W+", "-", name))
            row = judge(name, FAULTS[name], place)
            add_row(folder / "faults.jsonl", asdict(row))
            print(json.dumps(asdict(row)), flush=True)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, [name for name in FAULTS if name not in tried and (not only or name in only)]))
    write_report(folder)


if __name__ == "__main__":
    cyclopts.run(torture)
