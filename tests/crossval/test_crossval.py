# SPDX-License-Identifier: Apache-2.0
"""Plans without processes; then real processes of a bundle that trains in milliseconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_bundle import empty_store, write_bundle, write_datalist
from mlflow import MlflowClient

from volta_components.cli import main
from volta_components.crossval import execute as module
from volta_components.crossval.command import crossval
from volta_components.crossval.execute import Outcome, _tail, execute
from volta_components.crossval.plan import Run, plan, read_assignments
from volta_components.crossval.store import claim, run_lock
from volta_components.errors import InputError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the fake bundle and its datalist, and processes that find the fake bundle's code."""
    write_bundle(tmp_path)
    write_datalist(tmp_path / "datalist.json")
    empty_store(tmp_path / "runs")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "tests" / "helpers"), str(root)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(place: Path, **changes) -> list[Run]:
    keywords = {
        "bundle": place / "fake",
        "datalist": place / "datalist.json",
        "inits": ["volta", "linear_scratch"],
        "folds": 2,
        "fractions": (0.5, 1.0),
        "overlays": ["tiny"],
        "settings": {},
        "encoder": None,
        "seed": 3,
        "root": place / "runs",
        "tracking_uri": f"sqlite:///{place}/runs/mlruns.db",
        "experiment": None,
        "processes": 0,
        **changes,
    }
    return plan(**keywords)


def test_every_cell_once_and_comparable_cells_share_their_seed(place):
    runs = planned(place)
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2
    assert runs[0].name == "volta_fold0_frac0.5_seed3000"
    assert [(run.fold, run.fraction) for run in runs] == [(f, p) for f in (0, 1) for p in (0.5, 1.0) for _ in (1, 2)]
    for run in runs:
        ids = json.loads(run.configs[-1].read_text())
        assert ids["seed"] == 3000 + run.fold
        assert (ids["fold"], ids["fraction"]) == (run.fold, run.fraction)
    assert [path.name for path in runs[1].configs] == ["train.json", "linear_scratch.json", "tiny.json", "run.json"]
    assert [path.name for path in runs[0].configs] == ["train.json", "tiny.json", "run.json"]


def test_more_processes_than_scans_of_a_part_are_refused_while_planning(place):
    path = place / "fake/configs/train.json"
    train = json.loads(path.read_text())
    train["imports"].append("$from volta_components.downstream.splits import Parts")
    path.write_text(json.dumps({**train, "parts": "$Parts([{}] * 9, [{}] * 2, [{}] * 4)"}))
    assert planned(place, processes=2)
    with pytest.raises(InputError, match=r"volta_fold0_frac0\.5_seed3000: 3 processes(?s:.)*validation  2 scans"):
        planned(place, processes=3)


def test_settings_hash_follows_what_decides_the_result_and_nothing_else(place):
    def hashes(**changes):
        return {run.variant: run.settings for run in planned(place, folds=1, fractions=1.0, **changes)}

    before = hashes()
    assert hashes(root=place / "elsewhere", tracking_uri="http://127.0.0.1:1") == before
    changed = hashes(settings={"epochs": 5})
    assert changed["volta"] != before["volta"] and changed["linear_scratch"] != before["linear_scratch"]
    (place / "fake/models/encoder.safetensors").write_bytes(b"other weights")
    assert hashes()["volta"] != before["volta"]
    assert hashes()["linear_scratch"] == before["linear_scratch"]
    train = place / "fake/configs/train.json"
    train.write_text(train.read_text().replace("a comment", "another comment"))
    assert hashes()["linear_scratch"] == before["linear_scratch"]
    train.write_text(train.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    assert hashes()["linear_scratch"] != before["linear_scratch"]


def test_all_runs_of_an_init_share_a_recipe(place):
    def recipes(**changes):
        found = {(run.variant, run.recipe) for run in planned(place, **changes)}
        assert len(found) == 2  # whatever their fold, fraction and seed
        return dict(found)

    before = recipes()
    assert before["volta"] != before["linear_scratch"]
    assert recipes(seed=4, fractions=(0.3,), root=place / "elsewhere") == before
    assert recipes(overlays=[])["volta"] != before["volta"]
    run = planned(place)[0]
    assert MlflowClient(run.tracking_uri).get_run(claim(run)).data.tags["crossval_recipe"] == before["volta"]


def test_several_processes_go_through_torchrun(place):
    run = planned(place, processes=2)[0]
    assert run.configs[-2].name == "multi_gpu_train.json"
    assert run.command()[2:6] == ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inits": ["volta", "unknown"]}, "this bundle has linear_scratch, multi_gpu_train, tiny"),
        ({"inits": ["volta", "volta"]}, "each one once"),
        ({"folds": 3}, r"has the folds \[0, 1\], not \[2\]"),
        ({"folds": 0}, "has the folds"),
        ({"fractions": (0.0, 1.0)}, r"\(0, 1\]"),
        ({"fractions": 20}, r"\(0, 1\]"),
        ({"fractions": (0.1, 1.0)}, r"volta_fold0_frac0\.1_seed3000: fraction 0\.1 is too small for fold 0"),
        ({"settings": {"epoch": 2}}, "--set epoch: .*train.json has no such id"),
        ({"settings": {"train#trainer#max_epoch": 2}}, "no such id"),
        ({"settings": {"fold": 1}}, "crossval sets this id itself"),
        ({"encoder": Path("nothing.safetensors")}, "nothing.safetensors: no such encoder"),
        ({"encoder": Path("fake/configs")}, r"fake/configs/models/encoder\.safetensors: no such encoder"),
        ({"bundle": Path("datalist.json")}, "not a bundle"),
        ({"datalist": Path("missing.json")}, "missing.json: no such datalist"),
        ({"datalist": Path("fake/configs/tiny.json")}, "not a datalist"),
        ({"experiment": "a'b"}, "letters, digits"),
    ],
)
def test_bad_input_is_named_before_anything_runs(place, changes, message):
    with pytest.raises(InputError, match=message):
        planned(place, **changes)


def test_an_encoder_is_found_in_a_bundles_folder(place):
    def ids(encoder: str) -> dict[str, str]:
        run = planned(place, encoder=place / encoder)[0]
        return {**json.loads(run.configs[-1].read_text()), "settings": run.settings}

    folder, file = ids("fake"), ids("fake/models/encoder.safetensors")
    assert folder["encoder_path"] == file["encoder_path"] == str(place / "fake/models/encoder.safetensors")
    assert folder["settings"] == file["settings"]


def test_nested_ids_can_be_set(place):
    run = planned(place, settings={"train#trainer#max_epochs": 1, "hidden#0": 2})[0]
    assert json.loads(run.configs[-1].read_text())["hidden#0"] == 2


def test_assignments():
    assert read_assignments("epochs=2,size=[96,96,96],name=a b,amp=false,path=/x=y", "--set") == {
        "epochs": 2,
        "size": [96, 96, 96],
        "name": "a b",
        "amp": False,
        "path": "/x=y",
    }
    assert read_assignments((), "--set") == {}
    with pytest.raises(InputError, match="NAME=VALUE"):
        read_assignments("epochs", "--set")


def test_the_cause_in_a_log_is_found(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "$ old\nValueError: of an earlier attempt\n\n$ new\n  0%|  | 1\r 50%|  | 2\nTraceback\n"
        "volta_components.errors.InputError: fold 1 has no AD:\n  sub-1  CN\nRemedy.\n\nThe above exception was\n"
        + "  frame\n" * 40
        + "RuntimeError: Failed to evaluate x\n"
    )
    lines = _tail(log)
    assert lines[:3] == ["volta_components.errors.InputError: fold 1 has no AD:", "  sub-1  CN", "Remedy."]
    assert lines[-1] == "RuntimeError: Failed to evaluate x"
    assert not any("earlier" in line for line in lines)


def test_a_run_is_taken_as_long_as_its_child_lives(place):
    run = planned(place)[0]
    with run_lock(run.folder / "lock") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert execute(run).status == "busy"
    child.communicate(b"\n")
    with run_lock(run.folder / "lock") as lock:
        assert lock is not None


def test_a_claim_leaves_one_open_run_of_a_name(place):
    first = planned(place)[0]
    other = planned(place, settings={"epochs": 7})[0]
    assert first.name == other.name and first.folder != other.folder
    client = MlflowClient(first.tracking_uri)
    one = claim(first)
    client.set_terminated(one, "FINISHED")  # as MONAI's handler does before predictions are written
    assert claim(first) == one
    assert client.get_run(one).info.status == "RUNNING"
    two = claim(other)
    # MONAI's handler takes up any run of the name that is not FINISHED: the first must not be it.
    assert client.get_run(one).info.status == "FINISHED" and client.get_run(two).info.status == "RUNNING"
    client.set_tag(one, "finished", "true")
    assert claim(first) is None


def test_jobs_and_executor_are_checked(place):
    for options in ({"jobs": 0}, {"executor": "cloud"}, {"gpus_per_run": 99}):
        with pytest.raises(InputError, match="--"):
            crossval("fake", "datalist.json", folds=1, **options)


def epochs(folder: Path) -> list[str]:
    return folder.joinpath("epochs.txt").read_text().splitlines()


@pytest.mark.slow
def test_failures_are_reported_others_go_on_and_the_broken_one_is_resumed(place, monkeypatch, capsys):
    command = {"bundle": "fake", "datalist": "datalist.json", "folds": [1], "inits": "volta,linear_scratch", "jobs": 2}
    command |= {"set": "epochs=2"}
    monkeypatch.setenv("FAKE_FAIL", "volta_fold1_frac1_seed1")
    assert crossval(**command) == 1
    output = capsys.readouterr()
    assert "1 of 2 runs are finished" in output.out
    broken, well = (next(place.glob(f"runs/fake/{init}_fold1*")) for init in ("volta", "linear_scratch"))
    assert f"{broken}/log.txt ends with:" in output.err and "RuntimeError: told to fail" in output.err
    assert epochs(well) == ["1 of 1", "2 of 1"]
    before = (well / "log.txt").read_bytes()

    monkeypatch.delenv("FAKE_FAIL")
    assert crossval(**command) == 0
    assert "2 of 2 runs are finished, 1 of them from before" in capsys.readouterr().out
    assert (well / "log.txt").read_bytes() == before
    # The first epoch was told to fail after its checkpoint was written: it is not trained again.
    assert epochs(broken) == ["1 of 1", "2 of 1"]
    client = MlflowClient(f"sqlite:///{place}/runs/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("volta3d_fake").experiment_id])
    assert sorted((run.info.run_name, run.data.tags["finished"]) for run in runs) == [
        ("linear_scratch_fold1_frac1_seed1", "true"),
        ("volta_fold1_frac1_seed1", "true"),
    ]
    names = [item.path for item in client.list_artifacts(runs[0].info.run_id)]
    assert "predictions" in names and any(name.startswith("config_") for name in names)


@pytest.mark.slow
def test_slurm_jobs_on_this_machine_and_torchrun_inside_a_run(place, capsys):
    """Submitit's local cluster in place of SLURM; two processes on the CPU in place of two GPUs."""
    command = {"bundle": "fake", "datalist": "datalist.json", "folds": 1, "set": "epochs=1", "executor": "slurm"}
    assert crossval(**command, cluster="local", gpus_per_run=2, overlays="tiny") == 0
    assert "1 of 1 runs are finished, 0 of them" in capsys.readouterr().out
    assert epochs(next(place.glob("runs/fake/volta_fold0*"))) == ["1 of 2"]


def test_no_slurm_here_is_said(place):
    if shutil.which("srun"):
        pytest.skip("SLURM is here")
    with pytest.raises(InputError, match="--executor"):
        crossval("fake", "datalist.json", folds=1, executor="slurm")


def test_a_job_whose_time_is_up_is_queued_again(place):
    run = planned(place)[0]
    delayed = module._Job().checkpoint(run)
    assert isinstance(delayed.function, module._Job) and delayed.args == (run,)
    assert Outcome(run, "finished").detail == ""


def test_an_option_given_twice_is_not_half_forgotten(place, capsys):
    words = ["crossval", "--bundle", "fake", "--datalist", "datalist.json", "--set", "epochs=1", "--set=hidden=[1]"]
    assert main(words) == 2
    assert "--set is given twice; separate values by commas" in capsys.readouterr().err


def test_command_line_values_arrive_as_meant(place, capsys):
    words = ["crossval", "--bundle", "fake", "--datalist", "datalist.json", "--inits", "volta,linear_scratch"]
    words += ["--folds", "1", "--fractions", "0.5,1.0", "--set", "epochs=1,hidden=[1,2]", "--overlays", "tiny.json"]
    assert main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"{init}_fold0_frac{fraction}_seed0" for fraction in ("0.5", "1") for init in ("volta", "linear_scratch")
    ]
    assert all("to do" in line and "monai.bundle run --config_file" in line for line in lines)
    assert json.loads(next(place.glob("runs/fake/*/run.json")).read_text())["hidden"] == [1, 2]
