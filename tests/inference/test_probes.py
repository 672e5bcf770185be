# SPDX-License-Identifier: Apache-2.0
"""Probes, against scikit-learn and NumPy used by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from volta_components.downstream.metrics import Resampling, auroc_within, interval
from volta_components.errors import InputError
from volta_components.inference.embeddings import EmbeddingTable
from volta_components.inference.probes import out_of_fold_scores, probe_report

Draw = tuple[np.ndarray, np.ndarray, np.ndarray]


def subjects(rng: np.random.Generator, count: int = 60, size: int = 6, shift: float = 0.8, folds: int = 4) -> Draw:
    """Features of two classes ``shift`` apart along two axes of unequal scale; labels; folds of both classes."""
    labels = np.arange(count) % 2
    features = rng.normal(size=(count, size)) * np.array([1, 5, 1, 0.1, 20, 1])[:size] + 3
    features[:, :2] += shift * labels[:, None] * np.array([1, 5])
    return features, labels, np.arange(count) // 2 % folds


# Scores -------------------------------------------------------------------------------------------------------------


def test_nearest_neighbours_equal_numpy(rng: np.random.Generator) -> None:
    """Votes of the nearest five among the other folds, weighted by one over the distance on the unit sphere."""
    features, labels, folds = subjects(rng)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.empty(len(labels))
    for i, row in enumerate(unit):
        others = np.flatnonzero(folds != folds[i])
        distances = np.sqrt(2 - 2 * unit[others] @ row)
        nearest = np.argsort(distances)[:5]
        votes = 1 / distances[nearest]
        expected[i] = (votes * labels[others[nearest]]).sum() / votes.sum()
    actual = out_of_fold_scores(features, labels, folds, "knn", neighbours=5)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_more_neighbours_than_subjects_means_all_of_them(rng: np.random.Generator) -> None:
    features, labels, folds = subjects(rng, count=16)
    few, many = (out_of_fold_scores(features, labels, folds, "knn", neighbours=n) for n in (12, 500))
    np.testing.assert_array_equal(few, many)


def test_the_linear_probe_is_a_logistic_regression_of_standardised_features(rng: np.random.Generator) -> None:
    """Its strength has the best mean AUROC over five inner folds of the training part; the smallest of equals."""
    features, labels, folds = subjects(rng, shift=1.5)
    expected = np.empty(len(labels))
    for fold in range(4):
        fitted, scored = folds != fold, folds == fold
        mean, deviation = features[fitted].mean(axis=0), features[fitted].std(axis=0)
        inside, outside = (features[fitted] - mean) / deviation, (features[scored] - mean) / deviation
        truth = labels[fitted]
        strengths = np.logspace(-4, 1, 6)
        scores = np.zeros(6)
        for part, rest in StratifiedKFold(5).split(inside, truth):
            for i, strength in enumerate(strengths):
                model = LogisticRegression(C=strength, max_iter=500).fit(inside[part], truth[part])
                scores[i] += roc_auc_score(truth[rest], model.decision_function(inside[rest])) / 5
        best = LogisticRegression(C=strengths[np.argmax(scores)], max_iter=500).fit(inside, truth)
        expected[scored] = 1 / (1 + np.exp(-(outside @ best.coef_[0] + best.intercept_[0])))
    actual = out_of_fold_scores(features, labels, folds, "linear")
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4)  # solvers stop at a tolerance
    assert roc_auc_score(labels, actual) > 0.6


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_a_fold_never_sees_itself(rng: np.random.Generator, probe: str) -> None:
    """Other labels or features in a fold change no score of its own other subjects, but those of other folds."""
    features, labels, folds = subjects(rng)
    before = out_of_fold_scores(features, labels, folds, probe)
    inside = folds == 2

    turned = np.where(inside, 1 - labels, labels)
    after = out_of_fold_scores(features, turned, folds, probe)
    np.testing.assert_array_equal(after[inside], before[inside])
    assert not np.array_equal(after[~inside], before[~inside])

    moved = features.copy()
    last = np.flatnonzero(inside)[-1]
    moved[last] += 100.0
    after = out_of_fold_scores(moved, labels, folds, probe)
    rest = inside.copy()
    rest[last] = False
    np.testing.assert_allclose(after[rest], before[rest], rtol=1e-12)


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_labels_that_features_say_nothing_of_score_like_chance(rng: np.random.Generator, probe: str) -> None:
    """Each subject has a feature of its own: within a fold it would be learnt by heart; out of fold it is useless."""
    count = 200
    labels = rng.permutation(np.arange(count) % 2)
    scores = out_of_fold_scores(np.eye(count), labels, np.arange(count) % 5, probe)
    assert 0.3 < roc_auc_score(labels, scores) < 0.6


def test_too_few_of_a_class_and_unknown_probes_are_named(rng: np.random.Generator) -> None:
    features, _, _ = subjects(rng, count=12)
    labels = np.array([0] * 9 + [1] * 3)
    with pytest.raises(InputError, match="fold 2: the other folds hold 0 of one class and two are needed"):
        out_of_fold_scores(features, labels, np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 2, 2]), "linear")
    with pytest.raises(InputError, match="fold 1: the other folds hold 1 of one class"):
        out_of_fold_scores(features, labels, np.array([1] * 5 + [0] * 5 + [1, 1]), "knn")
    with pytest.raises(InputError, match="no probe 'svm'; there are 'knn', 'linear' and 'ridge'"):
        out_of_fold_scores(features, np.arange(12) % 2, np.arange(12) // 2 % 2, "svm")


# Report -------------------------------------------------------------------------------------------------------------


def table_of(summary: np.ndarray, mean: np.ndarray) -> EmbeddingTable:
    table = EmbeddingTable()
    table.rows[:] = [{"summary": one, "mean": other} for one, other in zip(summary, mean, strict=True)]
    return table


@pytest.fixture
def cohort(rng: np.random.Generator) -> tuple[dict[str, EmbeddingTable], list[dict[str, Any]]]:
    """Forty scans of twenty patients; the good encoder's summary knows sex; diagnosis is unknown for some."""
    items = [
        {
            "subject_id": f"sub-{i // 2:02d}",
            "patient_id": f"p{i // 2:02d}",
            "session": f"ses-{i % 2}",
            "sex": "MF"[i // 2 % 2],
            "diagnosis": ("CN", "MCI", "AD", None)[i // 4 % 4],
            "fold": i // 16 % 2,
            "site": "AB"[i % 2],
        }
        for i in range(40)
    ]
    sex = np.array([item["sex"] == "F" for item in items])
    noise = rng.normal(size=(3, 40, 4))
    good = noise[0] + 3.0 * sex[:, None]
    return {"volta": table_of(good, noise[1]), "random": table_of(noise[2], noise[1])}, items


def test_the_report_has_a_row_for_each_combination(
    cohort: tuple[dict[str, EmbeddingTable], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables, items = cohort
    targets = {"sex": ["M", "F"], "diagnosis": ["CN", "AD"], "age": ["young", "old"]}
    rows = probe_report(tables, items, targets, tmp_path / "new" / "probes.json", neighbours=5, leak="allowed")
    assert json.loads((tmp_path / "new" / "probes.json").read_text()) == rows
    everything = rows
    rows = [row for row in rows if row["label"] != "same subject"]
    assert len(rows) == 2 * 2 * 3 * 2 and len(everything) == len(rows) + 2 * 2 * 3
    assert len({(r["label"], r["encoder"], r["embedding"], r["probe"]) for r in rows}) == len(rows)
    assert {r["label"] for r in rows} == {"sex", "diagnosis"}  # nobody's age is "old"
    for row in rows:
        expected = (40, 20, 20) if row["label"] == "sex" else (20, 10, 8)
        assert (row["scans"], row["patients"], row["positive"], row["leak"]) == (*expected, "allowed")
    best = next(r for r in rows if (r["label"], r["encoder"], r["embedding"]) == ("sex", "volta", "summary"))
    assert best["value"] > 0.9
    chance = [r["value"] for r in rows if r["encoder"] == "random" and r["label"] == "sex"]
    assert max(chance) < 0.8

    # One row by hand: who is scored, which class is 1, and patients rather than scans in the bootstrap.
    (row,) = [
        r
        for r in rows
        if (r["label"], r["encoder"], r["embedding"], r["probe"]) == ("diagnosis", "volta", "summary+mean", "knn")
    ]
    known = [i for i, item in enumerate(items) if item["diagnosis"] in ("CN", "AD")]
    truth = np.array([items[i]["diagnosis"] == "AD" for i in known]).astype(int)
    features = tables["volta"].matrix("summary+mean")[known]
    folds = np.array([items[i]["fold"] for i in known])
    scores = out_of_fold_scores(features, truth, folds, "knn", 5)
    patients = [items[i]["patient_id"] for i in known]
    weights = Resampling(patients, seed=0).weights(patients)
    assert (row["low"], row["high"]) == interval(auroc_within(truth, scores, folds, weights))
    # Pairs within each fold, as often as there are pairs of a one and a zero.
    areas = [roc_auc_score(truth[folds == fold], scores[folds == fold]) for fold in np.unique(folds)]
    pairs = [truth[folds == fold].sum() * (1 - truth[folds == fold]).sum() for fold in np.unique(folds)]
    assert row["value"] == pytest.approx(np.average(areas, weights=pairs))

    printed = capsys.readouterr().out.splitlines()
    assert printed.pop(0) == "diagnosis: scans with another value are left out, 12 of 40 ('MCI')"
    assert printed.pop(0) == "age: left out; no scan has 'young' or 'old'"
    table = printed[: 1 + len(everything)]
    assert table[0].startswith("label")
    assert any(str(tmp_path / "new" / "probes.json") in line for line in printed[len(table) :])
    line = next(line for line in table if line.split()[:4] == ["sex", "volta", "summary", "knn"])
    assert f"{best['value']:.3f} ({best['low']:.3f} to {best['high']:.3f})" in line


def test_each_cohort_is_told_from_the_rest(
    cohort: tuple[dict[str, EmbeddingTable], list[dict[str, Any]]], tmp_path: Path
) -> None:
    tables, items = cohort
    for names, expected in (
        (("adni", "brats"), {"cohort:brats": 20}),
        (("adni", "brats", "ixi"), {"cohort:adni": 14, "cohort:brats": 14, "cohort:ixi": 12}),
        (("adni",), {}),
        (("adni",) * 19 + ("ixi",), {}),  # one patient: too few
    ):
        mixed = [{**item, "cohort": names[i // 2 % len(names)]} for i, item in enumerate(items)]
        rows = probe_report(tables, mixed, {"sex": ["M", "F"], "cohort": []}, tmp_path / "probes.json", neighbours=5)
        told = {row["label"]: row["positive"] for row in rows if row["label"].startswith("cohort")}
        assert told == expected and all(row["scans"] == 40 for row in rows)
    known = next(
        row
        for row in probe_report(
            tables,
            [{**item, "cohort": f"of {item['sex']}"} for item in items],
            {"cohort": []},
            tmp_path / "probes.json",
        )
        if (row["encoder"], row["embedding"]) == ("volta", "summary")
    )
    assert known["label"] == "cohort:of M" and known["value"] > 0.9


def test_a_rare_class_does_not_cost_the_other_labels(
    cohort: tuple[dict[str, EmbeddingTable], list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three scans with dementia, two of them in the same fold."""
    tables, items = cohort
    folds = [item["fold"] for item in items]
    first, second = [i for i, fold in enumerate(folds) if fold == 0][:2]
    demented = {first, second, folds.index(1)}
    items = [{**item, "diagnosis": "AD" if i in demented else "CN"} for i, item in enumerate(items)]
    rows = probe_report(tables, items, {"diagnosis": ["CN", "AD"], "sex": ["M", "F"]}, tmp_path / "probes.json")
    assert "sex" in {row["label"] for row in rows} and "diagnosis" not in {row["label"] for row in rows}
    assert "diagnosis: left out; without one of the folds, 1 of one class remain" in capsys.readouterr().out


def test_who_is_not_asked_is_told(
    cohort: tuple[dict[str, EmbeddingTable], list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, items = cohort
    items = [
        {**item, **({"sex": "female", "age": "61.5Y"} if i < 4 else {"age": 60 + i})} for i, item in enumerate(items)
    ]
    targets = {"sex": ["M", "F"], "diagnosis": ["cn", "ad"]}
    rows = probe_report(tables, items, targets, tmp_path / "probes.json", numbers=["age", "aeg"])
    assert {"sex", "age"} <= {row["label"] for row in rows}
    printed = capsys.readouterr().out
    assert f"sex: scans with another value are left out, 4 of {len(items)} ('female')" in printed
    assert "diagnosis: left out; no scan has 'cn' or 'ad'" in printed
    assert "age: 4 scans are left out, which have no number, such as '61.5Y'" in printed
    assert "aeg: left out; 0 scans have one" in printed


@pytest.mark.parametrize("change", [lambda i: {"sex": "M"}, lambda i: {"sex": None}, lambda i: {"sex": "MF"[i == 0]}])
def test_a_report_without_any_label_is_refused(
    cohort: tuple[dict[str, EmbeddingTable], list[dict[str, Any]]],
    tmp_path: Path,
    change: Callable[[int], dict[str, Any]],
) -> None:
    tables, items = cohort
    alone = [f"sub-{i}" for i in range(len(items))]
    items = [{**item, **change(i), "subject_id": alone[i], "patient_id": alone[i]} for i, item in enumerate(items)]
    with pytest.raises(InputError, match=r"no label of sex has both classes .* give --targets, or use fewer"):
        probe_report(tables, items, {"sex": ["M", "F"]}, tmp_path / "probes.json")
    assert not (tmp_path / "probes.json").exists()
