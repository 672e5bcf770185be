# SPDX-License-Identifier: Apache-2.0
"""Probes: what a frozen encoder knows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from volta_components.downstream.metrics import auroc_interval
from volta_components.errors import InputError
from volta_components.files import write_json
from volta_components.inference.embeddings import EmbeddingTable


def out_of_fold_scores(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, probe: str, neighbours: int = 20, seed: int = 0
) -> np.ndarray:
    """Scores ``[n]``, higher for label 1, of every subject from a probe that was fitted on the other folds.

    The probe is ``knn`` (cosine distance, votes weighted by it) or ``linear`` (standardised features, L2 logistic
    regression whose strength is chosen by cross-validation within the training part). Features are ``[n, D]``.

    Raises:
        InputError: if a training part has fewer than two of a class.
    """
    scores = np.full(len(labels), np.nan)
    for fold in np.unique(folds):
        scored = folds == fold
        fitted = ~scored
        fewest = int(np.bincount(labels[fitted].astype(int), minlength=2).min())
        if fewest < 2:
            raise InputError(
                f"fold {fold}: the other folds hold {fewest} of one class and two are needed; use fewer folds or more "
                "subjects"
            )
        if probe == "knn":
            count = min(neighbours, int(fitted.sum()))
            model: Any = make_pipeline(Normalizer(), KNeighborsClassifier(count, weights="distance"))
        elif probe == "linear":
            model = make_pipeline(
                StandardScaler(),
                LogisticRegressionCV(
                    Cs=np.logspace(-4, 1, 6),
                    cv=min(5, fewest),
                    scoring="roc_auc",
                    max_iter=500,
                    random_state=seed,
                    l1_ratios=(0.0,),
                    use_legacy_attributes=False,
                ),
            )
        else:
            raise InputError(f"no probe {probe!r}; there are 'knn' and 'linear'")
        model.fit(features[fitted], labels[fitted])
        scores[scored] = model.predict_proba(features[scored])[:, 1]
    return scores


def _questions(
    items: Sequence[Mapping[str, Any]], targets: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name of each question, ``[n]`` whom it is asked of, and ``[known]`` the answers, 0 or 1."""
    for label, classes in targets.items():
        values = np.array([str(item.get(label)) for item in items])
        if classes:
            negative, positive = classes
            known = np.isin(values, [negative, positive])
            yield label, known, (values[known] == positive).astype(int)
            continue
        known = np.array([item.get(label) is not None for item in items])
        found = np.unique(values[known])
        # Of two values, one from the other says it all.
        for value in found[1:] if len(found) == 2 else found:
            yield f"{label}:{value}", known, (values[known] == value).astype(int)


def probe_report(
    tables: Mapping[str, EmbeddingTable],
    items: Sequence[Mapping[str, Any]],
    targets: Mapping[str, Sequence[str]],
    path: str | os.PathLike[str],
    neighbours: int = 20,
    seed: int = 0,
    leak: str = "none",
) -> list[dict[str, Any]]:
    """Probe several encoders on the same subjects, print the comparison and write it as JSON.

    Args:
        tables: embeddings by encoder, such as ``{"volta": ..., "random": ...}``; rows as ``items``.
        items: the datalist's items: ``patient_id``, ``fold`` and the labels.
        targets: for each label (``sex``, ``diagnosis``) the value that counts as 0 and the one that counts as 1; items
            with another value are left out of that label. Without values (``cohort``), each value is told from the
            rest, named ``cohort:adni``; an encoder that scores high on that knows scanners or skulls.
        path: the JSON file.
        neighbours: of the nearest-neighbour probe.
        seed: of probes and bootstrap.
        leak: of ``check_origin``; ``allowed`` when scored patients were, or may have been, pretrained on. It is in
            every row.

    Returns:
        A row for each label, encoder, kind of embedding and probe.

    Raises:
        InputError: if no label has both classes, or too few of one.
    """
    rows: list[dict[str, Any]] = []
    folds = np.array([item["fold"] for item in items])
    patients = np.array([str(item.get("patient_id", item["subject_id"])) for item in items])
    for label, known, truth in _questions(items, targets):
        if len(np.unique(truth)) < 2:
            continue
        held = folds[known]
        if label not in targets and min(np.bincount(truth[held != f], minlength=2).min() for f in np.unique(held)) < 2:
            print(f"{label}: too few in some folds to be probed")
            continue
        for encoder, table in tables.items():
            for feature in ("summary", "mean", "summary+mean"):
                matrix = table.matrix(feature)[known]
                for probe in ("knn", "linear"):
                    try:
                        scores = out_of_fold_scores(matrix, truth, folds[known], probe, neighbours, seed)
                    except InputError as error:
                        raise InputError(f"label {label!r}: {error}") from error
                    auroc, low, high = auroc_interval(truth, scores, list(patients[known]), seed=seed)
                    rows.append(
                        {
                            "label": label,
                            "encoder": encoder,
                            "embedding": feature,
                            "probe": probe,
                            "subjects": int(known.sum()),
                            "positive": int(truth.sum()),
                            "auroc": auroc,
                            "auroc_low": low,
                            "auroc_high": high,
                            "leak": leak,
                        }
                    )
    if not rows:
        raise InputError(f"no label of {', '.join(targets)} has both classes in the datalist; give --targets")
    write_json(path, rows)
    print(f"{'label':<10} {'encoder':<8} {'embedding':<13} {'probe':<7} AUROC (95 % interval), out of fold")
    for row in rows:
        print(
            f"{row['label']:<10} {row['encoder']:<8} {row['embedding']:<13} {row['probe']:<7} "
            f"{row['auroc']:.3f} ({row['auroc_low']:.3f} to {row['auroc_high']:.3f})"
        )
    if leak != "none":
        print("Scored patients were, or may have been, pretrained on: these numbers are too good.")
    print(f"{path}")
    return rows
