# SPDX-License-Identifier: Apache-2.0
"""Which runs there are, what they share, and what is wrong before any of them starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from planned_runs import planned

from volta_components.crossval.store import claim
from volta_components.errors import InputError


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


def test_fractions_of_many_digits_are_told_apart(place):
    runs = planned(place, inits=["volta"], folds=1, fractions=(0.3333333, 0.33333334))
    assert [run.name for run in runs] == [f"volta_fold0_frac{share}_seed3000" for share in (0.3333333, 0.33333334)]
    tags = MlflowClient(runs[0].tracking_uri).get_run(claim(runs[0])).data.tags
    assert float(tags["fraction"]) == json.loads(runs[0].plan)["fractions"][0]


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
        return {run.variant: run.settings for run in planned(place, folds=1, fractions=(1.0,), **changes)}

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
        ({"folds": 0}, r"a single fold is written \[0\]"),
        ({"fractions": (0.0, 1.0)}, r"\(0, 1\]"),
        ({"fractions": (20,)}, r"\(0, 1\]"),
        ({"fractions": (0.1, 1.0)}, r"volta_fold0_frac0\.1_seed3000: fraction 0\.1 is too small for fold 0"),
        ({"settings": {"epoch": 2}}, "--set epoch: .*train.json has no such id"),
        ({"settings": {"train#trainer#max_epoch": 2}}, "no such id"),
        ({"settings": {"fold": 1, "seed": 3}}, r"(?s)crossval sets.*--set fold  give --folds.*--set seed  give --seed"),
        ({"settings": {"experiment_name": "a"}}, "--set experiment_name  give --experiment"),
        ({"settings": {"dataset_dir": "a"}}, "--set dataset_dir  give --datalist"),
        ({"settings": {"ckpt_dir": "a"}}, "--set ckpt_dir  give --output"),
        ({"settings": {"model_path": "a"}}, "--set model_path  give --output"),
        ({"seed": -1}, "--seed -1: a whole number of at least 0"),
        ({"settings": {"bundle_root": "a"}}, "--set bundle_root  give --bundle"),
        ({"settings": {"encoder_path": "a"}, "encoder": Path("fake")}, "give --encoder alone"),
        ({"settings": {"epochs": 0, "encoder_path": "x"}}, "--epochs  0: must be a whole number of at least 1"),
        ({"settings": {"init": "linear_scratch"}}, "changes init: the runs of volta would start from 'linear_scratch'"),
        ({"overlays": ["linear_scratch", "tiny"]}, "changes init.*name it in --inits"),
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
