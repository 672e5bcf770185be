# SPDX-License-Identifier: Apache-2.0
"""Which runs count, which do not belong together, and several seeds of a fold."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from fake_runs import QUALITY, Writer, predictions, write_rows
from sklearn.metrics import confusion_matrix, roc_auc_score

from volta_components.errors import InputError
from volta_components.report.classification_tables import ClassificationTables
from volta_components.report.command import report
from volta_components.report.figures import confusion, confusion_figure, training_figure
from volta_components.report.segmentation_tables import SegmentationTables
from volta_components.report.store import Store, read_studies


@pytest.fixture
def writer(tmp_path):
    return Writer(tmp_path / "store")


@pytest.fixture
def run(writer, tmp_path):
    """Writes a run of ``ixi_sex``; started by hand with ``variant=None``."""

    def write(init, fold, seed=None, subjects=20, **more):
        rows = predictions(init, fold, 1.0, subjects, 0.5, seed or 0)
        path = write_rows(tmp_path / "predictions.csv", rows)
        return writer.run("ixi_sex", init, fold, files={"predictions": path}, seed=seed, **more)

    return write


def only_study(writer):
    [study] = read_studies(Store(writer.uri))
    return study


def test_an_epoch_that_a_resumed_run_logs_again_counts_once(writer, run):
    run_id = run("volta", 0, curves={"val/loss": [0.9, 0.5]})
    writer.client.log_metric(run_id, "val/loss", 0.7, timestamp=1, step=2)
    assert Store(writer.uri).history(run_id, "val/loss") == [(1, 0.9), (2, 0.7)]


@pytest.mark.parametrize(
    ("share", "said"),
    [("0.2", "inner part, never the scored one"), ("0.0", "on the scored one, and nothing was chosen by it")],
)
def test_curves_say_whose_they_are(share, said, writer, run, tmp_path):
    run("volta", 0, curves={"val/auroc": [0.6, 0.7]}, params={"validation_fraction": share})
    picture = training_figure(only_study(writer), Store(writer.uri), tmp_path)
    assert picture is not None and said in picture.caption


def test_a_run_by_hand_never_takes_the_place_of_crossvals(writer, run):
    kept = {run("volta", 0), run("volta", 1)}
    run("volta", 0, variant=None)
    run("volta", 2, variant=None)
    run("volta", 1, variant=None, datalist_hash="f" * 64)
    study = only_study(writer)
    assert {item.run_id for item in study.runs} == kept
    assert study.alarms == []
    assert (
        "Not counted: 2 finished runs started by hand, of an init that volta3d crossval was run for: "
        "volta_fold0_frac1_seed0, volta_fold2_frac1_seed2." in study.notes
    )
    assert "Not counted: 1 finished run of another datalist (ffffffffffff)." in study.notes


def test_overlays_run_by_hand_have_rows_of_their_own_beside_an_alarm(writer, run):
    run("volta", 0)
    for blocks, rate in (("0", "1.0"), ("12", "1.0"), ("12", "0.1"), ("6", "1.0")):
        params = {"unfrozen_blocks": blocks, "num_layers": "12", "encoder_rate": rate}
        run("volta", 0, variant=None, params=params)
    study = only_study(writer)
    assert study.variants == ["volta", "frozen", "full", "gentle"]
    assert [(item.variant, item.by_hand) for item in study.runs] == [
        ("volta", False),
        ("gentle", True),
        ("full", True),
        ("frozen", True),
    ]
    assert [alarm.title for alarm in study.alarms] == ["Started by hand"]


def test_runs_by_hand_alone_are_reported_and_said_to_be(writer, run):
    for fold in (0, 1):
        run("volta", fold, variant=None)
    study = only_study(writer)
    assert len(study.runs) == 2 and study.alarms == []
    assert (
        "Not started by volta3d crossval: the row volta (volta_fold0_frac1_seed0, volta_fold1_frac1_seed1)."
        in study.notes
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params": {"learning_rate": "0.01"}}, "learning_rate is 0.0001 or 0.01"),
        ({"params": {"crops.num_samples": "4"}}, "crops.num_samples is 2 or 4"),
        ({"encoder_sha256": "a" * 64}, f"encoder_sha256 is {'a' * 64} or {'e' * 64}"),
        ({"crossval_recipe": "b" * 64}, "the merged configuration's hash is aaaaaaaa or bbbbbbbb"),
    ],
)
def test_a_row_of_mixed_settings_is_an_alarm_at_its_table(writer, run, tmp_path, changes, says):
    same = {"crossval_recipe": "a" * 64, "params": {"learning_rate": "0.0001", "crops.num_samples": "2"}}
    run("volta", 0, **same)
    run("volta", 1, **(same | changes))
    for fold in (0, 1):  # another row has settings of its own
        run("vit_scratch", fold, **(same | {"crossval_recipe": "c" * 64}))
    assert report(tmp_path / "out", writer.uri, bootstrap=100) == 0
    page = (tmp_path / "out/index.html").read_text().replace("&#39;", "'")
    alarm = page.index("The runs of volta do not all have the same settings")
    assert says in page[alarm:]
    assert page.index('<section id="ixi_sex">') < alarm < page.index('<table id="ixi_sex_main"')
    assert "Some of these numbers are in doubt." in page
    assert "The runs of vit_scratch" not in page


@pytest.mark.parametrize(("recipes", "alarms"), [("aa", 0), ("ab", 1)])
def test_epochs_that_follow_from_the_fraction_are_no_alarm(writer, run, recipes, alarms):
    """``epochs`` may be an expression: MONAI logs what it comes to, beside no such setting."""
    for fold, (recipe, epochs) in enumerate(zip(recipes, ("20", "67"), strict=True)):
        run("volta", fold, crossval_recipe=recipe * 64, params={"epochs": "x", "max_epochs": epochs})
    assert [alarm.title for alarm in only_study(writer).alarms] == ["Mixed settings"] * alarms
    run("volta", 2, crossval_recipe="a" * 64, params={"epochs": "3", "max_epochs": "3"})
    assert "epochs is 3 or x" in str(only_study(writer).alarms[0])


def test_a_run_whose_tags_cannot_be_read_is_left_out_with_a_note(writer, run):
    run("volta", 0)
    odd = run("volta", 1, variant=None)
    writer.client.set_tag(odd, "fold", "1.0")
    study = only_study(writer)
    assert [item.fold for item in study.runs] == [0]
    [note] = [note for note in study.notes if "cannot be read" in note]
    assert odd in note and "1 finished run" in note and "'1.0'" in note


def test_people_may_be_called_na(writer, tmp_path):
    rows = predictions("volta", 0, 1.0, 20, 0.5, 0)
    for row, name in zip(rows, ("NA", "None", "nan"), strict=False):
        row["subject_id"] = row["patient_id"] = name
    path = write_rows(tmp_path / "predictions.csv", rows)
    writer.run("ixi_sex", "volta", 0, files={"predictions": path})
    assert only_study(writer).runs[0].table["patient_id"].tolist()[:3] == ["NA", "None", "nan"]


def test_inits_with_unequal_training_are_an_alarm(writer, run):
    run("volta", 0)
    run("vit_scratch", 0, params={"epochs": "5"})
    [alarm] = only_study(writer).alarms
    assert str(alarm) == "Unequal training: The inits do not have the same epochs: volta 20, vit_scratch 5."


def test_runs_of_several_versions_of_the_code_are_noted(writer, run):
    run("volta", 0)
    run("volta", 1, code_version="0.2.0+def")
    run("vit_scratch", 0)
    run("vit_scratch", 1)
    study = only_study(writer)
    assert study.alarms == [] and [note for note in study.notes if "code" in note] == [
        "Mixed code: not all runs were trained by the same version of the code: 0.1.0+abc (1 run of volta, 2 runs of "
        "vit_scratch); 0.2.0+def (1 run of volta). Differences between them may come from the code."
    ]


def test_pretrained_inits_of_several_encoders_are_noted(writer, run):
    run("volta", 0)
    run("volta", 0, variant="frozen")
    run("volta", 0, variant="gentle", encoder_sha256="b" * 64)
    run("vit_scratch", 0)
    study = only_study(writer)
    assert study.alarms == []
    [note] = [note for note in study.notes if "encoder" in note]
    assert note.startswith("Different encoders: pretrained inits did not start from the same one: ")
    assert {"volta", "frozen"} == {*note.split(": ")[2].split(" from eeeeeeeeeeee")[0].split(" and ")}
    assert "gentle from bbbbbbbbbbbb" in note and "scratch" not in note


def test_seeds_of_a_fold_are_averaged_before_anything_else(writer, run, tmp_path):
    seeds = {0: (0, 1000), 1: (1,)}  # crossval's second seed is done for one fold only
    tables = {}
    for init in ("volta", "swin_scratch"):
        for fold, numbers in seeds.items():
            for seed in numbers:
                run(init, fold, seed, subjects=30)
                tables[init, fold, seed] = pd.DataFrame(predictions(init, fold, 1.0, 30, 0.5, seed))
    study = only_study(writer)
    assert study.several_seeds
    made = ClassificationTables(study, samples=200)

    def of_folds(init, metric):
        return [np.mean([metric(tables[init, fold, seed]) for seed in numbers]) for fold, numbers in seeds.items()]

    areas = {init: of_folds(init, lambda t: roc_auc_score(t.label, t.score)) for init in ("volta", "swin_scratch")}
    main = made.main()
    numbers = main.frame.set_index(["init", "metric"])
    for init, values in areas.items():
        row = numbers.loc[(init, "auroc")]
        assert row["mean"] == pytest.approx(np.mean(values)) and row["sd"] == pytest.approx(np.std(values, ddof=1))
        assert (row["count"], row["patients"]) == (2, 60)
    assert "several seeds, these are averaged within the fold first" in main.note
    [compared] = made.comparisons().frame.itertuples()
    assert compared.difference == pytest.approx(np.mean(areas["volta"]) - np.mean(areas["swin_scratch"]))
    assert np.isnan(compared.p_delong) and compared.patients == 60

    everybody = made.breakdown().frame.query("init == 'volta' and group == 'sex'").set_index("value")

    def sensitivity(table):
        women = table[(table.sex == "F") & (table.label == 1)]
        return pd.Series([women.prediction.sum(), len(women)])

    parts = [sum(sensitivity(tables["volta", f, s]) / len(n) for s in n) for f, n in seeds.items()]
    found, among = sum(parts)
    assert everybody.loc["F", "sensitivity"] == pytest.approx(found / among)

    counts = sum(
        confusion_matrix(t.label, t.prediction) / len(seeds[fold]) for (i, fold, _), t in tables.items() if i == "volta"
    )
    folds = [[tables["volta", fold, seed] for seed in numbers] for fold, numbers in seeds.items()]
    assert confusion(folds) == pytest.approx(counts) and counts.sum() == 60
    assert "each counted once (the mean over seeds)" in confusion_figure(study, tmp_path).caption


def test_seeds_of_a_scan_are_averaged_in_table_iii(writer):
    writer.segmentation(seed=0)
    writer.segmentation(seed=1000)
    study = only_study(writer)
    made = SegmentationTables(study, {}, samples=100)
    main, sides = made.main(), made.sides().frame.set_index("init")
    numbers = main.frame.set_index(["init", "metric"])
    for init in ("volta", "unet_scratch"):
        both = [run.table.set_index("subject_id").sort_index() for run in study.runs if run.variant == init]
        assert len(both) == 2 and (both[0].dice != both[1].dice).any()
        for metric in ("dice", "hd95"):
            subjects = pd.concat(both)[metric].groupby(level=0).mean()
            row = numbers.loc[(init, metric)]
            assert row["mean"] == pytest.approx(subjects.mean())
            assert row["sd"] == pytest.approx(subjects.std(ddof=1))
            assert row["patients"] == 6 and row["count"] <= 6
    assert sides.loc["unet_scratch", "failures"] == 1  # the same mask is empty with either seed
    assert "averaged for each scan first" in main.note
    compared = made.comparisons().frame.iloc[0]
    assert compared.patients == 6


def test_a_handful_of_patients_has_no_p_value(writer):
    """Every bootstrap sample of theirs may show the same sign, and a difference by chance would look certain."""
    writer.classification("ixi_sex", (1.0,), 6)
    compared = ClassificationTables(only_study(writer), samples=200).comparisons()
    assert len(compared.frame) and (compared.frame.patients < 20).all()
    assert compared.frame.p.isna().all() and compared.frame.p_holm.isna().all()
    assert "none for fewer than 20 patients" in compared.note


def test_few_patients_of_a_class_have_no_interval_and_no_p_value(writer, tmp_path):
    """80 patients of whom 6 have it: the bootstrap's interval would be far too narrow."""
    for init in QUALITY:
        for fold in range(2):
            rows = predictions(init, fold, 1.0, 40, 0.5)
            for row in rows:
                row["label"] = int(row["subject_id"].endswith(("000", "010", "020")))
            path = write_rows(tmp_path / "predictions.csv", rows)
            writer.run("ixi_sex", init, fold, files={"predictions": path})
    tables = ClassificationTables(only_study(writer), samples=200)
    main = tables.main().frame.dropna(subset="mean").set_index("metric")
    assert main.loc["auroc", ["ci_low", "ci_high"]].isna().all(axis=None)
    assert main.loc["specificity", ["ci_low", "ci_high"]].notna().all(axis=None)
    compared = tables.comparisons().frame
    assert (compared.patients == 80).all()
    assert compared[["low", "high", "p", "p_holm", "p_delong"]].isna().all(axis=None)
    # A group's numbers in the file are those of the page.
    breakdown = tables.breakdown()
    assert breakdown.frame.auroc.notna().any() and breakdown.frame.auroc_low.isna().all()
    assert any("too few" in text for row in breakdown.rows for text in row)


def test_a_store_without_seeds_says_nothing_of_them(writer, run):
    for init in QUALITY:
        run(init, 0)
    study = only_study(writer)
    assert not study.several_seeds and "seeds" not in ClassificationTables(study, samples=100).main().note


def test_folds_and_inits_that_were_planned_are_missing(writer, run, tmp_path):
    plan = {"inits": ["volta", "vit_scratch"], "fractions": [1.0], "folds": [0, 1, 2]}
    for fold in (0, 1):
        run("volta", fold, crossval_plan=json.dumps(plan))
    study = only_study(writer)
    assert study.incomplete
    assert (
        "4 of 6 combinations have no finished run: vit_scratch fold 0 fraction 1, vit_scratch fold 1 fraction 1, "
        "vit_scratch fold 2 fraction 1, volta fold 2 fraction 1." in study.notes
    )
    assert report(tmp_path / "out", writer.uri, bootstrap=100) == 1


def test_the_report_of_an_interrupted_crossval_leaves_out_what_it_lacks(writer, tmp_path):
    """Fractions are run one after the other: an init may have no run yet at the largest."""
    for init, fraction in (("volta", 0.2), ("vit_scratch", 0.2), ("vit_scratch", 1.0), ("swin_scratch", 1.0)):
        path = write_rows(tmp_path / "predictions.csv", predictions(init, 0, fraction, 40, 0.5))
        writer.run("ixi_sex", init, 0, fraction, files={"predictions": path})
    study = only_study(writer)
    assert study.variants_at_largest == ["vit_scratch", "swin_scratch"] and study.reference == "vit_scratch"
    assert report(tmp_path / "out", writer.uri, bootstrap=100) == 1
    page = (tmp_path / "out/index.html").read_text()
    assert "volta has no run at the largest fraction (100%)" in page
    calibration = pd.read_csv(tmp_path / "out/tables/ixi_sex_calibration.csv")
    assert list(calibration.init) == ["vit_scratch", "swin_scratch"]


def test_an_init_without_volumes_does_not_hide_those_of_others(writer):
    writer.segmentation()
    study = only_study(writer)
    [run] = [run for run in study.runs if run.variant == "volta"]
    run.fraction = 0.4
    tables = SegmentationTables(study, {}, samples=100)
    volumes = tables.volumes()
    assert volumes is not None and list(volumes.frame.init) == ["unetr_scratch", "unet_scratch"]
    assert volumes.rows[0] == ["VolTA-3D", "–", "–", "–", "–"]
    assert [*tables.with_volumes] == ["unetr_scratch", "unet_scratch"]


def test_artifacts_are_found_after_the_folder_was_moved(writer, run, tmp_path):
    """MLflow keeps absolute paths. Nothing has to be trained again."""
    run("volta", 0)
    (tmp_path / "store").rename(tmp_path / "moved")
    uri = f"sqlite:///{tmp_path}/moved/mlruns.db"
    [study] = read_studies(Store(uri))
    assert len(study.runs[0].table) == 20

    (tmp_path / "moved" / "mlruns").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        read_studies(Store(uri))
    text = str(caught.value)
    run_id = study.runs[0].run_id
    assert (
        f"{tmp_path}/store/mlruns/{run_id}/artifacts" in text and f"{tmp_path}/moved/mlruns/{run_id}/artifacts" in text
    )
    assert "--relocate FOLDER" in text and "crossval" not in text
    [study] = read_studies(Store(uri, relocate=tmp_path / "elsewhere"))
    assert len(study.runs[0].table) == 20
    assert report(tmp_path / "out", uri, bootstrap=100, relocate=tmp_path / "elsewhere") == 0
