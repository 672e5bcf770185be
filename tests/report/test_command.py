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
from fake_runs import FOLDS, QUALITY, Writer, brain, predictions, spoilt, write_rows
from mlflow import MlflowClient
from PIL import Image
from scipy import stats
from sklearn.metrics import confusion_matrix, recall_score, roc_auc_score, roc_curve

from volta_components.errors import InputError
from volta_components.report.command import report
from volta_components.report.figures import confusion, step_at
from volta_components.report.store import Store, read_studies
from volta_components.report.tables import age_band


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
    areas = {init: np.mean([roc_auc_score(f.label, f.score) for f in tables_of(init)]) for init in QUALITY}
    for row in table.itertuples():
        assert row.difference == pytest.approx(areas[row.first] - areas[row.second])
        assert row.low < row.difference < row.high and row.p <= row.p_holm <= 3 * row.p + 1e-12


def test_table_iii_is_per_subject_with_wilcoxon(made, store_uri):
    store = Store(store_uri)
    study = next(study for study in read_studies(store) if study.kind == "segmentation")
    scores = {run.variant: run.table for run in study.runs}
    table = pd.read_csv(made / "tables/harp_hippocampus_main.csv").set_index(["init", "metric"])
    for init, rows in scores.items():
        for metric in ("dice", "hd95"):
            assert table.loc[(init, metric), "mean"] == pytest.approx(rows[metric].mean())
            assert table.loc[(init, metric), "sd"] == pytest.approx(rows[metric].std(ddof=1))
    assert table.loc[("unet_scratch", "hd95"), "paper_mean"] == 1.82
    comparison = pd.read_csv(made / "tables/harp_hippocampus_comparisons.csv").iloc[0]
    expected = stats.wilcoxon(scores["volta"].dice, scores["unetr_scratch"].dice).pvalue
    assert comparison.p == pytest.approx(expected)


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
    assert (confusion(tables) == confusion_matrix(everyone.label, everyone.prediction)).all()
    false, true, _ = roc_curve(tables[0].label, tables[0].score, drop_intermediate=False)
    grid = np.linspace(0, 1, 50)
    assert step_at(grid, false, true) == pytest.approx([true[false <= place + 1e-12].max() for place in grid])


def test_tables_of_the_page_have_a_cell_under_every_label(made):
    page = (made / "index.html").read_text()
    tables = re.findall(r'<table id="(\w+)".*?</table>', page, flags=re.DOTALL)
    assert len(tables) == 15
    for table in re.finditer(r"<table .*?</table>", page, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table[0], flags=re.DOTALL)
        assert len({len(re.findall(r"<t[hd]", row)) for row in rows}) == 1, table[0][:80]
        spans = re.findall(r'<tr class="groups">(.*?)</tr>', table[0], flags=re.DOTALL)
        for group in spans:
            width = sum(int(span or 1) for span in re.findall(r'<th(?: colspan="(\d+)")?>', group))
            assert width == len(re.findall("<th", rows[0]))
    optimistic = re.search(r'<table id="harp_hippocampus_optimistic".*?</table>', page, flags=re.DOTALL)[0]
    assert re.findall(r"<th>(.*?)</th>", optimistic) == ["init", "epoch", "Dice"]
    assert re.findall(r"<td>(.*?)</td>", optimistic)[:3] == ["VolTA-3D", "7", "0.95"]


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
    run("volta", 1, phantom="false")
    run("vit_scratch", 0, phantom="false")
    run("vit_scratch", 1, phantom="false", finished="false")
    client = MlflowClient(writer.uri)
    client.update_run(run("swin_scratch", 0, finished="false"), status="RUNNING")
    assert report(str(tmp_path / "out"), writer.uri, bootstrap=100) == 1
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
        nib.save(mask, tmp_path / f"sub-{number:04d}_ses-1.nii.gz")
    (tmp_path / "freesurfer").mkdir()
    for number in range(6):
        _, truth = brain(number)
        labels = np.asanyarray(truth.dataobj)
        aseg = np.select([labels == 1, labels == 2], [17, 53], 0).astype(np.uint8)
        (tmp_path / f"freesurfer/sub-{number:04d}/mri").mkdir(parents=True)
        nib.save(nib.MGHImage(aseg, truth.affine), tmp_path / f"freesurfer/sub-{number:04d}/mri/aseg.mgz")
    masks = f"mytool={tmp_path},FreeSurfer={tmp_path / 'freesurfer'}"
    assert report(str(tmp_path / "out"), store_uri, masks=masks, experiments="volta3d_harp_hippocampus") == 1
    table = pd.read_csv(tmp_path / "out/tables/harp_hippocampus_main.csv").set_index(["init", "metric"])
    assert table.loc[("mytool", "dice"), "patients"] == 5 and 0.3 < table.loc[("mytool", "dice"), "mean"] < 0.95
    assert table.loc[("FreeSurfer", "dice"), "mean"] == 1.0 and table.loc[("FreeSurfer", "hd95"), "mean"] == 0.0
    page = (tmp_path / "out/index.html").read_text()
    assert "mytool has no mask of 1 scored scans, which its row leaves out: sub-0005_ses-1." in page
    assert "FreeSurfer, Dice 1.00" in page


def test_bad_input_is_named(store_uri, tmp_path):
    with pytest.raises(InputError, match="no such MLflow store; run volta3d crossval first"):
        report(str(tmp_path), f"sqlite:///{tmp_path}/nothing.db")
    assert not (tmp_path / "nothing.db").exists()
    (tmp_path / "text.db").write_text("hello" * 1000)
    with pytest.raises(InputError, match=r"text\.db: not an MLflow store"):
        report(str(tmp_path), f"sqlite:///{tmp_path}/text.db")
    empty = Writer(tmp_path / "empty")
    empty.run("ixi_sex", "volta", 0, finished="false")
    with pytest.raises(InputError, match="no finished run in Default, volta3d_ixi_sex; run volta3d crossval"):
        report(str(tmp_path), empty.uri)
    with pytest.raises(InputError, match="no experiment other; it has Default, volta3d_aibl_ad"):
        report(str(tmp_path), store_uri, experiments="other")
    with pytest.raises(InputError, match=r"--masks x=.*no such folder"):
        report(str(tmp_path), store_uri, masks=f"x={tmp_path / 'none'}")
    with pytest.raises(InputError, match=r"none of the scored scans; expected files such as sub-0000_ses-1"):
        report(str(tmp_path), store_uri, masks=f"x={tmp_path}")
    with pytest.raises(InputError, match="--bootstrap 5"):
        report(str(tmp_path), store_uri, bootstrap=5)


def test_a_finished_run_without_its_table_is_named(tmp_path):
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0)
    with pytest.raises(InputError, match=r"volta_fold0_frac1_seed0 .* marked finished but has neither"):
        report(str(tmp_path / "out"), writer.uri)


def test_wrong_scores_are_named_with_their_subjects(tmp_path):
    rows = predictions("volta", 0, 1.0, 10, 0.5)
    rows[3]["score"] = float("nan")
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0, files={"predictions": write_rows(tmp_path / "predictions.csv", rows)})
    with pytest.raises(InputError, match="not so for sub-0003; score"):
        report(str(tmp_path / "out"), writer.uri)


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

    sizes = browser.execute_script("return Array.from(document.images).map(i => i.complete ? i.naturalWidth : 0)")
    assert len(sizes) == 9 and all(size > 100 for size in sizes)
    wide = browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert wide, "the page scrolls sideways"

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
