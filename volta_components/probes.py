# SPDX-License-Identifier: Apache-2.0
"""What a frozen encoder's embeddings know: nearest neighbours and linear probes, scored out of fold."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.inferers import Inferer
from scipy import ndimage
from sklearn.linear_model import LogisticRegressionCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor

from volta_components.data.volumes import volume_suffix
from volta_components.errors import InputError
from volta_components.files import atomic_path, write_json
from volta_components.journal import Journal
from volta_components.metrics import auroc_interval
from volta_components.networks import VoltaViT

FEATURES = ("summary", "mean")


class EmbeddingInferer(Inferer):
    """Summary, mean token and, if asked for, the summary's attention in one pass through the encoder.

    MONAI's ``SimpleInferer`` gives the network's one output; the mean token and the attention map come from the same
    tokens, which would otherwise be computed again.

    Args:
        attention: also give ``attention`` ``[B, 1, D, H, W]``.
    """

    def __init__(self, attention: bool = False) -> None:
        self.attention = attention

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Embeddings ``summary`` and ``mean`` ``[B, D]`` of volumes ``[B, 1, D, H, W]``."""
        assert isinstance(network, VoltaViT)
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        tokens = network.encode(image)
        output = {"summary": network.summarise(tokens).float(), "mean": tokens.mean(dim=1).float()}
        if self.attention:
            output["attention"] = network.attention_on_voxels(tokens, image)
        return output


def restore_map(
    values: np.ndarray, affine: np.ndarray, target_affine: np.ndarray, target_shape: Sequence[int]
) -> np.ndarray:
    """A map on the prepared grid, interpolated linearly to a scan's own grid.

    Args:
        values: ``[D, H, W]``.
        affine: ``[4, 4]`` of the prepared grid.
        target_affine: ``[4, 4]`` of the scan.
        target_shape: of the scan, voxels.

    Returns:
        ``target_shape``, float32; 0 outside the prepared grid. On equal grids nothing changes.
    """
    to_prepared = np.linalg.inv(affine) @ target_affine
    snapped = np.round(to_prepared)
    if np.abs(to_prepared - snapped).max() * max(target_shape) < 1e-3:
        to_prepared = snapped
    return ndimage.affine_transform(
        np.asarray(values, np.float32), to_prepared, output_shape=tuple(target_shape), order=1, mode="constant"
    )


class EmbeddingTable:
    """Collects the embeddings that an evaluator computes; writes them as tables, and attention maps as NIfTI.

    The table (CSV) has a row for each volume: ``subject_id``, ``session``, ``file`` where volumes come from files, then
    ``summary_0`` ... and ``mean_0`` ... . Beside it, with the suffix ``.npz``, the same lies as arrays for NumPy:
    those columns as text (``file`` as ``path``), ``summary`` and ``mean`` ``[volumes, D]`` as float32.

    An attention map lies on the grid that the volume's meta name as the scan's own (``LoadScand``), otherwise on
    the volume's; it is named after the volume's file, or after subject and session.

    Args:
        path: the table; ``None`` keeps it in memory only.
        attention_dir: folder for attention maps; ``None`` for none.
        keys: columns taken from the items.
        root: give attention maps the folders that their volumes have below this one.
        journal: keeps rows as they are made; the table has its rows then, of this start and earlier ones.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        attention_dir: str | os.PathLike[str] | None = None,
        keys: Sequence[str] = ("subject_id", "session"),
        root: str | os.PathLike[str] | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.journal = journal
        self.attention_dir = None if attention_dir is None else Path(attention_dir)
        self.keys = tuple(keys)
        self.root = root
        self.rows: list[dict[str, Any]] = []
        self.features: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES}

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch of the evaluator."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def _started(self) -> None:
        self.rows.clear()
        for values in self.features.values():
            values.clear()

    def _iteration_completed(self, engine: Any) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            meta = item["image"].meta if isinstance(item["image"], MetaTensor) else {}
            row = {**{key: item.get(key) for key in self.keys}, "file": str(meta.get("filename_or_obj") or "")}
            features = {name: output["pred"][name].cpu().numpy() for name in FEATURES}
            self._append(row, features)
            made = []
            if self.attention_dir is not None:
                made.append(self._write_attention(self.attention_dir, row, item["image"], output["pred"]["attention"]))
            if self.journal is not None and self.journal.has_begun:
                # A float32 as JSON's decimal number comes back as it was.
                content = {name: values.astype(np.float32).tolist() for name, values in features.items()}
                self.journal.add(row["file"], {"row": row, **content}, made)

    def _append(self, row: dict[str, Any], features: Mapping[str, np.ndarray]) -> None:
        self.rows.append(row)
        for name in FEATURES:
            self.features[name].append(features[name])

    def _write_attention(self, folder: Path, row: Mapping[str, Any], image: Tensor, attention: Tensor) -> Path:
        values = attention[0].float().cpu().numpy()
        affine, meta = np.eye(4), {}
        if isinstance(image, MetaTensor):
            affine, meta = np.asarray(torch.as_tensor(image.affine).cpu(), float), image.meta
        own, shape = affine, values.shape
        if "original_affine" in meta and "spatial_shape" in meta:
            own = np.asarray(torch.as_tensor(meta["original_affine"]).cpu(), float)
            shape = tuple(int(side) for side in torch.as_tensor(meta["spatial_shape"]))
        file = Path(row["file"])
        name = file.name[: len(file.name) - len(volume_suffix(file) or "")]
        name = name or "_".join(str(row[key]) for key in self.keys if row.get(key))
        if self.root is not None and row["file"]:
            folder = folder / os.path.relpath(file.parent, self.root)
        map_ = nib.Nifti1Image(restore_map(values, affine, own, shape), own)
        map_.header.set_xyzt_units("mm")
        path = folder / f"{name}_attention.nii.gz"
        with atomic_path(path) as temporary:
            nib.save(map_, temporary)
        return path

    def matrix(self, feature: str) -> np.ndarray:
        """All embeddings of one kind, ``[volumes, D]``, in order of the rows; ``summary+mean`` has both."""
        return np.concatenate([np.stack(self.features[part]) for part in feature.split("+")], axis=1)

    def write(self) -> None:
        """Write the tables."""
        if self.journal is not None and self.journal.has_begun:
            self._started()
            for content in self.journal.rows():
                self._append(content["row"], {name: np.array(content[name], np.float32) for name in FEATURES})
        if self.path is None or not self.rows:
            return
        matrices = {name: self.matrix(name) for name in FEATURES}
        keys = [*self.keys, *(["file"] if any(row["file"] for row in self.rows) else [])]
        names = [["" if row[key] is None else str(row[key]) for key in keys] for row in self.rows]
        header = [*keys, *(f"{n}_{i}" for n, matrix in matrices.items() for i in range(matrix.shape[1]))]
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(header)
            for index, words in enumerate(names):
                values = [f"{value:.7g}" for matrix in matrices.values() for value in matrix[index]]
                writer.writerow([*words, *values])
        # "file" is np.savez's own first argument.
        columns: dict[str, Any] = {
            key.replace("file", "path"): np.array(column) for key, column in zip(keys, zip(*names), strict=True)
        }
        arrays: dict[str, Any] = {name: matrix.astype(np.float32) for name, matrix in matrices.items()}
        with atomic_path(self.path.with_suffix(".npz")) as temporary, temporary.open("wb") as binary:
            np.savez(binary, **columns, **arrays)


def out_of_fold_scores(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, probe: str, neighbours: int = 20, seed: int = 0
) -> np.ndarray:
    """Scores of every subject from a probe that was fitted on the other folds.

    Args:
        features: ``[n, D]``.
        labels: ``[n]``, 0 or 1.
        folds: ``[n]``, by patient.
        probe: ``knn`` (cosine distance, votes weighted by it) or ``linear`` (standardised features, L2 logistic
            regression whose strength is chosen by cross-validation within the training part).
        neighbours: of ``knn``.
        seed: for the inner cross-validation.

    Returns:
        ``[n]``, higher for label 1.

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
            with another value are left out of that label.
        path: the JSON file.
        neighbours: of the nearest-neighbour probe.
        seed: of probes and bootstrap.
        leak: of ``check_origin``; ``allowed`` when scored patients were, or may have been, pretrained on. It stands in
            every row.

    Returns:
        A row for each label, encoder, kind of embedding and probe.

    Raises:
        InputError: if no label has both classes, or too few of one.
    """
    rows: list[dict[str, Any]] = []
    folds = np.array([item["fold"] for item in items])
    patients = np.array([str(item.get("patient_id", item["subject_id"])) for item in items])
    for label, (negative, positive) in targets.items():
        values = np.array([str(item.get(label)) for item in items])
        known = np.isin(values, [negative, positive])
        truth = (values[known] == positive).astype(int)
        if len(np.unique(truth)) < 2:
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
        print("Scored patients were, or may have been, pretrained on: these numbers flatter.")
    print(f"{path}")
    return rows


def embedding_picture(
    table: EmbeddingTable, items: Sequence[Mapping[str, Any]], keys: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Scatter plot of the summaries' first two principal components, once for each key, coloured by its values.

    Args:
        table: embeddings, rows as ``items``.
        items: the datalist's items.
        keys: ``sex``, ``diagnosis``, ``site``, ...
        path: the PNG file.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    pca = PCA(2)
    points = pca.fit_transform(table.matrix("summary"))
    figure = Figure(figsize=(4.5 * len(keys), 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(keys)))
    for axis, key in zip(axes, keys):
        values = np.array([str(item.get(key)) for item in items])
        for value in np.unique(values):
            chosen = values == value
            axis.scatter(*points[chosen].T, s=14, alpha=0.8, label=value)
        axis.legend(title=key)
        axis.set_xlabel(f"component 1 ({pca.explained_variance_ratio_[0]:.0%} of variance)")
        axis.set_ylabel(f"component 2 ({pca.explained_variance_ratio_[1]:.0%})")
    figure.suptitle("Summary tokens of the frozen encoder")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
