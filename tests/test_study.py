# SPDX-License-Identifier: Apache-2.0
"""``make study``: its plan, what its sizes mean, its bootstrap, and its page of results from MLflow alone."""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_runs import Writer, write_rows
from monai.bundle import ConfigParser
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.study import cost
from benchmarks.study.__main__ import main
from benchmarks.study.plan import LEARNS_NOTHING, OWN_IDS, TASKS, UNTRAINED, Size, Study, split_anatomies
from benchmarks.study.results import Cell, draw, last_gain, replicates, write_results
from volta_components.cli import read
from volta_components.errors import InputError
from volta_components.files import read_json

ROOT = Path(__file__).parents[1]
SIZES = ("tiny", "small", "cores", "paper")


def folder_of(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(1, count + 1):
        (path / f"anatomy_{number:02d}.nii.gz").touch()
    return path


def study_of(tmp_path: Path, size: str = "cores") -> Study:
    return Study(tmp_path / "study", folder_of(tmp_path / "maps", 20), Size.named(size))


def test_the_cost_of_a_recorded_step_is_that_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the first three steps are started kernel by kernel, five times as slow, and the fourth is recorded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    now, steps = [0.0], itertools.chain([5.0] * 3, [9.0], itertools.repeat(1.0))
    monkeypatch.setattr(cost, "clock_of", lambda _: lambda: now[0])

    def step() -> None:
        now[0] += next(steps)

    assert cost.seconds(step) == 1.0


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_every_fifth_anatomy_is_scored_and_never_trained_on(tmp_path):
    training, scored = split_anatomies(folder_of(tmp_path / "maps", 20))
    assert scored == ["anatomy-05", "anatomy-10", "anatomy-15", "anatomy-20"]
    assert len(training) == 16 and not set(training) & set(scored)
    with pytest.raises(InputError, match="holds 4 label maps, and a study needs 5"):
        split_anatomies(folder_of(tmp_path / "few", 4))
    with pytest.raises(InputError, match="SIZE=huge: choose tiny, small, cores, paper"):
        Size.named("huge")


@pytest.mark.parametrize("size", SIZES)
def test_longer_trainings_have_names_of_their_own_and_the_same_encoders(size, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = study_of(tmp_path, size)
    longer = replace(study, longer=4)
    for each in (study, longer):
        each.write_overlays()
    for task in TASKS:
        for fraction in study.size.fractions:
            epochs = []
            for each in (study, longer):
                parser = ConfigParser()
                parser.read_config(each.configs(task))
                parser["fraction"] = fraction
                epochs.append(parser.get_parsed_content("epochs"))
            assert epochs[1] == 4 * epochs[0] > 0
    pairs = [(a.words, b.words) for a, b in zip(study.steps(), longer.steps(), strict=True)]
    changed = {words[1] for words, others in pairs if words != others}
    assert changed == {"crossval", "report"}
    named = [[w[w.index("--experiment") + 1] for w in side if w[1] == "crossval"] for side in zip(*pairs, strict=True)]
    assert not set(named[0]) & set(named[1])


@pytest.mark.parametrize("size", SIZES)
def test_people_are_held_back_of_each_training_that_has_three(size, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = replace(study_of(tmp_path, size), longer=4, held_back=True)
    study.write_overlays()
    assert study.fractions() == [fraction for fraction in study.size.fractions if 16 * fraction >= 3]
    for task in TASKS:
        parser = ConfigParser()
        parser.read_config(study.configs(task))
        assert parser["validation_fraction"] == 0.25 and study.experiment(task) == f"study_{task}_x4_held_back"
        assert parser["train#dataset#data"] == "$@parts.training"
        assert parser["validate#dataset#data"] == "$@parts.validation"


@pytest.mark.parametrize("size", SIZES)
def test_every_step_is_a_command_that_a_user_could_type(size, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = study_of(tmp_path, size)
    study.write_overlays()
    steps = study.steps()
    training, scored = split_anatomies(study.anatomies)
    for step in steps:
        if step.words[0] == "volta3d":
            read(list(step.words[1:]))  # an option that there is not, or a value that does not fit, is an error
    heads = {step.title: step.words for step in steps if step.words[1] == "phantom"}
    left_out = {title: words[words.index("--leave-out") + 1].split(",") for title, words in heads.items()}
    assert left_out.pop("Heads: training") == scored
    assert left_out == dict.fromkeys(("Heads: scored", "Heads: scored_for_labels"), training)
    seeds = [words[words.index("--seed") + 1] for words in heads.values()]
    assert len(set(seeds)) == 3  # no head is in two of them
    pretrainings = [step.words for step in steps if "monai.bundle" in step.words]
    encoders = [*range(study.size.pretrainings), UNTRAINED]
    for number, words in zip(encoders, pretrainings, strict=True):
        options = dict(itertools.pairwise(words))
        assert json.loads(options["--leave_out"].replace("'", '"')) == scored
        assert options["--seed"] == ("0" if number == UNTRAINED else str(number))
        assert {f"--{name}" for name in LEARNS_NOTHING}.isdisjoint(options) == (number != UNTRAINED)
        files = json.loads(options["--config_file"].replace("'", '"'))
        assert all(Path(file).is_file() for file in files)
        parser = ConfigParser()
        parser.read_config(files)
        for key in ("suffix", "ckpt_dir"):
            parser[key] = options[f"--{key}"]
        assert parser.get_parsed_content("encoder_path") == str(study.encoder(number))
    runs = [dict(itertools.pairwise(step.words)) for step in steps if step.words[1] == "crossval"]
    trained: dict[str, int] = {}
    for options in runs:
        inits, fractions = options["--inits"].split(","), options["--fractions"].split(",")
        task = Path(options["--bundle"]).name
        trained[task] = trained.get(task, 0) + len(inits) * len(fractions)
        assert options["--folds"] == "1" and options["--datalist"] == str(study.datalist(task))
        first = options["--encoder"] == str(study.encoder(0))
        assert set(TASKS[task]).isdisjoint(inits) != first  # what starts from scratch is trained once
        untrained = options["--encoder"] == str(study.encoder(UNTRAINED))
        assert (inits == study.size.untrained) == untrained or study.size.untrained == study.size.pretrained
    pretrained = len(study.size.pretrained) * study.size.pretrainings + len(study.size.untrained)
    each = study.size.seeds * len(study.size.fractions)
    assert trained == {task: (pretrained + len(scratch)) * each for task, scratch in TASKS.items()}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("init", ["volta", "frozen", "gentle", "full"])
def test_an_init_is_put_beside_its_own_network_from_scratch(task, init):
    """Of the same settings of the network; the others are about training."""
    configs = ROOT / "bundles" / task / "configs"

    def network(name: str) -> dict[str, Any]:
        parser = ConfigParser()
        parser.read_config([str(configs / "train.json"), *([] if name == "volta" else [str(configs / f"{name}.json")])])
        parser.parse()
        return {**parser.ref_resolver.get_item("network_def").get_config(), "pool": parser.get("pool")}

    assert network(init) == network(Study.scratch(task, init))
    assert Study.scratch(task, UNTRAINED + init) == Study.scratch(task, init)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_change_ids_that_exist_and_give_small_shares_more_epochs(size, tmp_path):
    study = study_of(tmp_path, size)
    study.write_overlays()
    epochs = {"tiny": (4, 4), "small": (20, 15), "cores": (30, 60), "paper": (50, 100)}[size]
    power = 0.75 if size == "small" else 0.5
    for task in TASKS:
        configs = ROOT / "bundles" / task / "configs"
        overlays = [read_json(configs / f"{name}.json") for name in ("train", *TASKS[task])]
        known = {name for overlay in overlays for name in overlay}
        ids = read_json(study.overlay(task))
        assert {name.split("#")[0] for name in ids} <= known
        parser = ConfigParser()
        parser.read_config([str(configs / "train.json"), str(study.overlay(task))])
        for fraction in study.size.fractions:
            parser["fraction"] = fraction
            parser.parse(reset=True)
            wanted = round(epochs[task == "harp_hippocampus"] / fraction**power)
            assert parser.get_parsed_content("epochs") == wanted
            scorings = 3 if size == "small" and task == "harp_hippocampus" else 4
            assert 1 <= parser.get_parsed_content("val_interval") <= max(1, wanted // scorings)
    pretrain = [read_json(ROOT / f"bundles/pretrain/configs/{name}.json") for name in ("train", "synthetic")]
    assert set(study.size.pretrain) <= {name for config in pretrain for name in config}
    assert OWN_IDS["classification"]["threshold"] == 0.5  # which no validation part has to choose


def test_the_estimate_counts_steps_and_passes(tmp_path, monkeypatch):
    """With a second for every step and pass: what a run must take, by hand."""
    monkeypatch.chdir(ROOT)
    study = study_of(tmp_path, "tiny")
    study.write_overlays()
    monkeypatch.setattr(cost, "seconds", lambda step: step() or 1.0)
    # 64 heads in batches of 4, 4 epochs, and 9 on a fifth; heads are scored after each epoch or every second, and
    # last: 32 for labels, 16 for masks.
    steps = 4 * 16 + 9 * math.ceil(12.8 / 4)
    passes = (4 + 1) + (9 // 2 + 1)
    assert cost.fine_tuning(study, "ixi_sex", "vit_scratch") == 2 * (steps + 32 * passes)
    # A volume of 48x64x64 in windows of 48x32x16 that overlap by a quarter: starts every 24 and 12 voxels.
    windows = 1 * 3 * 5
    steps = 4 * 32 + 9 * math.ceil(12.8 / 2)
    assert cost.fine_tuning(study, "harp_hippocampus", "unet_scratch") == 2 * (steps + 16 * windows * passes)


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def test_draws_have_the_variance_of_two_stage_sampling(rng):
    """The variance of a mean over drawn anatomies and drawn renderings is known in closed form."""
    count, each = 5, 8
    values = rng.normal(size=(count, 1)) + rng.normal(size=(count, each))
    owners = [f"a{number}" for number in range(count) for _ in range(each)]
    draws = draw(owners, 1, 1, samples=40_000)
    assert (draws.heads.sum(axis=1) == count * each).all()
    _, means = replicates("dice", np.zeros(count * each), values.reshape(1, 1, -1), draws)
    expected = values.mean(axis=1).var() / count + values.var(axis=1).mean() / (count * each)
    assert means.var() == pytest.approx(expected, rel=0.03)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * math.sqrt(expected / 40_000))


def test_with_one_rendering_each_the_interval_is_scipys(rng):
    values = rng.normal(size=30)
    draws = draw([str(number) for number in range(30)], 1, 1, samples=20_000)
    _, means = replicates("dice", np.zeros(30), values[None, None], draws)
    found = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx([found.low, found.high], abs=0.01)


@pytest.mark.parametrize("metric", ["auroc", "dice"])
def test_replicates_are_those_of_rows_that_are_really_repeated(metric, rng):
    owners = np.repeat(["a", "b", "c"], 6)
    label = np.tile([0.0, 1.0], 9)
    scores = rng.random((2, 3, 18))
    draws = draw(owners.tolist(), 3, 2, samples=25)
    value, found = replicates(metric, label, scores, draws)

    def plain(values: np.ndarray, rows: np.ndarray) -> float:
        return float(roc_auc_score(label[rows], values[rows]) if metric == "auroc" else values[rows].mean())

    everybody = np.arange(18)
    assert value == pytest.approx(np.mean([plain(scores[p, s], everybody) for p in range(2) for s in range(3)]))
    for sample in range(25):
        rows = np.repeat(everybody, draws.heads[sample].astype(int))
        seeds = np.repeat(range(3), draws.seeds[sample].astype(int))
        pretrainings = np.repeat(range(2), draws.pretrainings[sample].astype(int))
        assert (len(seeds), len(pretrainings)) == (3, 2)
        expected = np.mean([plain(scores[p, s], rows) for p in pretrainings for s in seeds])
        assert found[sample] == pytest.approx(expected)
    # From scratch there is one "pretraining", whatever was drawn of the others.
    _, alone = replicates(metric, label, scores[:1], draws)
    rows = np.repeat(everybody, draws.heads[0].astype(int))
    seeds = np.repeat(range(3), draws.seeds[0].astype(int))
    assert alone[0] == pytest.approx(np.mean([plain(scores[0, s], rows) for s in seeds]))


def test_a_missing_run_and_other_heads_are_named():
    def run(subjects: list[str]) -> Any:
        table = pd.DataFrame({"subject_id": subjects, "session": "1", "dice": 0.5})
        return type("Run", (), {"table": table, "name": "volta_seed0"})()

    heads = pd.DataFrame({"subject_id": ["a", "b"], "session": "1"})
    cell = Cell({(0, 0): run(["a", "b"]), (0, 1000): run(["a", "c"])}, "dice")
    assert cell.scores([0], heads).shape == (1, 1, 2)
    with pytest.raises(InputError, match="other heads"):
        cell.scores([0, 1000], heads)
    with pytest.raises(InputError, match="pretraining 0, seed 2000: no finished run"):
        cell.scores([0, 2000], heads)


def test_the_last_quarter_says_whether_a_curve_still_rises():
    epochs = np.array([2.0, 4.0, 6.0, 8.0])
    assert last_gain(epochs, np.array([0.1, 0.5, 0.8, 0.8])) == 0.0
    assert last_gain(epochs, np.array([0.0, 0.2, 0.4, 0.6])) == pytest.approx(0.2)


# --- the results ------------------------------------------------------------------------------------------------------


def fill(writer: Writer, study: Study, folder: Path) -> None:
    """A store as the study leaves it: VolTA ahead by 0.1 of Dice, half of it untrained too; none in the classes."""
    for task in TASKS:
        for number, seed, fraction in itertools.product((0, 1, UNTRAINED), range(2), study.size.fractions):
            for init in ("volta", *(TASKS[task] if number == 0 else ())):
                ahead = 0.1 * (init == "volta") - 0.05 * (number == UNTRAINED)
                noise = np.random.default_rng([len(str(number)), number == 1, seed, int(10 * fraction), len(init)])
                rows = []
                for head in range(16):
                    row = {"subject_id": f"sub-{head:02d}", "patient_id": f"A{head % 4}", "session": "1"}
                    if task == "harp_hippocampus":
                        dice = 0.5 + ahead + noise.normal(0, 0.01)
                        row |= {"dice": dice, "hd95": 3.0}
                    else:
                        row |= {"label": head // 4 % 2, "score": noise.random(), "prediction": 1}
                    rows.append(row)
                name = "scores.csv" if task == "harp_hippocampus" else "predictions.csv"
                curve = "val/mean_dice" if task == "harp_hippocampus" else "val/auroc"
                writer.run(
                    task,
                    init,
                    0,
                    fraction,
                    curves={curve: [0.1, 0.3, 0.5, 0.5]},
                    files={"predictions": write_rows(folder / name, rows)},
                    seed=1000 * seed,
                    experiment=study.experiment(task, number),
                )


def test_the_page_of_results_is_made_from_mlflow_alone(tmp_path):
    study = study_of(tmp_path, "tiny")
    writer = Writer(study.root)
    fill(writer, study, tmp_path)
    page = write_results(study).read_text()
    with (study.root / "results.csv").open() as stream:
        rows = {(row["task"], row["fraction"], row["init"]): row for row in csv.DictReader(stream)}
    assert len(rows) == 2 * (4 + 5 + 5)
    ahead = rows["harp_hippocampus", "0.2", "volta"]
    assert float(ahead["difference"]) == pytest.approx(0.1, abs=0.02) and float(ahead["difference_low"]) > 0.05
    assert float(ahead["untrained"]) == pytest.approx(0.05, abs=0.02)
    assert 0 < float(ahead["untrained_low"]) < float(ahead["untrained"]) < float(ahead["untrained_high"])
    control = rows["harp_hippocampus", "0.2", "untrainedvolta"]
    assert float(control["difference"]) == pytest.approx(0.05, abs=0.02) and control["untrained"] == ""
    assert (
        ahead["runs"] == "4"
        and control["runs"] == "2"
        and rows["harp_hippocampus", "1.0", "unetr_scratch"]["runs"] == "2"
    )
    assert rows["harp_hippocampus", "0.2", "unetr_scratch"]["difference"] == ""
    even = rows["ixi_sex", "1.0", "volta"]
    assert float(even["difference_low"]) < 0 < float(even["difference_high"])
    scores = pd.read_csv(study.root / "scores.csv")
    assert len(scores) == 16 * sum(2 * (3 * 2 + len(scratch) * 2) for scratch in TASKS.values())  # heads of runs
    own = scores[(scores.task == "harp_hippocampus") & (scores.fraction == 0.2) & (scores.init == "volta")]
    assert own.score.mean() == pytest.approx(float(ahead["value"]), abs=1e-4)
    assert page.count("| VolTA-3D |") == page.count("| Untrained encoder |") == 6 and "With four anatomies" in page
    assert all((study.root / f"curves_{task}.png").stat().st_size > 1000 for task in TASKS)


# --- the command ------------------------------------------------------------------------------------------------------


def test_mistakes_are_named_before_anything_is_made(tmp_path, capsys):
    assert main() == 2
    assert "make study: give a folder of label maps, ANATOMIES=DIR" in capsys.readouterr().err
    for folder, size, message in (
        (tmp_path / "none", "tiny", f"ANATOMIES={tmp_path / 'none'}: no such folder"),
        (folder_of(tmp_path / "few", 3), "tiny", "holds 3 label maps"),
        (folder_of(tmp_path / "maps", 5), "huge", "SIZE=huge: choose tiny, small, cores, paper"),
        (folder_of(tmp_path / "empty", 5), "tiny", "empty cannot be used"),
    ):
        assert main(folder, size=size, output=tmp_path / "study") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_steps_run_in_order_and_the_first_that_fails_ends_the_study(tmp_path, monkeypatch, capsys):
    done: list[tuple[str, ...]] = []

    def pretend(words: tuple[str, ...], **_: Any) -> Any:
        done.append(words)
        return SimpleNamespace(returncode=3 * (words[1] == "merge"))

    monkeypatch.setattr("benchmarks.study.__main__.subprocess.run", pretend)
    monkeypatch.setattr("benchmarks.study.__main__.read_label_maps", lambda folder: [])
    monkeypatch.setattr("benchmarks.study.cost.table", lambda study: [("pretraining", 2, 1.5)])
    folder = folder_of(tmp_path / "maps", 5)
    assert main(folder, size="tiny", output=tmp_path / "study", plan=True) == 0 and not done
    said = capsys.readouterr().out
    assert "4 anatomies to train on; scored: anatomy-05" in said and "2    1.50" in said
    assert main(folder, size="tiny", output=tmp_path / "study") == 3
    assert [words[1] for words in done] == [*(3 * ["phantom", "prepare"]), "merge"]
    assert "step 7 ended with 3; started again, it resumes there" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_a_study_that_holds_people_back_has_their_scores(tmp_path):
    study = replace(study_of(tmp_path, "tiny"), held_back=True)
    fill(Writer(study.root), study, tmp_path)
    page = write_results(study).read_text()
    assert page.count("| held-back people |") == len(TASKS) and page.count(" | 0.500 |\n") == 2 * (4 + 5 + 5)
    with (study.root / "results_held_back.csv").open() as stream:
        assert {row["held_back_people"] for row in csv.DictReader(stream)} == {"0.5"}
