# SPDX-License-Identifier: Apache-2.0
"""The whole report of a made-up store: numbers, files, errors, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import xml.etree.ElementTree

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from fake_runs import FAILED, FOLDS, PENALTY, QUALITY, Writer, brain, predictions, spoilt, write_rows
from mlflow import MlflowClient
from PIL import Image
from scipy import stats
from scipy.ndimage import binary_erosion, distance_transform_edt
from sklearn.metrics import confusion_matrix, recall_score, roc_auc_score, roc_curve

from volta_components.errors import InputError
from volta_components.report.classification_tables import ClassificationTables
from volta_components.report.command import report
from volta_components.report.figures import confusion, learning_curves, step_at
from volta_components.report.store import Store, read_studies
from volta_components.report.tables import age_band

BOOTSTRAP = 500  # samples of the report that ``made`` is


def tables_of(init: str, fraction: float = 1.0, subjects: int = 40) -> list[pd.DataFrame]:
    return [pd.DataFrame(predictions(init, fold, fraction, subjects, 0.5)) for fold in range(FOLDS)]


def test_table_i_is_what_scikit_learn_says(made):
    table = pd.read_csv(made / "tables/ixi_sex_main.csv").set_index(["init", "metric"])
    for init in QUALITY:
        folds = tables_of(init)
        expected = {
            "auroc": [roc_auc_score(fold.label, fold.score) for fold in folds],
            "sensitivity": [recall_score(fold.label, fold.prediction) for fold in folds],
            "specificity": [recall_score(fold.label, fold.prediction, pos_label=0) for fold in folds],
        }
        for metric, values in expected.items():
            row = table.loc[(init, metric)]
            assert row["mean"] == pytest.approx(np.mean(values), abs=1e-9)
            assert row["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
            assert row.ci_low <= row["mean"] <= row.ci_high
            assert row.patients == 40 * FOLDS
    assert table.loc[("volta", "auroc"), "paper_mean"] == 0.98
    assert table.loc[("swin_scratch", "specificity"), "paper_sd"] == 0.22


def test_figure_2_has_every_fraction(made):
    table = pd.read_csv(made / "tables/ixi_sex_fractions.csv").set_index(["init", "fraction"])
    for init in QUALITY:
        for fraction in (0.2, 1.0):
            expected = np.mean([roc_auc_score(fold.label, fold.score) for fold in tables_of(init, fraction)])
            assert table.loc[(init, fraction), "mean"] == pytest.approx(expected)


def test_paired_differences_and_their_correction(made):
    table = pd.read_csv(made / "tables/ixi_sex_comparisons.csv")
    assert list(zip(table["first"], table["second"], strict=True)) == [
        ("volta", "vit_scratch"),
        ("volta", "swin_scratch"),
        ("vit_scratch", "swin_scratch"),
    ]
    folds = {init: [frame.sort_values("patient_id") for frame in tables_of(init)] for init in QUALITY}
    areas = {init: np.mean([roc_auc_score(f.label, f.score) for f in folds[init]]) for init in QUALITY}
    smallest_first = table.sort_values("p")
    corrected = np.maximum.accumulate(np.minimum(smallest_first.p * [3, 2, 1], 1))
    assert list(smallest_first.p_holm) == pytest.approx(list(corrected))
    for row in table.itertuples():
        assert row.difference == pytest.approx(areas[row.first] - areas[row.second])
        assert row.patients == 40 * FOLDS
        drawn = bootstrap_differences(folds[row.first], folds[row.second])
        assert (row.low, row.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
        beyond = min(np.sum(drawn < 1e-12), np.sum(drawn > -1e-12))
        assert row.p == pytest.approx(min(1, 2 * (beyond + 1) / (BOOTSTRAP + 1)))
        assert row.p_delong == pytest.approx(delong_p(folds[row.first], folds[row.second]))


def bootstrap_differences(first: list[pd.DataFrame], second: list[pd.DataFrame]) -> np.ndarray:
    """Differences of the mean AUROC over bootstrap samples: the same patients for both, within fold and class."""
    drawn = np.zeros(BOOTSTRAP)
    for fold, (one, two) in enumerate(zip(first, second, strict=True)):
        rng = np.random.default_rng([0, fold])
        labels = one.label.to_numpy()
        counts = np.zeros((BOOTSTRAP, len(labels)), int)
        for label in (0, 1):
            n = (labels == label).sum()
            counts[:, labels == label] = rng.multinomial(n, [1 / n] * n, BOOTSTRAP)
        for sample, times in enumerate(counts):
            chosen = np.repeat(np.arange(len(labels)), times)
            areas = [roc_auc_score(labels[chosen], frame.score.to_numpy()[chosen]) for frame in (one, two)]
            drawn[sample] += (areas[0] - areas[1]) / len(first)
    return drawn


def delong_p(first: list[pd.DataFrame], second: list[pd.DataFrame]) -> float:
    """DeLong's paired test from the placements of each subject (DeLong et al., 1988), folds added up."""
    difference = variance = 0.0
    for one, two in zip(first, second, strict=True):
        ones, zeros = [], []
        for frame in (one, two):
            positive, negative = (frame.score[frame.label == label].to_numpy() for label in (1, 0))
            ones.append([np.mean((negative < value) + 0.5 * (negative == value)) for value in positive])
            zeros.append([np.mean((positive > value) + 0.5 * (positive == value)) for value in negative])
        difference += np.mean(ones[0]) - np.mean(ones[1])
        for components in (np.cov(ones) / len(ones[0]), np.cov(zeros) / len(zeros[0])):
            variance += components[0, 0] + components[1, 1] - 2 * components[0, 1]
    return 2 * stats.norm.sf(abs(difference) / np.sqrt(variance))


def test_table_iii_is_per_subject_with_wilcoxon(made, store_uri):
    store = Store(store_uri)
    study = next(study for study in read_studies(store) if study.kind == "segmentation")
    scores = {run.variant: run.table.sort_values("subject_id") for run in study.runs if run.fraction == 1}
    table = pd.read_csv(made / "tables/harp_hippocampus_main.csv").set_index(["init", "metric"])
    for init, rows in scores.items():
        for metric in ("dice", "hd95"):
            values = rows[metric].dropna()
            assert table.loc[(init, metric), "mean"] == pytest.approx(values.mean())
            assert table.loc[(init, metric), "sd"] == pytest.approx(values.std(ddof=1))
            assert table.loc[(init, metric), "count"] == len(values)
            # Of six patients there is no interval that one could believe.
            assert table.loc[(init, metric), "interval"] == "too few" and np.isnan(table.loc[(init, metric), "ci_low"])
    assert table.loc[("unet_scratch", "hd95"), "count"] == 5  # one scan has an empty mask
    assert table.loc[("unet_scratch", "hd95"), "paper_mean"] == 1.82
    comparisons = pd.read_csv(made / "tables/harp_hippocampus_comparisons.csv")
    assert len(comparisons) == 3
    for row in comparisons.itertuples():
        first, second = (scores[init].dice.to_numpy() for init in (row.first, row.second))
        assert row.difference == pytest.approx(np.mean(first - second))
        assert row.p == pytest.approx(stats.wilcoxon(first, second).pvalue)


def test_empty_masks_are_counted_shown_and_penalised(made):
    init, subject = FAILED
    table = pd.read_csv(made / "tables/harp_hippocampus_sides.csv").set_index("init")
    assert list(table.failures) == [0, 0, 1] and table.index[2] == init
    page = (made / "index.html").read_text()
    [row] = re.findall(r'<tr><th scope="row">3-D U-Net, from scratch</th>.*?</tr>', main_table(page), flags=re.DOTALL)
    assert re.findall(r"<td>(\d+)</td>", row) == ["1", "6"]  # empty masks, patients
    sides = np.array([distances(init, number) for number in range(6)])
    assert np.isnan(sides).sum() == 1 and np.isnan(sides[subject, 0])
    filled = np.where(np.isnan(sides), PENALTY, sides)
    assert table.loc[init, "hd95_with_penalty"] == pytest.approx(filled.mean())
    assert table.loc[init, "hd95_left_mean"] == pytest.approx(np.nanmean(sides[:, 0]))
    assert table.loc["volta", "hd95_with_penalty"] == pytest.approx(
        np.mean([distances("volta", number) for number in range(6)])
    )
    assert "an empty mask counts as 180 mm" in page


def main_table(page: str) -> str:
    return re.search(r'<table id="harp_hippocampus_main".*?</table>', page, flags=re.DOTALL)[0]


def distances(init: str, subject: int) -> list[float]:
    """HD95 of both sides by SciPy's distance transform; NaN for an empty mask."""
    truth = brain(subject)[1]
    arrays = [np.asanyarray(image.dataobj) for image in (spoilt(truth, init, subject), truth)]
    result = []
    for label in (1, 2):
        surfaces = []
        for array in arrays:
            mask = array == label
            surfaces.append(mask & ~binary_erosion(mask))
        if not surfaces[0].any():
            result.append(np.nan)
            continue
        ways = [distance_transform_edt(~there, sampling=2.0)[here] for here, there in (surfaces, surfaces[::-1])]
        result.append(max(np.percentile(way, 95) for way in ways))
    return result


def test_dice_with_less_data_is_shown(made, store_uri):
    table = pd.read_csv(made / "tables/harp_hippocampus_fractions.csv").set_index(["init", "fraction"])
    [study] = [study for study in read_studies(Store(store_uri)) if study.kind == "segmentation"]
    for run in study.runs:
        assert table.loc[(run.variant, run.fraction), "mean"] == pytest.approx(run.table.dice.mean())
        assert table.loc[(run.variant, run.fraction), "sd"] == pytest.approx(run.table.dice.std(ddof=1))
    assert len(table) == 6 and (made / "figures/harp_hippocampus_fractions.svg").is_file()
    page = (made / "index.html").read_text()
    assert "Dice with less data" in page and "Dice by share of the training part" in page


def test_training_curves_are_at_the_epochs_that_were_logged(store_uri):
    store = Store(store_uri)
    studies = {study.bundle: study for study in read_studies(store)}
    for bundle, epochs in (("harp_hippocampus", 12), ("ixi_sex", 20)):  # the settings of both ask for 20
        for curves in learning_curves(studies[bundle], store).values():
            for _, x, y in curves:
                assert list(x) == list(range(1, epochs + 1)) and len(y) == epochs


def test_thresholds_epochs_and_spreads_are_called_what_they_are(made, tmp_path):
    page = (made / "index.html").read_text().replace("&#39;", "'")
    assert "Sensitivity and specificity are at the threshold 0.5. Here" in page
    assert (
        "are at Youden's J, chosen on an inner validation part of the training folds. The paper's are at Youden's J; "
        "it does not say on which subjects that was chosen." in page
    )
    assert "the paper took the epoch that has the best Dice on its hold-out" in page
    assert '<th scope="col" class="by-paper">paper<small>± SD per epoch</small></th>' in main_table(page)
    assert '<th scope="col">here<small>± SD of subjects</small></th>' in main_table(page)
    assert page.count('<th scope="col" class="by-paper">paper<small>± SD over folds</small></th>') == 6
    # A run with another threshold than the paper's is not said to have the paper's.
    writer = Writer(tmp_path / "store")
    for fold in range(2):
        path = write_rows(tmp_path / "predictions.csv", predictions("volta", fold, 1.0, 20, 0.3))
        writer.run("ixi_sex", "volta", fold, files={"predictions": path}, params={"threshold": "0.3"})
    [study] = read_studies(Store(writer.uri))
    note = ClassificationTables(study, samples=100).main().note
    assert "are at the threshold 0.3. The paper's are at the threshold 0.5." in note


def test_breakdown_counts_every_patient_once(made):
    table = pd.read_csv(made / "tables/ixi_sex_breakdown.csv")
    assert set(table.group) == {"site", "sex", "age"}
    counts = table[table.init == "volta"].groupby("group").patients.sum()
    assert set(counts) == {40 * FOLDS}
    everyone = pd.concat(tables_of("volta"))
    women = everyone[everyone.sex == "F"]
    row = table[(table.init == "volta") & (table.value == "F")].iloc[0]
    assert row.sensitivity == pytest.approx(recall_score(women.label, women.prediction))
    assert [age_band(age) for age in (0, 29.9, 30, 60, 79.9, 80, 104)] == [
        *("under 30", "under 30", "30–44", "60–69", "70–79", "80 and over", "80 and over"),
    ]


def test_confusion_and_roc_are_scikit_learns():
    tables = tables_of("vit_scratch")
    everyone = pd.concat(tables)
    assert (confusion([[table] for table in tables]) == confusion_matrix(everyone.label, everyone.prediction)).all()
    false, true, _ = roc_curve(tables[0].label, tables[0].score, drop_intermediate=False)
    grid = np.linspace(0, 1, 50)
    assert step_at(grid, false, true) == pytest.approx([true[false <= place + 1e-12].max() for place in grid])


def test_tables_of_the_page_have_a_cell_under_every_label(made):
    page = (made / "index.html").read_text()
    tables = re.findall(r'<table id="(\w+)".*?</table>', page, flags=re.DOTALL)
    assert len(tables) == 20
    assert page.count("<caption>") == page.count("<table ") == len(tables)
    for table in re.finditer(r"<table .*?</table>", page, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table[0], flags=re.DOTALL)
        assert len({len(re.findall(r"<t[hd]", row)) for row in rows}) == 1, table[0][:80]
        spans = re.findall(r'<tr class="groups">(.*?)</tr>', table[0], flags=re.DOTALL)
        for group in spans:
            width = sum(
                int(span or 1) for span in re.findall(r'<th(?: colspan="(\d+)")? scope="col(?:group)?">', group)
            )
            assert width == len(re.findall("<th", rows[0]))
    optimistic = re.search(r'<table id="harp_hippocampus_optimistic".*?</table>', page, flags=re.DOTALL)[0]
    assert re.findall(r"<th[^>]*>(.*?)</th>", optimistic)[:4] == ["init", "Dice", "epoch", "VolTA-3D"]
    assert re.findall(r"<td>(.*?)</td>", optimistic)[:2] == ["0.95", "7"]


def test_files_for_papers(made):
    figures = sorted(path.name for path in (made / "figures").iterdir())
    for name in ("ixi_sex_fractions", "ixi_sex_roc", "aibl_ad_confusion", "aibl_ad_training", "harp_hippocampus_cases"):
        assert {f"{name}.png", f"{name}.svg"} <= {*figures}
    for path in (made / "figures").glob("*.svg"):
        xml.etree.ElementTree.parse(path)


def test_page_says_phantoms_shows_the_papers_numbers_apart_and_asks_no_network(made):
    page = (made / "index.html").read_text()
    assert "These are phantoms, not patients." in page and "banner alarm" not in page
    assert '<td class="by-paper">0.98 ± 0.01</td>' in page and '<td class="by-paper">1.82 ± 0.23</td>' in page
    assert "they were not computed here" in page
    assert "Nothing: every combination" in page
    # No address that a browser would fetch; text of licences inside libraries may name some.
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*\\?["']?(?:https?:)?//[^"'\s)]+""", page)
    for link in re.findall(r'href="((?:tables|figures)/[^"]+)"', page):
        assert (made / link).is_file()


def test_leaks_missing_runs_and_superseded_ones_are_said(tmp_path, capsys):
    writer = Writer(tmp_path / "store")

    def run(init, fold, subjects=20, **tags):
        path = write_rows(tmp_path / "predictions.csv", predictions(init, fold, 1.0, subjects, 0.5))
        return writer.run("ixi_sex", init, fold, metrics={"auroc": 0.123}, files={"predictions": path}, **tags)

    run("vit_scratch", 0, subjects=40)  # done again below
    run("volta", 0, datalist_hash="f" * 64)  # another datalist
    run("volta", 0, leak="allowed", phantom="false")
    client = MlflowClient(writer.uri)
    client.update_run(run("volta", 1, finished="false"), status="RUNNING")  # begun and ended with other settings below
    run("volta", 1, phantom="false")
    run("vit_scratch", 0, phantom="false")
    run("vit_scratch", 1, phantom="false", finished="false")
    client.update_run(run("swin_scratch", 0, finished="false"), status="RUNNING")
    assert report(tmp_path / "out", writer.uri, bootstrap=100) == 1
    page = (tmp_path / "out/index.html").read_text()
    said = capsys.readouterr().err
    for text in (
        "Leak allowed in 1 of 3 runs",
        "volta_fold0_frac1_seed0",
        "1 of 4 combinations have no finished run: vit_scratch fold 1 fraction 1",
        "Not counted: 1 finished run of another datalist (ffffffffffff).",
        "Not counted: 1 finished run of an init, fraction, fold and seed that has a newer one.",
        "Not counted: 1 run that did not finish.",
        "swin_scratch was not run",
        "volta_fold1_frac1_seed1 logged AUROC 0.1230, but its predictions give",
        "Figure 2 needs several fractions",
    ):
        assert text in page.replace("&#39;", "'"), text
        assert text in said, text
    assert "Table II, AD (AIBL): no finished runs." in page
    assert "phantom-banner" not in page


def test_another_tools_masks_are_a_row_of_table_iii(store_uri, tmp_path):
    for number in range(5):
        _, truth = brain(number)
        mask = spoilt(truth, "unetr_scratch", number)
        if number == 2:  # finds nothing on the right
            mask = nib.Nifti1Image(
                np.where(np.asanyarray(mask.dataobj) == 2, 0, mask.dataobj).astype(np.uint8), truth.affine
            )
        nib.save(mask, tmp_path / f"sub-{number:04d}_ses-1.nii.gz")
    (tmp_path / "freesurfer").mkdir()
    for number in range(6):
        _, truth = brain(number)
        labels = np.asanyarray(truth.dataobj)
        aseg = np.select([labels == 1, labels == 2], [17, 53], 0).astype(np.uint8)
        (tmp_path / f"freesurfer/sub-{number:04d}/mri").mkdir(parents=True)
        nib.save(nib.MGHImage(aseg, truth.affine), tmp_path / f"freesurfer/sub-{number:04d}/mri/aseg.mgz")
    masks = {"mytool": tmp_path, "FreeSurfer": tmp_path / "freesurfer"}
    assert report(tmp_path / "out", store_uri, masks=masks, experiments=["volta3d_harp_hippocampus"]) == 0
    table = pd.read_csv(tmp_path / "out/tables/harp_hippocampus_main.csv").set_index(["init", "metric"])
    assert table.loc[("mytool", "dice"), "patients"] == 5 and 0.3 < table.loc[("mytool", "dice"), "mean"] < 0.95
    assert table.loc[("FreeSurfer", "dice"), "mean"] == 1.0 and table.loc[("FreeSurfer", "hd95"), "mean"] == 0.0
    sides = pd.read_csv(tmp_path / "out/tables/harp_hippocampus_sides.csv").set_index("init")
    found = np.array([distances("unetr_scratch", number) for number in range(5)])
    found[2, 1] = PENALTY
    assert sides.loc["mytool", "hd95_with_penalty"] == pytest.approx(found.mean())
    assert sides.loc["mytool", "failures"] == 1 and sides.loc["FreeSurfer", "hd95_with_penalty"] == 0
    page = (tmp_path / "out/index.html").read_text()
    # What is not there is said, and is no failure of those who run one task.
    assert "Table I, Sex (IXI): no finished runs." in page and "Table II, AD (AIBL): no finished runs." in page
    assert "mytool has no mask of 1 scored scans, which its row leaves out: sub-0005_ses-1." in page
    assert "FreeSurfer, Dice 1.00" in page


def test_bad_input_is_named(store_uri, tmp_path):
    with pytest.raises(InputError, match="no such MLflow store; run volta3d crossval first"):
        report(tmp_path, f"sqlite:///{tmp_path}/nothing.db")
    assert not (tmp_path / "nothing.db").exists()
    (tmp_path / "text.db").write_text("hello" * 1000)
    with pytest.raises(InputError, match=r"text\.db: not an MLflow store"):
        report(tmp_path, f"sqlite:///{tmp_path}/text.db")
    empty = Writer(tmp_path / "empty")
    empty.run("ixi_sex", "volta", 0, finished="false")
    with pytest.raises(InputError, match="no finished run in Default, volta3d_ixi_sex; run volta3d crossval"):
        report(tmp_path, empty.uri)
    with pytest.raises(InputError, match="no experiment other; it has Default, volta3d_aibl_ad"):
        report(tmp_path, store_uri, experiments=["other"])
    with pytest.raises(InputError, match=r"--masks x=.*no such folder"):
        report(tmp_path, store_uri, masks={"x": tmp_path / "none"})
    with pytest.raises(InputError, match=r"none of the scored scans; expected files such as sub-000\d_ses-1"):
        report(tmp_path, store_uri, masks={"x": tmp_path})
    with pytest.raises(InputError, match="--bootstrap 5"):
        report(tmp_path, store_uri, bootstrap=5)


def test_tables_and_figures_of_an_earlier_report_are_removed(store_uri, tmp_path):
    rows = predictions("volta", 0, 1.0, 20, 0.5)
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0, files={"predictions": write_rows(tmp_path / "predictions.csv", rows)})
    report(tmp_path / "out", store_uri, experiments=["volta3d_aibl_ad"], bootstrap=100)
    (tmp_path / "out/tables/my_own.csv").write_text("kept")
    report(tmp_path / "out", writer.uri, bootstrap=100)
    names = {path.name for folder in ("tables", "figures") for path in (tmp_path / "out" / folder).iterdir()}
    assert "my_own.csv" in names and "ixi_sex_main.csv" in names and "ixi_sex_roc.svg" in names
    assert not [name for name in names if name.startswith("aibl_ad")]
    page = (tmp_path / "out/index.html").read_text()
    assert all((tmp_path / "out" / link).is_file() for link in re.findall(r'href="((?:tables|figures)/[^"]+)"', page))


def test_a_finished_run_without_its_table_is_named(tmp_path):
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0)
    with pytest.raises(
        InputError, match=r"volta_fold0_frac1_seed0 .* marked finished, but neither .* is in .*/artifacts\. If"
    ):
        report(tmp_path / "out", writer.uri)


def test_wrong_scores_are_named_with_their_subjects(tmp_path):
    rows = predictions("volta", 0, 1.0, 10, 0.5)
    rows[3]["score"] = float("nan")
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0, files={"predictions": write_rows(tmp_path / "predictions.csv", rows)})
    with pytest.raises(InputError, match=f"but are not for {rows[3]['subject_id']}; score"):
        report(tmp_path / "out", writer.uri)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium that reaches no network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    absent = [
        f"no {what} ({remedy})"
        for there, what, remedy in (
            (binary, "Chromium", "apt-get install chromium"),
            (driver, "chromedriver", "apt-get install chromium-driver"),
            (webdriver, "selenium", "pip install selenium"),
        )
        if not there
    ]
    if absent:
        message = f"the page cannot be opened in a browser here: {', '.join(absent)}"
        if os.environ.get("CI", "").lower() in ("", "0", "false"):
            pytest.skip(message)
        pytest.fail(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,1200",
    ):
        options.add_argument(flag)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def picture_in_viewer(browser) -> np.ndarray:
    """The viewer's canvas, once it has drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.switch_to.default_content()
    browser.switch_to.frame(browser.find_element("css selector", ".viewer iframe"))

    def drawn(_):
        data = browser.execute_script(
            "const c = document.querySelector('canvas'); return c && c.width > 0 ? c.toDataURL('image/png') : null"
        )
        if not data:
            return False
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB"))
        found = np.unique(picture.reshape(-1, 3), axis=0)
        return [picture] if len(found) > 20 else False

    [picture] = WebDriverWait(browser, 60).until(drawn)
    browser.switch_to.default_content()
    return picture


def test_page_in_a_browser(made, browser):
    """Opened from disk: no error on the console, every picture there, the viewer draws what is chosen."""
    browser.get((made / "index.html").as_uri())
    picture = picture_in_viewer(browser)
    # Grey brain, and the green of agreement over it.
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    assert ((green > red + 30) & (green > blue + 10)).sum() > 30
    assert ((abs(red - green) < 6) & (abs(red - blue) < 6) & (red > 60)).sum() > 2000

    # Nothing of the viewer is cut off, and its crosshair hides nothing: brainsprite's own is pure blue.
    inside = browser.execute_script(
        "const f = document.querySelector('.viewer iframe'), p = f.contentDocument.documentElement;"
        "return [p.scrollWidth - f.clientWidth, p.scrollHeight - f.clientHeight,"
        " f.contentDocument.querySelector('input').value]"
    )
    assert inside == [0, 0, "55"]
    assert not ((blue > 200) & (red < 40) & (green < 40)).any()

    sizes = browser.execute_script("return Array.from(document.images).map(i => i.complete ? i.naturalWidth : 0)")
    assert len(sizes) == 13 and all(size > 100 for size in sizes)
    wide = browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert wide, "the page scrolls sideways"

    # On a phone the first column of a table stays, and a table that goes on says so.
    browser.set_window_size(420, 900)
    stays = browser.execute_script(
        "const t = document.getElementById('ixi_sex_main'), box = t.closest('.scroll');"
        "const left = () => [t.rows[2].cells[0], t.rows[2].cells[1]].map(c => c.getBoundingClientRect().left);"
        "const before = left(); box.scrollLeft = 120; const after = left();"
        "return [before[0] - after[0], before[1] - after[1], getComputedStyle(box.previousElementSibling).display,"
        " document.documentElement.scrollWidth <= document.documentElement.clientWidth]"
    )
    assert stays == [0, 120, "block", True]
    browser.set_window_size(1280, 1200)

    choice = browser.find_element("css selector", ".viewer select")
    titles = [option.text for option in choice.find_elements("tag name", "option")]
    assert len(titles) == 9 and "(median), VolTA-3D, Dice" in titles[0]
    browser.execute_script("arguments[0].selectedIndex = 8; arguments[0].dispatchEvent(new Event('change'))", choice)
    other = picture_in_viewer(browser)
    assert other.shape != picture.shape or (other != picture).any()

    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert not [name for name in loaded if not name.startswith(("data:", "blob:"))]
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert complaints == []
