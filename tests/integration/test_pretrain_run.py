# SPDX-License-Identifier: Apache-2.0
"""Pretraining in real processes: repeated, killed, resumed, shared by two, recorded, used, and fed with rubbish."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_process import BundleProcess, last_error
from csv_rows import read_rows
from method_helpers import assert_equal_states
from mlflow import MlflowClient
from prepared import PRETRAIN, ROOT, TINY_SIZES, make_prepared
from pretrain_workplace import EPOCHS, LENGTH, Workplace, environment, fresh_process
from safetensors.torch import load_file

from volta_components.data.datalist import load_datalist
from volta_components.files import read_json, sha256_file, write_json
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import load_encoder
from volta_components.training.record import shown_settings
from volta_components.training.tracking import group_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def unbroken(workplace: Workplace) -> str:
    """Name of a run that nothing disturbed: a process of its own, with loading in a worker, tracked by MLflow."""
    options = ("--run_name", "unbroken", "--num_workers", "1", "--tracking", "mlflow")
    done = fresh_process("monai.bundle", *workplace.arguments(*options))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return "unbroken"


def assert_equal_runs(workplace: Workplace, one: str, other: str) -> None:
    """Student, teacher, losses, optimiser and monitor of two checkpoints are equal, and so are the exports."""
    assert_equal_states(workplace.checkpoint(one), workplace.checkpoint(other))
    assert workplace.encoder(one).read_bytes() == workplace.encoder(other).read_bytes()


def test_the_same_seed_gives_the_same_weights(workplace: Workplace, unbroken: str) -> None:
    """Bit for bit; another process, no worker, no tracking."""
    workplace.run("--run_name", "again")
    assert_equal_runs(workplace, unbroken, "again")
    state = workplace.checkpoint("again")
    assert state is not None
    assert state["engine"]["iteration"] == EPOCHS * LENGTH
    workplace.run("--run_name", "other", "--seed", "1", "--epochs", "1")
    exported, other = (load_file(workplace.encoder(name)) for name in (unbroken, "other"))
    assert not torch.equal(exported["norm.bias"], other["norm.bias"])


def test_a_killed_run_ends_as_one_that_was_never_broken(workplace: Workplace, unbroken: str) -> None:
    name = "killed"

    def is_within_an_epoch() -> bool:
        return workplace.iteration(name) > LENGTH and workplace.iteration(name) % LENGTH != 0

    options = ("--run_name", name, "--tracking", "mlflow")
    started = time.monotonic()
    workplace.start(*options).kill_when(is_within_an_epoch)
    duration = time.monotonic() - started
    assert workplace.iteration(name) in (11, 14, 19, 22)
    assert not workplace.encoder(name).exists()

    moments = np.random.default_rng().uniform(0, duration, size=3)
    for moment in moments:
        process = workplace.start(*options)
        time.sleep(moment)
        process.kill()

    workplace.run(*options)
    assert_equal_runs(workplace, unbroken, name)

    # Once more it does nothing.
    before = {path: sha256_file(path) for path in (workplace.folder / "runs" / name).rglob("*.p*")}
    stamp = (workplace.folder / "runs" / name / "checkpoint.pt").stat().st_mtime_ns
    exported = sha256_file(workplace.encoder(name))
    again = workplace.run(*options)
    assert f"resumed {workplace.folder}/runs/{name}/checkpoint.pt at mini-batch 24" in again.output
    assert {path: sha256_file(path) for path in (workplace.folder / "runs" / name).rglob("*.p*")} == before
    assert (workplace.folder / "runs" / name / "checkpoint.pt").stat().st_mtime_ns == stamp
    assert sha256_file(workplace.encoder(name)) == exported

    # MLflow has one run, which went on, with every mean at its step; what was started in vain says so.
    client = MlflowClient(f"sqlite:///{workplace.folder}/runs/{name}/mlruns.db")
    experiment = client.get_experiment_by_name("volta3d_pretrain")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in runs if run.data.tags.get("superseded") != "true"]
    assert len(runs) > 1
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "step/loss_global")
    assert {point.step for point in history} >= set(range(4, 25, 4))


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, -signal.SIGINT, "\ninterrupted: saved"), (signal.SIGTERM, 143, "saved")],
)
def test_ctrl_c_and_sigterm_lose_nothing(
    workplace: Workplace, unbroken: str, number: int, status: int, message: str
) -> None:
    """In a process group with a loading worker, as a terminal or a scheduler signals it."""
    name = f"stopped{number}"
    words = workplace.arguments("--run_name", name, "--num_workers", "1", "--checkpoint_minutes", "0")
    log = workplace.folder / f"{name}.txt"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "monai.bundle", *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )
    while not workplace.iteration(name):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(timeout=120) == status
    output = log.read_text()
    assert "stopping once the accumulation window is finished and saved" in output
    place = workplace.iteration(name)
    assert f"{message} at mini-batch {place}; the same command resumes there" in output
    assert "Traceback" not in output
    assert not workplace.encoder(name).exists()
    assert 6 <= place < EPOCHS * LENGTH
    assert place % LENGTH % 3 == 0
    workplace.run("--run_name", name, "--checkpoint_minutes", "0")
    assert_equal_runs(workplace, unbroken, name)


SHARED = ("train", "multi_gpu_train")


def start_pair(workplace: Workplace, *options: str) -> list[BundleProcess]:
    """Two processes with the variables that torchrun would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return [
        workplace.start(*options, configs=SHARED, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU; gloo")
def test_two_processes_train_resume_and_export(workplace: Workplace) -> None:
    """Eight volumes: four mini-batches an epoch for each process, windows of 3 and 1."""
    for process in start_pair(workplace, "--run_name", "pair"):
        assert process.wait() == 0, process.output[-3000:]
    first, second = start_pair(workplace, "--run_name", "torchrun")
    first.kill_when(lambda: workplace.iteration("torchrun") in (3, 7, 11))
    second.kill()
    assert workplace.iteration("torchrun") in (3, 7, 11)
    done = fresh_process(
        "torch.distributed.run",
        *("--standalone", "--nproc_per_node", "2", "-m", "monai.bundle"),
        *workplace.arguments("--run_name", "torchrun", "--device", "cpu", configs=SHARED),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_equal_runs(workplace, "pair", "torchrun")
    state = workplace.checkpoint("torchrun")
    assert state is not None
    assert state["engine"]["iteration"] == EPOCHS * 4
    assert state["settings"]["processes"] == 2
    assert isinstance(load_encoder(workplace.encoder("torchrun")), VoltaViT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU; gloo")
def test_sigterm_to_one_of_two_processes_ends_both_at_the_same_window(workplace: Workplace) -> None:
    """Windows of 3 and 1 in epochs of four; numbers are read every second mini-batch."""
    name = "signalled"
    first, second = start_pair(workplace, "--run_name", name, "--epochs", "500", "--log_interval", "2")
    while not workplace.iteration(name):
        assert first.is_alive, first.output[-3000:]
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    assert [first.wait(timeout=60), second.wait(timeout=60)] == [1, 143], first.output[-3000:] + second.output[-3000:]
    place = workplace.iteration(name)
    assert place % 4 in (0, 3) and place < 500 * 4
    for process in (first, second):
        assert f"saved at mini-batch {place}; the same command resumes there" in process.output
        assert "Traceback" not in process.output


CURVES = {
    *("loss", "loss_global", "loss_patch", "loss_reconstruction"),
    *("learning_rate", "teacher_momentum", "teacher_temperature", "patch_teacher_temperature"),
    *("gradient_norm", "volumes_per_second", "effective_rank"),
    *("global_teacher_entropy", "patch_teacher_entropy", "global_divergence", "patch_divergence"),
    *("global_centre_alignment", "patch_centre_alignment", "global_information", "patch_information"),
    *("validation_reconstruction", "validation_mean_view", "validation_share_better"),
}


def test_mlflow_has_the_whole_run(workplace: Workplace, unbroken: str) -> None:
    folder = workplace.folder / "runs" / unbroken
    client = MlflowClient(f"sqlite:///{folder}/mlruns.db")
    experiment = client.get_experiment_by_name("volta3d_pretrain")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == unbroken
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) >= group_metrics(dict.fromkeys(CURVES - {"effective_rank"}, 0.0), "train/").keys()
    assert all(np.isfinite(value) for value in run.data.metrics.values())

    datalist = load_datalist(workplace.data)
    settings = {
        "seed": "0",
        "epochs": "3",
        "accumulation_steps": "3",
        "hidden_size": "32",
        "datalist_hash": datalist.hash,
        "student_temperature": "0.1",
        "teacher_momentum": "[0.996, 1.0]",
        "global_loss.targets.class": "CentredTargets",
        "views.student_intensity.gamma": "1.15",
    }
    assert {name: run.data.params[name] for name in settings} == settings
    state = workplace.checkpoint(unbroken)
    assert state is not None
    assert shown_settings(state["settings"]).keys() <= run.data.params.keys()
    assert run.data.tags["seed"] == "0"
    assert run.data.tags["datalist_hash"] == datalist.hash
    assert run.data.tags["bundle"] == "pretrain"
    assert run.data.tags["code_version"].startswith("0.")

    # Means over four mini-batches: 24 mini-batches give six of them, each at its step.
    history = client.get_metric_history(run.info.run_id, "step/loss_global")
    assert [point.step for point in history] == [4, 8, 12, 16, 20, 24]
    history = client.get_metric_history(run.info.run_id, "train/loss_global")
    assert [point.step for point in history] == [1, 2, 3]
    (first, *_) = client.get_metric_history(run.info.run_id, "step/teacher_momentum")
    momenta = [1.0 - 0.004 * (1 + np.cos(np.pi * i / 23)) / 2 for i in range(24)]
    assert first.value == pytest.approx(np.mean(momenta[:4]), rel=1e-6)

    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert any(path.startswith("config") and path.endswith(".json") for path in artifacts)
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "pictures")]
    assert pictures == [f"pictures/reconstruction_{epoch:04d}.png" for epoch in (1, 2, 3)]
    assert [item.path for item in client.list_artifacts(run.info.run_id, "encoder")] == ["encoder/unbroken.json"]


def test_the_export_tells_where_it_comes_from(workplace: Workplace, unbroken: str) -> None:
    state, record = workplace.checkpoint(unbroken), read_json(workplace.encoder(unbroken).with_suffix(".json"))
    assert state is not None
    exported = load_file(workplace.encoder(unbroken))
    for name, value in exported.items():
        assert torch.equal(value, state["teacher"][f"network.{name}"]), name
    provenance = record["provenance"]
    assert provenance["datalist_hash"] == load_datalist(workplace.data).hash
    assert provenance["settings"] == shown_settings(state["settings"])
    assert (provenance["epochs"], provenance["iterations"]) == (EPOCHS, EPOCHS * LENGTH)
    assert provenance["code_version"].startswith("0.")
    check = read_json(workplace.folder / "runs" / unbroken / "reconstruction.json")
    assert check["volumes"] == 4
    assert 0 < check["reconstruction"] < 1


def use(workplace: Workplace, config: str, unbroken: str, *options: str) -> BundleProcess:
    log = workplace.folder / f"log{next(workplace.logs)}.txt"
    places = ["--dataset_dir", str(workplace.data), "--encoder_path", str(workplace.encoder(unbroken))]
    names = ("hidden_size", "mlp_dim", "num_layers", "num_heads", "summary_heads", "global_size", "volume_size")
    known = read_json(PRETRAIN / f"{config}.json")
    places += [word for name in names if name in known for word in (f"--{name}", str(TINY_SIZES[name]))]
    arguments = ["run", "--config_file", str(PRETRAIN / f"{config}.json"), *places, "--num_workers", "0"]
    return BundleProcess([*arguments, "--device", "$torch.device('cpu')", *options], ROOT, log)


def embeddings_of(workplace: Workplace, unbroken: str) -> np.ndarray:
    """Summaries, computed here."""
    network = load_encoder(workplace.encoder(unbroken))
    volumes = [nib.load(item["image"]).get_fdata(dtype=np.float32) for item in load_datalist(workplace.data).items]
    with torch.no_grad():
        return network(torch.from_numpy(np.stack(volumes))[:, None]).numpy()


def test_evaluation_probes_the_encoder(workplace: Workplace, unbroken: str) -> None:
    folder = workplace.folder / "evaluation"
    options = ["--output_dir", str(folder), "--neighbours", "3"]
    process = use(workplace, "evaluate", unbroken, *options)
    assert process.wait() != 0
    # Twelve patients, of whom those of fold 0 were held out of the pretraining.
    held_out = sum(item["fold"] == 0 for item in load_datalist(workplace.data).items)
    assert 0 < held_out < 12
    assert f"was pretrained on {12 - held_out} of the 12 scored patients" in process.output
    assert not folder.exists()
    process = use(workplace, "evaluate", unbroken, *options, "--allow_leak", "True")
    assert process.wait() == 0, process.output[-5000:]
    rows = read_json(folder / "probes.json")
    assert {row["leak"] for row in rows} == {"allowed"}
    assert {row["model_sha256"] for row in rows} == {sha256_file(workplace.encoder(unbroken))}
    assert {(row["label"], row["encoder"], row["probe"]) for row in rows} == {
        (label, encoder, probe)
        for label in ("sex", "diagnosis")
        for encoder in ("volta", "random")
        for probe in ("knn", "linear")
    } | {("age", encoder, "ridge") for encoder in ("volta", "random", "voxels")} | {
        (label, "voxels", probe) for label in ("sex", "diagnosis") for probe in ("knn", "linear")
    }
    for row in rows:
        assert row["scans"] == 12 and row["low"] <= row["value"] <= row["high"]
        assert row["label"] == "age" or (row["positive"] == 6 and row["low"] >= 0 and row["high"] <= 1)
    assert "value (95 % interval, out of fold), chance" in process.output
    table = read_rows(folder / "embeddings.csv")
    assert [row["subject_id"] for row in table] == [f"sub-{i:04d}" for i in range(12)]
    values = np.array([[float(row[f"summary_{i}"]) for i in range(32)] for row in table])
    np.testing.assert_allclose(values, embeddings_of(workplace, unbroken), rtol=1e-4, atol=1e-5)
    assert (folder / "embeddings.png").read_bytes()[:4] == b"\x89PNG"


def test_inference_writes_embeddings_and_attention(workplace: Workplace, unbroken: str) -> None:
    folder = workplace.folder / "inference"
    process = use(workplace, "inference", unbroken, "--output_dir", str(folder))
    assert process.wait() == 0, process.output[-5000:]
    items, table = load_datalist(workplace.data).items, read_rows(folder / "embeddings.csv")
    assert [(row["subject_id"], row["session"]) for row in table] == [(i["subject_id"], i["session"]) for i in items]
    values = np.array([[float(row[f"summary_{i}"]) for i in range(32)] for row in table])
    np.testing.assert_allclose(values, embeddings_of(workplace, unbroken), rtol=1e-4, atol=1e-5)
    maps = sorted((folder / "attention").iterdir())
    assert [path.name for path in maps] == [f"sub-{i:04d}_ses-M000_attention.nii.gz" for i in range(12)]
    network = load_encoder(workplace.encoder(unbroken))
    for item, path in list(zip(items, maps))[:2]:
        source, result = nib.load(item["image"]), nib.load(path)
        assert result.shape == source.shape
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-5)
        image = torch.from_numpy(source.get_fdata(dtype=np.float32))[None, None]
        with torch.no_grad():
            weights = network.summariser.attention(network.encode(image)).view(2, 2, 2).numpy()
        # Corners of the map lie beyond the outermost tokens' centres and hold their weights; the mean is 1.
        corners = result.get_fdata()[np.ix_([0, -1], [0, -1], [0, -1])]
        np.testing.assert_allclose(corners, weights * 8, rtol=1e-4)


def save_volume(path: Path, voxels: np.ndarray, spacing: float = 1.0) -> None:
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([spacing] * 3 + [1.0])), path)


def spoil(voxels: np.ndarray, value: float) -> np.ndarray:
    result = voxels.copy()
    result[3, 4, 5] = value
    return result


# Each takes the voxels of one volume and its path.
BAD_VOLUMES: dict[str, tuple[Callable[[np.ndarray, Path], Any], str]] = {
    "missing": (lambda v, path: path.unlink(), "no such file"),
    "truncated": (lambda v, path: path.write_bytes(path.read_bytes()[:60000]), "truncated"),
    "NaN": (lambda v, path: save_volume(path, spoil(v, np.nan)), "contains NaN or Inf (1 voxels)"),
    "infinite": (lambda v, path: save_volume(path, spoil(v, np.inf)), "contains NaN or Inf (1 voxels)"),
    "4-D": (lambda v, path: save_volume(path, np.stack([v, v], axis=-1)), "4"),
    "constant": (lambda v, path: save_volume(path, np.full_like(v, 0.25)), "constant: every voxel is 0.25"),
    "out of range": (lambda v, path: save_volume(path, v * 255), "instead of 0 to 1"),
    "shape": (lambda v, path: save_volume(path, v[:-1]), "shape 31x32x32 where the datalist says 32x32x32"),
    "spacing": (lambda v, path: save_volume(path, v, 2.0), "spacing 2x2x2 mm where the datalist says 1x1x1"),
    "another file": (lambda v, path: save_volume(path, v * 0.5), "not what was prepared"),
}


def fails(process: BundleProcess) -> str:
    """The error that a process must end with."""
    status = process.wait()
    assert status not in (0, -9), process.output[-3000:]
    assert process.error, process.output[-3000:]
    assert "mini-batch" not in process.output.split("\nerror: ")[0]
    return process.error


def test_bad_volumes_are_all_named_before_training(workplace: Workplace, tmp_path: Path) -> None:
    """One data set with one bad file of each kind: all are listed at once."""
    data = make_prepared(tmp_path / "data")
    paths = [Path(item["image"]) for item in load_datalist(data).items]
    for path, (damage, _) in zip(paths, BAD_VOLUMES.values()):
        damage(nib.load(path).get_fdata(dtype=np.float32), path)
    for options, named in ((["--deep_check", "True"], list(range(10))), ([], [0, 1, 4, 7, 8])):
        error = fails(workplace.start("--run_name", "bad", "--dataset_dir", str(data), *options))
        headline, *rows, remedy = error.splitlines()
        assert headline == f"{data}/datalist.json: {len(named)} files of 12 items cannot be used:"
        assert "volta3d prepare" in remedy
        assert len(rows) == len(named)
        for number, row in zip(named, rows):
            assert f"sub-{number:04d}" in row
            assert paths[number].name in row
            assert list(BAD_VOLUMES.values())[number][1] in row
        assert not (workplace.folder / "runs" / "bad").exists()


def test_a_changed_volume_ends_the_run_when_it_is_first_read(workplace: Workplace, tmp_path: Path) -> None:
    """With what was done before saved; put back, the run goes on."""
    data = make_prepared(tmp_path / "data")
    path = Path(load_datalist(data).items[1]["image"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + bytes(4))
    options = ("--run_name", "changed", "--dataset_dir", str(data), "--epochs", "1", "--num_workers", "1")
    process = workplace.start(*options)
    assert process.wait() not in (0, -9), process.output[-3000:]
    assert f"sub-0001: {path}: its content is not what was prepared (another hash); remove" in process.error
    path.write_bytes(whole)
    process = workplace.start(*options)
    assert process.wait() == 0, process.output[-3000:]


def test_evaluation_and_inference_refuse_bad_volumes_too(workplace: Workplace, unbroken: str, tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data", 4, 2)
    path = Path(load_datalist(data).items[1]["image"])
    save_volume(path, spoil(nib.load(path).get_fdata(), np.nan))
    for config in ("evaluate", "inference"):
        error = fails(use(workplace, config, unbroken, "--dataset_dir", str(data), "--output_dir", str(tmp_path / "o")))
        assert path.name in error
        assert "contains NaN" in error
    assert not (tmp_path / "o").exists()


def empty_datalist(folder: Path) -> None:
    content = read_json(folder / "datalist.json")
    write_json(folder / "datalist.json", {**content, "training": []})


def cut_datalist(folder: Path) -> None:
    path = folder / "datalist.json"
    path.write_text(path.read_text()[:500])


def test_bad_datalists_are_named(workplace: Workplace, tmp_path: Path) -> None:
    for name, damage, words in (
        ("missing", shutil.rmtree, "no such datalist; make one with: volta3d prepare"),
        ("empty", empty_datalist, "the datalist is empty"),
        ("cut", cut_datalist, "not valid JSON"),
    ):
        data = make_prepared(tmp_path / name, 4, 2)
        damage(data)
        error = fails(workplace.start("--run_name", "bad", "--dataset_dir", str(data)))
        assert str(data / "datalist.json") in error
        assert words in error


def test_bad_settings_are_named(workplace: Workplace) -> None:
    for options, words in (
        (("--spacing", "2.0"), ("spacing 1x1x1, but 2x2x2 is expected", "--spacing 2,2,2", "change the config")),
        (("--volume_size", "[48,48,48]"), ("shape 32x32x32, but 48x48x48 is expected", "--shape 48,48,48")),
        (("--patch_size", "[9,9,9]"), ("(32, 32, 32)", "patches of (9, 9, 9)", "a multiple of the patch")),
        (("--local_size", "[24,24,24]"), ("(24, 24, 24)", "patches of (16, 16, 16)", "a multiple of the patch")),
    ):
        error = fails(workplace.start("--run_name", "bad", *options))
        for part in words:
            assert part in error, error


def test_fewer_volumes_than_processes(workplace: Workplace, tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data", 5, 2)  # four of them are held out
    for process in start_pair(workplace, "--run_name", "bad", "--dataset_dir", str(data)):
        assert fails(process) == "1 volumes cannot be shared by 2 processes; start fewer processes"


def test_a_run_is_not_resumed_with_other_settings(workplace: Workplace, unbroken: str) -> None:
    shutil.copytree(workplace.folder / "runs" / unbroken, workplace.folder / "runs" / "resumed")
    before = sha256_file(workplace.folder / "runs" / "resumed" / "checkpoint.pt")
    options = ("--run_name", "resumed", "--learning_rate", "0.001", "--head_out_dim", "16")
    error = fails(workplace.start(*options))
    assert "runs/resumed/checkpoint.pt belongs to a run with other settings" in error
    rows = [line.split() for line in error.splitlines()[1:-1]]
    assert rows == [["head_out_dim", "32", "16"], ["learning_rate", "0.0005", "0.001"]]
    assert "--run_name" in error.splitlines()[-1]
    assert sha256_file(workplace.folder / "runs" / "resumed" / "checkpoint.pt") == before


def test_in_a_fresh_clone_it_says_what_to_run_first(tmp_path: Path) -> None:
    """The README's command, with no data yet; at the paper's full size, so it must fail before the network is built."""
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    done = fresh_process("monai.bundle", "run", "--config_file", "bundles/pretrain/configs/train.json", folder=tmp_path)
    assert done.returncode == 1
    error = last_error(done.stderr)
    assert error == (
        "data/pretrain/datalist.json: no such datalist; make one with: volta3d prepare --layout LAYOUT "
        "--source FOLDER --output data/pretrain"
    ), done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_an_encoder_that_is_missing_or_changed_is_named(workplace: Workplace, unbroken: str, tmp_path: Path) -> None:
    places = ("--output_dir", str(tmp_path / "o"), "--encoder_path")
    error = fails(use(workplace, "inference", unbroken, *places, str(tmp_path / "none.safetensors")))
    assert f"{tmp_path}/none.safetensors: no such model; train it first" in error
    for suffix in (".safetensors", ".json"):
        shutil.copy(workplace.encoder(unbroken).with_suffix(suffix), tmp_path / f"changed{suffix}")
    content = bytearray((tmp_path / "changed.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(content)
    error = fails(use(workplace, "inference", unbroken, *places, str(tmp_path / "changed.safetensors")))
    assert "changed.safetensors: its SHA-256 is not that of changed.json" in error
    assert json.loads((tmp_path / "changed.json").read_text())["sha256"] == sha256_file(workplace.encoder(unbroken))
