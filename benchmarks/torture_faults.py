# SPDX-License-Identifier: Apache-2.0
"""Bad inputs and faults for ``torture.py``: what is done, which command runs, what its last lines have to name."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from volta_components.data.datalist import make_content
from volta_components.files import read_json, sha256_file, write_json
from volta_components.training.stores import prepare_store

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ROOT / "bundles"
PATIENCE = 1800  # seconds
# Commands are forked from a process that has imported PyTorch, MONAI and MLflow: imports take most of the time of
# commands as small as these, and nothing can go wrong in them.
FORKS = multiprocessing.get_context("forkserver")
Words = Sequence[str]


@dataclass(frozen=True)
class Place:
    """Where a fault is tried: ``inputs`` are left alone, ``folder`` is made for it."""

    inputs: Path
    folder: Path

    def copy(self, name: str) -> Path:
        """A copy of an input, to be spoilt."""
        source, target = self.inputs / name, self.folder / Path(name).name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
            if source.with_suffix(".json").is_file():
                shutil.copy(source.with_suffix(".json"), target.with_suffix(".json"))
        return target

    def run(
        self, words: Words, most_bytes: int | None = None, during: Callable[[int], None] | None = None
    ) -> tuple[int, str]:
        """Run a command; its status and what it printed.

        Args:
            words: after ``python -m``.
            most_bytes: the largest file that it can write, as on a disk that is full.
            during: called with its process id while it runs.
        """
        log = self.folder / "log.txt"
        log.unlink(missing_ok=True)
        process = start(words, self.folder, most_bytes)
        if during is not None:
            threading.Thread(target=during, args=(process.pid,), daemon=True).start()
        process.join(PATIENCE)
        ended = process.exitcode is not None
        if not ended:
            kill(process)
        output = log.read_text(errors="replace") + "\n(it did not end)" * (not ended)
        assert process.exitcode is not None
        return process.exitcode, output


def start(words: Words, folder: Path, most_bytes: int | None = None) -> BaseProcess:
    """Start ``python -m`` with these words in a folder, as a process group of its own that writes ``log.txt`` there."""
    folder.mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=become, args=(list(words), folder, most_bytes))
    process.start()
    return process


def become(words: Words, folder: Path, most_bytes: int | None) -> None:
    """Go on as ``python -m`` with these words would."""
    os.setsid()
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, descriptor)
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # which forked processes leave out, like atexit's functions
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()


def kill(process: BaseProcess) -> None:
    """SIGKILL to the whole process group."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        process.kill()
    process.join()


@dataclass(frozen=True)
class Verdict:
    """How a fault ended; ``problem`` is empty if it ended as it has to."""

    name: str
    said: str
    problem: str


Fault = Callable[[Place], tuple[int, str, str]]  # status, what was printed, what the last lines must name


def last_words(output: str) -> str:
    """What stands after the last ``error: `` or ``volta3d COMMAND: `` that begins a line, to the end.

    ``prepare`` goes on without a scan that cannot be used, lists it under ``problems`` at the end, and exits with 1.
    """
    begin = r"^(?:error: |volta3d \w+: |\d+ problems:\n)"
    found = list(re.finditer(begin, output.replace("\r", "\n"), re.MULTILINE))
    return output.replace("\r", "\n")[found[-1].end() :].strip() if found else ""


def judge(name: str, fault: Fault, place: Place) -> Verdict:
    """Try a fault in a fresh folder."""
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir(parents=True)
    status, output, named = fault(place)
    words = last_words(output)
    problem = ""
    if status == 0:
        problem = "it ended with status 0"
    elif not words:
        problem = "no last line that is an error: " + (output.strip().splitlines() or ["nothing"])[-1][:150]
    elif "Traceback" in words or "this was not foreseen" in words:
        problem = "not foreseen"
    elif named not in words:
        problem = f"{named} is not named"
    said = words.splitlines()[0] if words else ""
    for path in (place.folder, place.inputs, ROOT):
        said, problem = (text.replace(f"{path}/", "").replace("|", "/") for text in (said, problem))
    return Verdict(name, said[:160], problem)


def cli(place: Place, words: str, named: str, **options: object) -> tuple[int, str, str]:
    """A ``volta3d`` command; ``{i}`` stands for the inputs, ``{b}`` for the bundles."""
    given = [word.format(i=place.inputs, b=BUNDLES) for word in words.split()]
    return *place.run(["volta_components.cli", *given], **options), named  # type: ignore[arg-type]


def train(
    place: Place, named: str, ids: Mapping[str, object] | None = None, task: bool = False, **options: object
) -> tuple[int, str, str]:
    """A pretraining, or a fine-tuning, with MLflow's tracking."""
    write_json(place.folder / "more.json", dict(ids or {}))
    names = ["task.json", "finetune.json"] if task else ["pretrain.json"]
    bundle = "ixi_sex" if task else "pretrain"
    files = [BUNDLES / bundle / "configs" / "train.json", *(place.inputs / name for name in names), "more.json"]
    words = ["monai.bundle", "run", "--config_file", str([str(path) for path in files]), "--tracking", "mlflow"]
    return *place.run(words, **options), named  # type: ignore[arg-type]


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(path: Path, share: float = 0.5) -> None:
    """Flip one bit at a share of a file's length."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    """Keep a share of a file."""
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def set_voxel(path: Path, value: float) -> None:
    """Give a volume one wrong voxel."""
    image = nib.load(path)
    voxels = np.array(image.get_fdata(dtype=np.float32))
    voxels[3, 4, 5] = value
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


def nan_within(path: Path) -> None:
    """Give a scan NaN in the middle of the head; outside of it, NaN counts as air."""
    image = nib.load(path)
    voxels = np.array(image.get_fdata(dtype=np.float32))
    voxels[tuple(slice(side // 2 - 4, side // 2 + 4) for side in voxels.shape)] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


def volume(place: Place, number: int = 0) -> Path:
    """A volume of a copy of the prepared data."""
    data = place.folder / "data"
    if not data.exists():
        place.copy("data")
    return sorted((data / "images").iterdir())[number]


def resign(path: Path) -> None:
    """Make the JSON beside weights fit them again."""
    record = read_json(path.with_suffix(".json"))
    write_json(path.with_suffix(".json"), {**record, "sha256": sha256_file(path)})


def nan_weights(path: Path) -> None:
    """Put NaN into weights, and make their JSON fit."""
    state = load_file(path)
    name = min(state)
    state[name].view(-1)[0] = float("nan")
    save_file(state, path)
    resign(path)


def bomb(path: Path) -> None:
    """A file of a kilobyte that is a tensor of terabytes."""
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)


def with_damage(damage: Callable[[Path], object], number: int = 0, **ids: object) -> Fault:
    """A pretraining on data one volume of which is damaged."""

    def fault(place: Place) -> tuple[int, str, str]:
        path = volume(place, number)
        damage(path)
        return train(place, path.name, {"dataset_dir": str(place.folder / "data"), **ids})

    return fault


def with_weights(
    damage: Callable[[Path], object], words: str = "embed --source {i}/raw --output out --device cpu"
) -> Fault:
    """``embed`` with a damaged encoder."""

    def fault(place: Place) -> tuple[int, str, str]:
        path = place.copy("weights/pretrain/encoder_phantom_tiny.safetensors")
        damage(path)
        return cli(place, f"{words} --bundle {{b}}/pretrain --overlays tiny --weights {path}", path.stem)

    return fault


def with_model(damage: Callable[[Path], object], words: str) -> Fault:
    """A command with a damaged model of the hippocampus bundle."""

    def fault(place: Place) -> tuple[int, str, str]:
        path = place.copy("weights/harp_hippocampus/model_phantom_tiny.pt")
        damage(path)
        return cli(place, words.replace("MODEL", str(path)), path.stem)

    return fault


def with_json(**changes: object) -> Fault:
    """``embed`` with an encoder whose JSON is absurd, in a pretraining bundle's evaluation."""

    def fault(place: Place) -> tuple[int, str, str]:
        path = place.copy("encoder.safetensors")
        record = read_json(path.with_suffix(".json"))
        record["network"] |= changes
        write_json(path.with_suffix(".json"), record)
        files = [str(BUNDLES / "pretrain" / "configs" / "evaluate.json")]
        ids = ["--encoder_path", str(path), "--dataset_dir", str(place.inputs / "data"), "--output_dir", "out"]
        return *place.run(["monai.bundle", "run", "--config_file", str(files), *ids]), next(iter(changes))

    return fault


def with_scan(make: Callable[[Path], object], name: str = "scan.nii") -> Fault:
    """``embed`` of a bad scan."""

    def fault(place: Place) -> tuple[int, str, str]:
        path = place.folder / name
        make(path)
        words = f"embed --source {path} --output out --device cpu --bundle {{b}}/pretrain --overlays tiny --weights "
        return cli(place, words + "{i}/weights/pretrain/encoder_phantom_tiny.safetensors", name)

    return fault


def broken_off(place: Place, ids: Mapping[str, object], task: bool = False) -> None:
    """A run that has been killed after its second checkpoint."""

    def kill(pid: int) -> None:
        last, previous = (place.folder / "run" / name for name in ("checkpoint.pt", "checkpoint_previous.pt"))
        # For a moment, both are names of one file: what is damaged twice could be whole again.
        while not (previous.exists() and not previous.samefile(last)) and psutil.pid_exists(pid):
            time.sleep(0.01)
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()

    train(place, "", {"epochs": 50, **ids}, task, during=kill)


def resumed(damage: Callable[[Place], str], task: bool = False) -> Fault:
    """A run that is broken off, damaged, and started again."""

    def fault(place: Place) -> tuple[int, str, str]:
        ids = {"dataset_dir": str(place.copy("data"))}
        broken_off(place, ids, task)
        named = damage(place)
        return train(place, named, {"epochs": 50, **ids}, task)

    return fault


def both_checkpoints(place: Place) -> str:
    """Damage the last two checkpoints."""
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        flip(place.folder / "run" / name)
    return "checkpoint_previous.pt"


def another_volume(place: Place) -> str:
    """Put other voxels into every volume."""
    for number in range(12):  # whichever are held out
        set_voxel(volume(place, number), 0.123)
    return "sub-0004"


def smaller_volume(place: Place) -> str:
    """Cut a volume."""
    cut(volume(place, 5), 0.9)
    return volume(place, 5).name


def vanished_volume(place: Place) -> str:
    """Remove a volume."""
    path = volume(place, 6)
    path.unlink()
    return path.name


def torn_store(place: Place) -> str:
    """Cut a store that has artifacts."""
    (place.folder / "run" / "mlruns" / "0").mkdir(parents=True)
    (place.folder / "run" / "mlruns" / "0" / "result.json").write_text("{}")
    cut(place.folder / "run" / "mlruns.db")
    return "mlruns.db"


def store_of_text(place: Place) -> str:
    """Put a text in the store's place."""
    (place.folder / "run" / "mlruns.db").write_text("my notes")
    return "mlruns.db"


def with_store(words: str, make: Callable[[Path], object]) -> Fault:
    """A command with a bad MLflow store."""

    def fault(place: Place) -> tuple[int, str, str]:
        path = place.folder / "mlruns.db"
        make(path)
        return cli(place, f"{words} --tracking-uri sqlite:///{path}", path.name)

    return fault


def half_store(path: Path) -> None:
    """Half of a store that has a run with an artifact."""
    prepare_store(f"sqlite:///{path}")
    MlflowClient(f"sqlite:///{path}").create_run("0")
    (path.with_name("mlruns") / "0").mkdir(parents=True)
    (path.with_name("mlruns") / "0" / "result.json").write_text("{}")
    cut(path)


def other_database(path: Path) -> None:
    """A SQLite file of something else."""
    with sqlite3.connect(path) as store:
        store.execute("CREATE TABLE patients (name)")
    store.close()


def when_training(act: Callable[[Place, int], None], named: str, task: bool = False, **ids: object) -> Fault:
    """A fault in the middle of a training."""

    def fault(place: Place) -> tuple[int, str, str]:
        def during(pid: int) -> None:
            while not (place.folder / "run" / "checkpoint.pt").exists() and psutil.pid_exists(pid):
                time.sleep(0.01)
            if psutil.pid_exists(pid):
                act(place, pid)

        return train(place, named, {"epochs": 400, **ids}, task, during=during)

    return fault


def kill_loader(place: Place, pid: int) -> None:
    """Kill the loading processes."""
    for child in psutil.Process(pid).children(recursive=True):
        if "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()


def remove_folder(place: Place, pid: int) -> None:
    """Move the run's folder away."""
    (place.folder / "run").rename(place.folder / "elsewhere")


def lock_store(place: Place, pid: int) -> None:
    """Lock the store until the process has ended."""
    store = sqlite3.connect(place.folder / "run" / "mlruns.db", isolation_level=None, timeout=60)
    store.execute("BEGIN EXCLUSIVE")
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)


def second_training(place: Place) -> tuple[int, str, str]:
    """Two trainings in one folder."""
    results: list[tuple[int, str, str]] = []
    stop = threading.Event()

    def during(pid: int) -> None:
        while not (place.folder / "run" / "checkpoint.pt").exists() and psutil.pid_exists(pid):
            time.sleep(0.01)
        results.append(train(place, "run", {"epochs": 400}))
        psutil.Process(pid).kill()
        stop.set()

    train(place, "run", {"epochs": 400}, during=during)
    stop.wait(PATIENCE)
    return results[0]


def empty_datalist(place: Place) -> tuple[int, str, str]:
    """A datalist without items."""
    content = read_json(place.copy("data") / "datalist.json")
    empty = make_content("fake", content["spacing"], content["shape"], 0, 3, [], [])
    write_json(place.folder / "data" / "datalist.json", empty)
    return train(place, "datalist.json", {"dataset_dir": str(place.folder / "data")})


def half_datalist(place: Place) -> tuple[int, str, str]:
    """Half of a datalist."""
    cut(place.copy("data") / "datalist.json")
    return train(place, "datalist.json", {"dataset_dir": str(place.folder / "data")})


def raw_scan(place: Place, damage: Callable[[Path], object]) -> tuple[int, str, str]:
    """``prepare`` of a data set with one bad scan."""
    raw = place.copy("raw")
    path = sorted(raw.glob("sub-*/**/anat/*T1w.nii.gz"))[0]
    damage(path)
    return cli(place, f"prepare --layout bids --source {raw} --output out --spacing 3 --shape 48,64,64", path.name)


def file_instead_of_folder(place: Place, words: str) -> tuple[int, str, str]:
    """A file where the output belongs."""
    (place.folder / "taken").write_text("")
    return cli(place, words, "taken")


def nan_encoder(place: Place) -> tuple[int, str, str]:
    """A fine-tuning from weights with NaN."""
    path = place.copy("encoder.safetensors")
    nan_weights(path)
    return train(place, path.name, {"encoder_path": str(path)}, task=True)


def json_of(path: Path, content: str) -> None:
    """Another JSON beside weights."""
    path.with_suffix(".json").write_text(content)


def four_d(path: Path) -> None:
    """A volume with a fourth axis."""
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8, 3), np.float32), np.eye(4)), path)


def file_run(place: Place) -> tuple[int, str, str]:
    """A file where the run's folder belongs."""
    (place.folder / "run").write_text("")
    return train(place, "run")


def other_rate(place: Place) -> tuple[int, str, str]:
    """Another learning rate than that of the run that is resumed."""
    broken_off(place, {})
    return train(place, "learning_rate", {"epochs": 50, "learning_rate": 0.123})


CROSSVAL = "crossval --datalist {i}/data/datalist.json --folds 1 --output runs --bundle {b}/ixi_sex"
TASK = "--overlays {i}/task.json --encoder {i}/encoder.safetensors"
EMBED = "embed --output out --device cpu --bundle {b}/pretrain --overlays tiny"
SEGMENT = "segment --source {i}/raw --output out --device cpu --bundle {b}/harp_hippocampus --overlays tiny"
PACK = "pack --bundle {b}/harp_hippocampus --overlays tiny --output out"
LR = {"learning_rate": 1e30, "warmup_epochs": 0}

FAULTS: dict[str, Fault] = {
    "phantom: no subject": lambda p: cli(p, "phantom --output out --subjects 0", "--subjects"),
    "phantom: unknown spacing": lambda p: cli(p, "phantom --output out --subjects 2 --spacing 5", "--spacing"),
    "phantom: output is a file": lambda p: file_instead_of_folder(p, "phantom --output taken --subjects 2 --spacing 3"),
    "phantom: full disk": lambda p: cli(
        p, "phantom --output out --subjects 2 --spacing 3 --workers 1", "out", most_bytes=20_000
    ),
    "prepare: no source": lambda p: cli(p, "prepare --layout bids --source none --output out", "none"),
    "prepare: empty source": lambda p: cli(p, "prepare --layout bids --source . --output out", "."),
    "prepare: cut scan": lambda p: raw_scan(p, cut),
    "prepare: flipped bit in a scan": lambda p: raw_scan(p, flip),
    "prepare: text instead of a scan": lambda p: raw_scan(p, lambda path: path.write_text("hello")),
    "prepare: scan with NaN": lambda p: raw_scan(p, nan_within),
    "prepare: 4-D scan": lambda p: raw_scan(p, four_d),
    "prepare: unknown layout": lambda p: cli(p, "prepare --layout bidz --source {i}/raw --output out", "--layout"),
    "check: no datalist": lambda p: cli(p, "check none.json {i}/data/datalist.json", "none.json"),
    "merge: no datalist": lambda p: cli(p, "merge none.json {i}/data/datalist.json --output out.json", "none.json"),
    "crossval: no bundle": lambda p: cli(
        p, "crossval --bundle none --datalist {i}/data/datalist.json --output runs", "none"
    ),
    "crossval: no datalist": lambda p: cli(p, "crossval --bundle {b}/ixi_sex --datalist none.json", "none.json"),
    "crossval: no such fold": lambda p: cli(p, f"{CROSSVAL} {TASK} --folds [9]", "--folds"),
    "crossval: unknown init": lambda p: cli(p, f"{CROSSVAL} {TASK} --inits volte", "volte"),
    "crossval: unknown id": lambda p: cli(p, f"{CROSSVAL} {TASK} --set epoch=3", "epoch"),
    "crossval: no encoder": lambda p: cli(
        p, f"{CROSSVAL} --overlays {{i}}/task.json --encoder none.safetensors", "none.safetensors"
    ),
    "crossval: torn store": with_store(f"{CROSSVAL} {TASK}", half_store),
    "crossval: store is text": with_store(f"{CROSSVAL} {TASK}", lambda path: path.write_text("my notes")),
    "crossval: store is another database": with_store(f"{CROSSVAL} {TASK}", other_database),
    "report: no store": with_store("report --output out", lambda path: None),
    "report: torn store": with_store("report --output out", half_store),
    "report: empty store": with_store("report --output out", lambda path: path.write_bytes(b"")),
    "report: store is text": with_store("report --output out", lambda path: path.write_text("my notes")),
    "embed: no source": lambda p: cli(p, f"{EMBED} --source none", "none"),
    "embed: no weights": lambda p: cli(p, f"{EMBED} --source {{i}}/raw --weights none.safetensors", "none.safetensors"),
    "embed: flipped bit in the weights": with_weights(flip),
    "embed: cut weights": with_weights(cut),
    "embed: NaN weights": with_weights(nan_weights),
    "embed: JSON that is none": with_weights(lambda path: json_of(path, "{")),
    "embed: 4-D scan": with_scan(four_d),
    "embed: text instead of a scan": with_scan(lambda path: path.write_text("hello")),
    "embed: empty file": with_scan(lambda path: path.write_bytes(b"")),
    "embed: no such device": lambda p: cli(
        p, "embed --output out --bundle {b}/pretrain --overlays tiny --source {i}/raw --device cuda:7", "--device"
    ),
    "evaluate: a billion layers": with_json(num_layers=10**9),
    "evaluate: a hundred million wide": with_json(hidden_size=10**8),
    "evaluate: a trillion wide MLP": with_json(mlp_dim=10**12),
    "evaluate: a vast image": with_json(img_size=[16 * 10**6] * 3),
    "segment: tensor bomb": with_model(lambda path: (bomb(path), resign(path)), f"{SEGMENT} --weights MODEL"),
    "segment: flipped bit in the model": with_model(flip, f"{SEGMENT} --weights MODEL"),
    "segment: text instead of a model": with_model(
        lambda path: (path.write_text("hello"), resign(path)), f"{SEGMENT} --weights MODEL"
    ),
    "pack: tensor bomb": with_model(lambda path: (bomb(path), resign(path)), f"{PACK} --model MODEL"),
    "pack: flipped bit in the model": with_model(flip, f"{PACK} --model MODEL"),
    "pack: no record": with_model(lambda path: path.with_suffix(".json").unlink(), f"{PACK} --model MODEL"),
    "train: no datalist": lambda p: train(p, "none/datalist.json", {"dataset_dir": "none"}),
    "train: empty datalist": empty_datalist,
    "train: cut datalist": half_datalist,
    "train: volume missing": with_damage(Path.unlink),
    "train: volume cut": with_damage(cut),
    "train: volume with NaN": with_damage(lambda path: set_voxel(path, np.nan)),
    "train: volume exchanged": with_damage(lambda path: set_voxel(path, 0.123)),
    "train: volumes of another spacing": lambda p: train(p, "--spacing", {"spacing": 2.0}),
    "train: batch of none": lambda p: train(p, "--batch_size", {"batch_size": 0}),
    "train: no such fold": lambda p: train(p, "fold 7", {"validation_fold": 7}),
    "train: output is a file": file_run,
    "train: NaN encoder": nan_encoder,
    "train: diverging fine-tuning": lambda p: train(p, "diverged", LR, task=True),
    "train: diverging pretraining": lambda p: train(p, "not finite", LR),
    "train: full disk": lambda p: train(p, "checkpoint.pt", {"experiment_name": "x"}, most_bytes=1_000_000),
    "train: a second one in the folder": second_training,
    "train: loader killed": when_training(kill_loader, "--num_workers", num_workers=1),
    "train: folder moved away": when_training(remove_folder, "run"),
    "train: store locked": when_training(lock_store, "mlruns.db"),
    "resume: both checkpoints damaged": resumed(both_checkpoints),
    "resume: volumes exchanged": resumed(another_volume),
    "resume: volume cut": resumed(smaller_volume),
    "resume: volume missing": resumed(vanished_volume),
    "resume: torn store with runs": resumed(torn_store, task=True),
    "resume: store is text": resumed(store_of_text),
    "resume: other settings": other_rate,
}
