# SPDX-License-Identifier: Apache-2.0
"""Encoders that know position, scanner or nothing at all must look useless in every measure; voxels must not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from sklearn.linear_model import Ridge

from volta_components.inference.embeddings import EmbeddingTable
from volta_components.inference.probes import finds_same_subject, out_of_fold_scores, probe_report
from volta_components.inference.tokens import TokenTable, errors_beyond_position

GRID = (3, 4, 2)
PEOPLE = 40
ENCODERS = ("constant", "position", "scanner", "anatomy")


@pytest.fixture
def study(rng: np.random.Generator) -> tuple[dict[str, EmbeddingTable], dict[str, TokenTable], list[dict[str, Any]]]:
    """Forty people, each under two scanners; hippocampi of various sizes in two of 24 patches."""
    count = math.prod(GRID)
    positions = rng.normal(size=(count, 8))
    people, scanners = rng.normal(size=(PEOPLE, 6)), rng.normal(size=(2 * PEOPLE, 6)) * 3
    sizes = rng.integers(60, 200, PEOPLE)
    tables = {name: EmbeddingTable() for name in ENCODERS}
    tokens = {name: TokenTable() for name in ENCODERS}
    items = []
    for scan in range(2 * PEOPLE):
        who = scan // 2
        label = np.zeros((1, 24, 32, 16), np.uint8)
        for side in (1, 2):
            corner = label[0, 8:16, 8 * side : 8 * side + 8, :8].reshape(-1).copy()
            corner[: sizes[who]] = side
            label[0, 8:16, 8 * side : 8 * side + 8, :8] = corner.reshape(8, 8, 8)
        item = {"subject_id": f"sub-{who}", "patient_id": f"p{who}", "fold": who % 4, "sex": "MF"[who // 4 % 2]}
        items.append(item | {"session": f"ses-{scan % 2}", "age": float(50 + sizes[who] / 10)})
        image = MetaTensor(torch.zeros(1, 24, 32, 16))
        share = np.zeros(count)
        share[[1 * 8 + 1 * 2, 1 * 8 + 2 * 2]] = sizes[who] / 512
        found = {
            "constant": np.ones((count, 8)),
            "position": positions,
            "scanner": np.repeat(np.concatenate([scanners[scan], [0, 0]])[None], count, axis=0) + positions,
            "anatomy": positions
            + share[:, None] * np.ones(8)
            + np.concatenate([people[who], [0, 0]]) / 20
            + 0.01 * rng.normal(size=(count, 8)),
        }
        for name, each in found.items():
            summary = {
                "constant": np.ones(6),
                "position": positions.mean(axis=0)[:6],
                "scanner": scanners[scan],
                "anatomy": np.concatenate([[sizes[who] / 40], people[who][1:]]) + 0.1 * rng.normal(size=6),
            }[name]
            volume = torch.from_numpy(each.T.reshape(8, *GRID).astype(np.float32))
            prediction = {
                "summary": torch.from_numpy(summary.astype(np.float32)),
                "mean": volume.mean(dim=(1, 2, 3)),
                "tokens": volume,
                "places": volume,
            }
            row = tables[name].result({**items[-1], "image": image}, {"pred": prediction})[0]
            tables[name].rows.append(row)
            made = tokens[name].result({"image": image, "label": torch.from_numpy(label)}, {"pred": prediction})[0]
            tokens[name].rows.append(made)
    return tables, tokens, items


def test_every_measure_calls_useless_encoders_useless(
    study: tuple[dict[str, EmbeddingTable], dict[str, TokenTable], list[dict[str, Any]]], tmp_path: Path
) -> None:
    tables, tokens, items = study
    rows = probe_report(tables, items, {"sex": ["M", "F"]}, tmp_path / "probes.json", 5, numbers=["age"], tokens=tokens)
    asked = {
        ("same subject", "summary", "nearest"): 0.8,
        ("same subject", "summary", "whitened"): 0.8,
        ("same subject", "places", "nearest"): 0.8,
        ("hippocampal volume", "summary", "ridge"): 0.8,
        ("age", "summary", "ridge"): 0.8,
        ("hippocampus in the patch", "tokens", "ridge"): 0.8,
    }
    for question, good in asked.items():
        found = {row["encoder"]: row for row in rows if (row["label"], row["embedding"], row["probe"]) == question}
        assert set(found) == set(ENCODERS)
        for name in ENCODERS[:3]:
            row = found[name]
            assert abs(row["value"] - row["chance"]) < 0.3, row
            assert row["low"] - 0.12 <= row["chance"] <= row["high"] + 0.12, row
        assert found["anatomy"]["value"] > good, found["anatomy"]
        assert found["anatomy"]["low"] > found["anatomy"]["chance"]


def test_the_same_subject_is_looked_for_among_scans_of_its_cohort() -> None:
    """By hand: a and b have two scans each; c has one and is not asked; of two equally near ones, half counts."""
    patients = np.array(["a", "a", "b", "b", "c"])
    features = np.array([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [1.0, 0.05], [0.0, -1.0]])
    found, chance = finds_same_subject(features, patients, np.array(["x"] * 5))
    assert np.isnan(found[4]) and np.isnan(chance[4])
    np.testing.assert_allclose(chance[:4], 1 / 4)
    # Standardised, the third scan has the direction of the fifth rather than of the fourth.
    unit = (features - features.mean(axis=0)) / features.std(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = []
    for i in range(4):
        others = [j for j in range(5) if j != i]
        expected.append(patients[max(others, key=lambda j: float(unit[i] @ unit[j]))] == patients[i])
    np.testing.assert_array_equal(found[:4], expected)

    # The third and the fourth are one head: of others, none is of the same patient.
    other_heads, _ = finds_same_subject(
        features, np.array(["a", "a", "a", "b", "b"]), np.array(["x"] * 5), apart=np.array([1, 2, 2, 3, 3])
    )
    asked = []
    for i, (who, heads) in enumerate([("a", (1, 2, 3, 4)), ("a", (0, 3, 4)), ("a", (0, 3, 4))]):
        best = max(heads, key=lambda j: float(unit[i] @ unit[j]))
        asked.append(float("aaabb"[best] == who))
    np.testing.assert_array_equal(other_heads[:3], asked)
    assert np.isnan(other_heads[3:]).all()

    apart, by_chance = finds_same_subject(features, patients, np.array(["x", "x", "y", "y", "x"]))
    np.testing.assert_array_equal(apart[2:4], [1, 1])  # nobody else is in their cohort
    np.testing.assert_allclose(by_chance[:4], [1 / 2, 1 / 2, 1, 1])
    alike, _ = finds_same_subject(np.ones((5, 2)), patients, np.array(["x"] * 5))
    np.testing.assert_allclose(alike[:4], 1 / 4)


def test_whitened_features_count_no_direction_more_than_another(rng: np.random.Generator) -> None:
    """A scanner that every number tells of hides the head from plain features, and not from their components."""
    people, scanners = np.repeat(rng.normal(size=(30, 20)), 2, axis=0), rng.normal(size=(60, 1))
    features = people + 8 * scanners + 0.05 * rng.normal(size=(60, 20))
    subjects, cohorts = np.repeat(np.arange(30), 2).astype(str), np.array(["x"] * 60)
    plain, whitened = (
        finds_same_subject(features, subjects, cohorts, components)[0].mean() for components in (None, 100)
    )
    assert plain < 0.5 < 0.8 < whitened

    # As many standardised components as scans would put all scans equally far apart, whatever they show.
    wide = np.repeat(rng.normal(size=(30, 200)), 2, axis=0) + 0.5 * rng.normal(size=(60, 200))
    assert finds_same_subject(wide, subjects, cohorts, 100)[0].mean() > 0.8


def test_tokens_are_compared_without_what_their_position_says(rng: np.random.Generator) -> None:
    """Against ridge regression by scikit-learn with one strength, on residuals that are taken by hand."""
    tokens, folds = rng.normal(size=(12, 5, 3)), np.arange(12) % 3
    shares = np.clip(tokens[..., 0] * 0.1 + np.arange(5) * 0.1 + 0.2, 0, 1)
    shares[:, 4] = 0  # a position that no hippocampus reaches
    errors, naive = errors_beyond_position(tokens, shares, folds)
    for fold in range(3):
        fitted, scored = folds != fold, folds == fold
        means = shares[fitted].mean(axis=0)
        np.testing.assert_allclose(naive[scored], ((shares[scored] - means)[:, :4] ** 2).sum(axis=1))
        near = (tokens - tokens[fitted].mean(axis=0))[:, :4]
        truth = (shares - means)[:, :4]
        scale = near[fitted].reshape(-1, 3).std(axis=0)
        best = min(
            np.square(
                Ridge(alpha, fit_intercept=False)
                .fit(near[fitted].reshape(-1, 3) / scale, truth[fitted].ravel())
                .predict(near[scored].reshape(-1, 3) / scale)
                - truth[scored].ravel()
            ).sum()
            for alpha in np.logspace(-1, 6, 15)
        )
        assert best * 0.999 <= errors[scored].sum() <= best * 1.2
    assert errors.sum() < 0.2 * naive.sum()


def test_ridge_tells_numbers_out_of_fold(rng: np.random.Generator) -> None:
    features = rng.normal(size=(60, 5))
    values = 3 + features @ np.array([1.0, -2.0, 0, 0, 0.5])
    told = out_of_fold_scores(features, values, np.arange(60) % 3, "ridge")
    assert np.corrcoef(told, values)[0, 1] > 0.99
    reduced = out_of_fold_scores(features, values, np.arange(60) % 3, "ridge", components=5)
    np.testing.assert_allclose(reduced, told, atol=0.2)
    nothing = out_of_fold_scores(features, rng.permutation(values), np.arange(60) % 3, "ridge")
    assert abs(np.corrcoef(nothing, values)[0, 1]) < 0.4
