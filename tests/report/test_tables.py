# SPDX-License-Identifier: Apache-2.0
"""Numbers as text, and the tables that no paper asks for: calibration, volumes, hardware."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from fake_runs import FOLDS, QUALITY, Writer, predictions, write_rows
from sklearn.metrics import brier_score_loss

from volta_components.report.classification_tables import ClassificationTables
from volta_components.report.page import render_subjects
from volta_components.report.segmentation_tables import SegmentationTables
from volta_components.report.statistics import Estimate
from volta_components.report.store import Store, read_studies
from volta_components.report.tables import cell, made_table, number, plus_minus


def test_zero_has_no_sign_and_a_minus_is_one():
    assert [number(value, 3) for value in (-0.0001, 0.0, -0.0126, float("nan"))] == ["0.000", "0.000", "−0.013", "–"]
    assert [number(value, 2, sign=True) for value in (-0.001, 0.5, -0.5)] == ["0.00", "+0.50", "−0.50"]
    assert plus_minus(-0.001, 0.1) == "0.00 ± 0.10"


def test_a_cell_says_why_it_has_no_interval():
    estimate = Estimate(0.9, 0.1, 0.8, 1.0)
    assert cell(estimate) == "0.90 ± 0.10\n[0.80, 1.00]"
    assert cell(estimate.checked(5)) == "0.90 ± 0.10\ntoo few"
    assert cell(estimate.checked(5, (4, 5))).endswith("] exact")


def test_calibration_is_scikit_learns(made):
    table = pd.read_csv(made / "tables/ixi_sex_calibration.csv").set_index("init")
    for init in QUALITY:
        everyone = pd.concat([pd.DataFrame(predictions(init, fold, 1.0, 40, 0.5)) for fold in range(FOLDS)])
        assert table.loc[init, "brier"] == pytest.approx(brier_score_loss(everyone.label, everyone.score))
        assert table.loc[init, "brier_low"] < table.loc[init, "brier"] < table.loc[init, "brier_high"]


def test_volumes_are_compared_with_the_truths(made, store_uri):
    [study] = [study for study in read_studies(Store(store_uri)) if study.kind == "segmentation"]
    table = pd.read_csv(made / "tables/harp_hippocampus_volumes.csv").set_index("init")
    for run in study.select("unetr_scratch"):
        difference = run.table.volume_left_mm3 - run.table.true_volume_left_mm3
        row = table.loc["unetr_scratch"]
        assert row.bias_left_mm3 == pytest.approx(difference.mean())
        assert row.high_left_mm3 == pytest.approx(difference.mean() + 1.96 * difference.std(ddof=1))
        assert -1 <= row.icc_left <= 1
    assert SegmentationTables(study, {}, samples=100).volumes() is not None


def test_only_a_clear_winner_is_bold(tmp_path):
    writer = Writer(tmp_path / "store")
    quality = {"volta": 0.0, "vit_scratch": 1.0, "swin_scratch": 1.0}
    for init, noise in quality.items():
        rows = predictions("volta", 0, 1.0, 90, 0.5)
        rng = np.random.default_rng(len(init))
        for row in rows:
            row["score"] = (1 - noise) * row["label"] + noise * rng.uniform()
        path = write_rows(tmp_path / "predictions.csv", rows)
        writer.run("ixi_sex", init, 0, files={"predictions": path})
    [study] = read_studies(Store(writer.uri))
    main = ClassificationTables(study, samples=500).main()
    assert main.bold == {(0, 1)} and main.rows[0][1].startswith("1.00")
    assert "no spread" in main.rows[0][1]


def test_hardware_hours_and_commands_are_named_once_an_init(tmp_path):
    writer = Writer(tmp_path / "store")
    for fold in range(2):
        path = write_rows(tmp_path / "predictions.csv", predictions("volta", fold, 1.0, 20, 0.5))
        tags = {"hardware": "NVIDIA H100", "made_by": "volta3d crossval --bundle bundles/ixi_sex"}
        writer.run("ixi_sex", "volta", fold, files={"predictions": path}, **tags)
    [study] = read_studies(Store(writer.uri))
    for run in study.runs:
        run.started, run.ended = 0, 1_800_000
    rest = ["NVIDIA H100", "volta3d crossval --bundle bundles/ixi_sex"]
    [row] = made_table([study]).rows
    assert row == ["ixi_sex", "VolTA-3D", "2", "1.00", "–", *rest]
    # What a run has recorded of itself wins: it knows its pauses.
    for run, memory in zip(study.runs, (3.0, 2.0), strict=True):
        run.metrics |= {"cost/hours": 0.25, "cost/peak_memory_gib": memory}
    [row] = made_table([study]).rows
    assert row == ["ixi_sex", "VolTA-3D", "2", "0.50", "3.0", *rest]


def test_every_prediction_of_a_subject_is_on_the_page_of_subjects(made):
    page = (made / "subjects.html").read_text()
    [subject] = re.findall(r'<details id="sub-0003" class="subject">.*?</details>', page, flags=re.DOTALL)
    # Sex, AD and hippocampi: three inits each, with two, one and two fractions of the training part.
    assert subject.count('<th scope="row">') == 3 * (2 + 1 + 2) and subject.count("<table>") == 3
    row = next(row for row in predictions("volta", 0, 1.0, 40, 0.5) if row["subject_id"] == "sub-0003")
    assert f"{row['score']:.3f}" in subject


def test_one_id_in_two_data_sets_is_two_subjects(tmp_path):
    writer = Writer(tmp_path / "store")
    path = write_rows(tmp_path / "predictions.csv", predictions("volta", 0, 1.0, 20, 0.5))
    writer.run("ixi_sex", "volta", 0, files={"predictions": path}, datalist_name="ixi", datalist_hash="a" * 64)
    writer.run("aibl_ad", "volta", 0, files={"predictions": path}, datalist_name="aibl", datalist_hash="b" * 64)
    page = render_subjects(read_studies(Store(writer.uri)))
    found = re.findall(r'<details id="([^"]*)" class="subject">(.*?)</details>', page, flags=re.DOTALL)
    names = [name for name, _ in found if name.startswith("sub-0003")]
    assert names == ["sub-0003 (ixi aaaaaaaa)", "sub-0003 (aibl bbbbbbbb)"]
    assert len(found) == 40 and {body.count("<table>") for _, body in found} == {1}
