# SPDX-License-Identifier: Apache-2.0
"""Embeddings of scans: tables, attention maps, picture."""

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
from torch import Tensor

from volta_components.data.volumes import volume_suffix
from volta_components.files import atomic_path
from volta_components.inference.journal import Journal
from volta_components.method.networks import VoltaViT

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
