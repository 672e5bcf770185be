# SPDX-License-Identifier: Apache-2.0
"""Probes: what a frozen encoder knows, beside random weights and plain voxels.

Three shortcuts look like knowledge: the position of a token, the scanner, the cohort. An encoder that has nothing else
is at chance in each measure here but that of the cohort, which should be low.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from volta_components.downstream.metrics import Resampling, auroc_within, interval, patients_for_auroc
from volta_components.errors import InputError
from volta_components.files import write_json
from volta_components.inference.embeddings import EmbeddingTable
from volta_components.inference.tokens import TokenTable, errors_beyond_position

_COMPONENTS = 100


class Features(NamedTuple):
    """Embeddings ``matrix`` ``[n, D]`` of an encoder; of those that say where, ``components`` of a PCA come first.

    These are ``places``, means of tokens in parts of the volume, and plain voxels: the two that compare like with like.
    """

    encoder: str
    embedding: str
    matrix: np.ndarray
    components: int | None = None


def out_of_fold_scores(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    probe: str,
    neighbours: int = 20,
    seed: int = 0,
    components: int | None = None,
) -> np.ndarray:
    """Scores of every subject from a probe that was fitted on the other folds.

    Args:
        features: ``[n, D]``.
        labels: ``[n]``, 0 or 1; with ``ridge``, any numbers.
        folds: ``[n]``, by patient.
        probe: ``knn`` (Euclidean distance of unit vectors, votes weighted by one over it), ``linear`` (standardised
            features, L2 logistic regression whose strength is chosen by cross-validation within the training part) or
            ``ridge`` (linear regression of standardised features, its strength likewise).
        neighbours: of ``knn``.
        seed: for the inner cross-validation.
        components: of a PCA that comes first, fitted on the other folds; ``None`` for none.

    Returns:
        ``[n]``, higher for label 1, or the predicted numbers.

    Raises:
        InputError: if a training part has fewer than two of a class.
    """
    scores = np.full(len(labels), np.nan)
    for fold in np.unique(folds):
        scored = folds == fold
        fitted = ~scored
        steps: list[Any] = []
        if components is not None:
            steps.append(PCA(min(components, int(fitted.sum()) - 1, features.shape[1]), svd_solver="full"))
        if probe == "ridge":
            model: Any = make_pipeline(*steps, StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
            scores[scored] = model.fit(features[fitted], labels[fitted]).predict(features[scored])
            continue
        fewest = int(np.bincount(labels[fitted].astype(int), minlength=2).min())
        if fewest < 2:
            raise InputError(
                f"fold {fold}: the other folds hold {fewest} of one class and two are needed; use fewer folds or more "
                "subjects"
            )
        if probe == "knn":
            count = min(neighbours, int(fitted.sum()))
            model = make_pipeline(*steps, Normalizer(), KNeighborsClassifier(count, weights="distance"))
        elif probe == "linear":
            model = make_pipeline(
                *steps,
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
            raise InputError(f"no probe {probe!r}; there are 'knn', 'linear' and 'ridge'")
        model.fit(features[fitted], labels[fitted])
        scores[scored] = model.predict_proba(features[scored])[:, 1]
    return scores


def finds_same_subject(
    features: np.ndarray,
    subjects: np.ndarray,
    cohorts: np.ndarray,
    components: int | None = None,
    apart: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the nearest neighbour of a scan, in its cohort, is another scan of the same subject.

    Nearest by the cosine of standardised features. Scans of one subject have different visits or scanners, so that an
    encoder that knows scanners does not find them.

    Args:
        features: ``[n, D]``.
        subjects: ``[n]``, who each scan is of.
        cohorts: ``[n]``; only scans of the same cohort are compared.
        components: as for ``out_of_fold_scores``, and at most half as many as scans: standardised, as many components
            as there are scans put all of them equally far from each other.
        apart: ``[n]``; scans that have the same value here are not compared.

    Returns:
        ``[n]`` 1 where it is, 0 where not; and ``[n]`` the share that chance would give. Both are NaN for
        subjects with one scan in their cohort.
    """
    columns = features.astype(float)
    if components is not None:
        count = max(1, min(components, len(columns) // 2, columns.shape[1] - 1))
        columns = PCA(count, svd_solver="full").fit_transform(columns)
    unit = Normalizer().fit_transform(StandardScaler().fit_transform(columns))
    same_cohort = cohorts[:, None] == cohorts
    if apart is not None:
        same_cohort &= apart[:, None] != apart
    same_subject = (subjects[:, None] == subjects) & same_cohort
    np.fill_diagonal(same_cohort, False)
    np.fill_diagonal(same_subject, False)
    likeness = np.where(same_cohort, unit @ unit.T, -np.inf)
    # Of several that are equally near, such as all of a constant encoder, each counts by its share.
    nearest = (likeness >= likeness.max(axis=1, keepdims=True) - 1e-9) & same_cohort
    others = same_cohort.sum(axis=1)
    asked = same_subject.any(axis=1)
    found = (nearest & same_subject).sum(axis=1) / np.maximum(nearest.sum(axis=1), 1)
    chance = same_subject.sum(axis=1) / np.maximum(others, 1)
    return np.where(asked, found, np.nan), np.where(asked, chance, np.nan)


def _explained(errors: np.ndarray, naive: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Share of the squared errors ``naive [n]`` that is not in ``errors [n]``, and its interval over the weights."""
    return float(1 - errors.sum() / naive.sum()), *interval(1 - (weights @ errors) / (weights @ naive))


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


def _tell_who_is_not_asked(items: Sequence[Mapping[str, Any]], label: str, classes: Sequence[str]) -> None:
    """Say which values of a label are none of its classes, and which class nobody has."""
    values = [str(item[label]) for item in items if item.get(label) is not None]
    if classes and (others := [value for value in values if value not in classes]):
        some = ", ".join(map(repr, sorted({*others})[:5]))
        print(f"{label}: scans with another value are left out, {len(others)} of {len(items)} ({some})")
    if absent := [value for value in classes if value not in values]:
        print(f"{label}: left out; no scan has {' or '.join(map(repr, absent))}")
    elif not values:
        print(f"{label}: left out; no scan has one")


def _features(tables: Mapping[str, EmbeddingTable]) -> list[Features]:
    """Embeddings of each encoder, and the voxels of the volumes where one of the tables has them."""
    found = []
    for encoder, table in tables.items():
        found += [Features(encoder, name, table.matrix(name)) for name in ("summary", "mean", "summary+mean")]
        if table.rows and "places" in table.rows[0]:
            found.append(Features(encoder, "places", table.matrix("places"), _COMPONENTS))
    with_voxels = [table for table in tables.values() if table.rows and "voxels" in table.rows[0]]
    return found + [Features("voxels", "voxels", table.matrix("voxels"), _COMPONENTS) for table in with_voxels[:1]]


class Probes:
    """The questions that can be asked of a datalist's items, each giving rows of the report."""

    def __init__(
        self, items: Sequence[Mapping[str, Any]], features: list[Features], neighbours: int, seed: int
    ) -> None:
        self.items = items
        self.features = features
        self.neighbours = neighbours
        self.seed = seed
        self.folds = np.array([item["fold"] for item in items])
        self.patients = np.array([str(item.get("patient_id", item["subject_id"])) for item in items])
        self.cohorts = np.array([str(item.get("cohort", "")) for item in items])

    def _weights(self, chosen: np.ndarray) -> np.ndarray:
        """``[samples, chosen]``: how often each bootstrap sample of patients holds each chosen item."""
        patients = self.patients[chosen].tolist()
        return Resampling(patients, seed=self.seed).weights(patients)

    def classes(self, targets: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """AUROC of each label, out of fold, of pairs of scans in the same fold.

        Labels that are too rare for it are left out, with a word why, and so are scans with another value.
        """
        for label, classes in targets.items():
            _tell_who_is_not_asked(self.items, label, classes)
        for label, known, truth in _questions(self.items, targets):
            folds = self.folds[known]
            if len(np.unique(truth)) < 2:
                continue
            fewest = min(np.bincount(truth[folds != fold], minlength=2).min() for fold in np.unique(folds))
            if fewest < 2:
                print(
                    f"{label}: left out; without one of the folds, {fewest} of one class remain and two are needed; "
                    "use fewer folds or more subjects"
                )
                continue
            if all(len(np.unique(truth[folds == fold])) < 2 for fold in np.unique(folds)):
                print(f"{label}: left out; no fold has both classes, and only scans of one fold are compared")
                continue
            weights = self._weights(known)
            for each in self.features:
                for probe in ("knn", "linear"):
                    matrix = each.matrix[known]
                    scores = out_of_fold_scores(
                        matrix, truth, folds, probe, self.neighbours, self.seed, each.components
                    )
                    figures = auroc_within(truth, scores, folds), *interval(auroc_within(truth, scores, folds, weights))
                    row = self._row(label, each, probe, "auroc", known, figures, chance=0.5)
                    yield row | {
                        "positive": int(truth.sum()),
                        "interval_patients": patients_for_auroc(truth, self.patients[known]),
                    }

    def numbers(self, name: str, values: Sequence[float | None]) -> Iterator[dict[str, Any]]:
        """Share of the variance of numbers that a ridge regression explains, out of fold.

        Beside it stands the mean of the other folds, which is what a regression says that knows nothing. (Pearson's r
        would be far below 0 for it: where held-out numbers are high, the mean of the others is low.)
        """
        known = np.array([value is not None and bool(np.isfinite(value)) for value in values])
        truth = np.array([value for value, there in zip(values, known, strict=True) if there], dtype=float)
        folds = self.folds[known]
        if len(truth) < 10 or len(np.unique(folds)) < 2 or truth.std() == 0:
            print(f"{name}: left out; {len(truth)} scans have one, and ten that differ are needed, in two folds")
            return
        weights = self._weights(known)
        others = {fold: truth[folds != fold].mean() for fold in np.unique(folds)}
        naive = (truth - [others[fold] for fold in folds]) ** 2
        for each in self.features:
            told = out_of_fold_scores(each.matrix[known], truth, folds, "ridge", components=each.components)
            errors = (truth - told) ** 2
            figures = _explained(errors, naive, weights)
            yield self._row(name, each, "ridge", "r2", known, figures, chance=0.0)

    def same_subject(self) -> Iterator[dict[str, Any]]:
        """Share of scans whose nearest neighbour is another scan of the same subject: the same head, seen again.

        Nearest by standardised features (``nearest``), and by standardised principal components (``whitened``): what
        varies most, such as contrast, then counts no more than the rest. Where several subjects are one patient, as
        heads of one anatomy are, also the share whose nearest scan of another subject is of the same patient.
        """
        subjects = np.array([str(item["subject_id"]) for item in self.items])
        for name, who, apart in (("same subject", subjects, None), ("same patient", self.patients, subjects)):
            for each, way in itertools.product(self.features, ("nearest", "whitened")):
                components = _COMPONENTS if way == "whitened" else None
                found, by_chance = finds_same_subject(each.matrix, who, self.cohorts, components, apart)
                asked = np.isfinite(found)
                if not asked.any():
                    break
                weights = self._weights(asked)
                figures = (found[asked].mean(), *interval(weights @ found[asked] / weights.sum(axis=1)))
                yield self._row(name, each, way, "share", asked, figures, by_chance[asked].mean())

    def tokens(self, tables: Mapping[str, TokenTable]) -> Iterator[dict[str, Any]]:
        """Share of variance of what fills a patch that its token explains and its position does not."""
        for encoder, table in tables.items():
            folds = self.folds[table.known]
            if len(np.unique(folds)) < 2:
                return
            errors, naive = errors_beyond_position(table.tokens, table.shares, folds)
            weights = self._weights(table.known)
            figures = _explained(errors, naive, weights)
            each = Features(encoder, "tokens", np.empty(0))
            yield self._row("hippocampus in the patch", each, "ridge", "r2", table.known, figures, chance=0.0)

    def _row(
        self,
        label: str,
        features: Features,
        probe: str,
        measure: str,
        chosen: np.ndarray,
        figures: tuple[Any, ...],
        chance: float,
    ) -> dict[str, Any]:
        value, low, high = (float(figure) for figure in figures)
        return {
            "label": label,
            "encoder": features.encoder,
            "embedding": features.embedding,
            "probe": probe,
            "measure": measure,
            "scans": int(np.sum(chosen)),
            "patients": len(np.unique(self.patients[chosen])),
            "value": value,
            "low": low,
            "high": high,
            "chance": float(chance),
        }


def interval_patients(row: Mapping[str, Any]) -> int:
    """How many patients the interval of a report's row rests on; reports of earlier versions do not say it."""
    return int(row.get("interval_patients", row["patients"]))


def probe_report(
    tables: Mapping[str, EmbeddingTable],
    items: Sequence[Mapping[str, Any]],
    targets: Mapping[str, Sequence[str]],
    path: str | os.PathLike[str],
    neighbours: int = 20,
    seed: int = 0,
    leak: str = "none",
    numbers: Sequence[str] = (),
    tokens: Mapping[str, TokenTable] | None = None,
    model: str = "",
) -> list[dict[str, Any]]:
    """Probe several encoders on the same scans, print the comparison and write it as JSON.

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
        numbers: keys of items that hold numbers, such as ``age``; those without are left out.
        tokens: tokens by encoder, of the same items; where these have label maps, the volume of the hippocampi and what
            fills a patch are asked too.
        model: hash of the encoder that is asked about; in every row.

    Returns:
        A row for each question, encoder, kind of embedding and probe: ``measure`` (``auroc``, ``share`` or
        ``r2``), ``value``, its 95 % interval over patients ``low`` and ``high``, and what ``chance`` gives.

    Raises:
        InputError: if nothing can be asked.
    """
    probes = Probes(items, _features(tables), neighbours, seed)
    rows = list(probes.classes(targets))
    for key in numbers:
        values = [_number(item.get(key)) for item in items]
        texts = [item[key] for item, value in zip(items, values) if value is None and item.get(key) is not None]
        if texts:
            print(f"{key}: {len(texts)} scans are left out, which have no number, such as {texts[0]!r}")
        rows += probes.numbers(key, values)
    labelled = {encoder: table for encoder, table in (tokens or {}).items() if table.known.any()}
    if labelled:
        table = next(iter(labelled.values()))
        volumes = np.full(len(items), np.nan)
        volumes[table.known] = table.shares.sum(axis=1, dtype=float)
        rows += probes.numbers("hippocampal volume", volumes.tolist())
    rows += probes.same_subject()
    rows += probes.tokens(labelled)
    if not rows:
        raise InputError(
            f"no label of {', '.join(targets)} has both classes in the datalist, two of each without any fold; give "
            "--targets, or use fewer folds or more subjects"
        )
    rows = [row | {"leak": leak, "model_sha256": model} for row in rows]
    write_json(path, rows)
    columns = "{label:<25} {encoder:<8} {embedding:<13} {probe:<8} {measure:<8} "
    head = {name: name for name in ("label", "encoder", "embedding", "probe", "measure")}
    print(columns.format(**head) + "value (95 % interval, out of fold), chance")
    for row in rows:
        print(columns.format(**row) + "{value:.3f} ({low:.3f} to {high:.3f}), {chance:.2f}".format(**row))
    if leak != "none":
        print("Scored patients were, or may have been, pretrained on: these numbers are too good.")
    print(f"{path}")
    return rows


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
