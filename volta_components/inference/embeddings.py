# SPDX-License-Identifier: Apache-2.0
"""Embeddings of scans: tables, attention maps, picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.networks.utils import pixelunshuffle
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from volta_components.data.nifti import write_nifti
from volta_components.data.volumes import volume_stem
from volta_components.files import atomic_path, write_csv
from volta_components.inference.own_space import grids_of, restore_map
from volta_components.inference.tables import ResultTable, marks_of, print_marks, source_file
from volta_components.method.networks import VoltaViT

IDS = ("subject_id", "session")
FEATURES = ("summary", "mean")


class EmbeddingInferer(Inferer):
    """Summary, mean token and, if asked for, more of the same tokens in one pass through the encoder.

    MONAI's ``SimpleInferer`` gives the network's one output; the mean token and the attention map come from the same
    tokens, which would otherwise be computed again.

    Args:
        attention: also give ``attention`` ``[B, 1, D, H, W]``.
        tokens: also give ``tokens`` ``[B, D, d, h, w]`` on the token grid; ``places`` ``[B, D, d', h', w']``, their
            means in up to 4 x 4 x 4 places of the volume; and, to be compared with both, ``voxels``
            ``[B, 64, d, h, w]``: means of the 4 x 4 x 4 parts of each patch.
    """

    def __init__(self, attention: bool = False, tokens: bool = False) -> None:
        self.attention = attention
        self.tokens = tokens

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Embeddings ``summary`` and ``mean`` ``[B, D]`` of volumes ``[B, 1, D, H, W]``."""
        assert isinstance(network, VoltaViT)
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        tokens = network.encode(image)
        output = {"summary": network.summarise(tokens).float(), "mean": tokens.mean(dim=1).float()}
        if self.attention:
            output["attention"] = network.attention_on_voxels(tokens, image)
        if self.tokens:
            grid = network.token_grid(image)
            output["tokens"] = tokens.float().transpose(1, 2).unflatten(2, grid)
            places = min(4, grid[0]), min(4, grid[1]), min(4, grid[2])
            output["places"] = adaptive_avg_pool3d(output["tokens"], places)
            parts = adaptive_avg_pool3d(image, (4 * grid[0], 4 * grid[1], 4 * grid[2]))
            output["voxels"] = pixelunshuffle(parts, spatial_dims=3, scale_factor=4)
        return output


@dataclass(kw_only=True, eq=False)
class EmbeddingTable(ResultTable):
    """Collects the embeddings that an evaluator computes; writes them as tables, and attention maps as NIfTI.

    The table (CSV) has a row for each volume: ``subject_id``, ``session``, ``file`` where volumes come from files, then
    ``summary_0`` ... and ``mean_0`` ... . Beside it, with the suffix ``.npz``, the same lies as arrays for NumPy: those
    columns as text (``file`` as ``path``), ``summary`` and ``mean`` ``[volumes, D]`` as float32.

    An attention map lies on the scan's own grid (see ``grids_of``); it is named after the volume's file, or after
    subject and session.

    Attributes:
        attention_dir: folder for attention maps; ``None`` for none.
        root: give attention maps the folders that their volumes have below this one; empty for none.
    """

    attention_dir: str | os.PathLike[str] | None = None
    root: str | os.PathLike[str] = ""

    def result(self, item: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[dict[str, Any], str, list[Path]]:
        """Ids, file and embeddings; the attention map was made."""
        file = source_file(item["image"])
        row = {
            "subject_id": item.get("subject_id"),
            "session": item.get("session"),
            "file": file,
            "marks": marks_of(item["image"]),
        }
        made = []
        if self.attention_dir is not None:
            folder = Path(self.attention_dir)
            made.append(self._write_attention(folder, row, item["image"], output["pred"]["attention"]))
        for name in ("places", "voxels"):
            if name in output["pred"]:
                row[name] = output["pred"][name].half().flatten().cpu().numpy()
        # A float32 as JSON's decimal number comes back as it was.
        return row | {name: output["pred"][name].float().cpu().tolist() for name in FEATURES}, file, made

    def _write_attention(self, folder: Path, row: Mapping[str, Any], image: Tensor, attention: Tensor) -> Path:
        file = Path(row["file"])
        name = volume_stem(file) or "_".join(str(row[key]) for key in IDS if row[key])
        if self.root and row["file"]:
            folder = folder / os.path.relpath(file.parent, self.root)
        affine, own, shape = grids_of(image)
        path = folder / f"{name}_attention.nii.gz"
        write_nifti(
            path, restore_map(attention[0].float().cpu().numpy(), affine, own, shape), own, like=row["file"] or None
        )
        return path

    def matrix(self, feature: str) -> np.ndarray:
        """All embeddings of one kind, ``[volumes, D]``, in order of the rows; ``summary+mean`` has both.

        With ``EmbeddingInferer(tokens=True)`` there are two more: ``places``, and ``voxels``, the volumes themselves,
        four voxels a patch and axis.
        """
        parts = [[row[part] for row in self.rows] for part in feature.split("+")]
        return np.concatenate([np.array(part, np.float32) for part in parts], axis=1)

    def write_table(self) -> None:
        """Write the tables."""
        rows = self.rows
        if self.path is None or not rows:
            return
        keys = [*IDS, *(["file", "marks"] if any(row["file"] for row in rows) else [])]
        arrays = {name: self.matrix(name) for name in FEATURES}
        header = [*keys, *(f"{name}_{i}" for name, matrix in arrays.items() for i in range(matrix.shape[1]))]
        ids = [[row[key] or "" for key in keys] for row in rows]
        numbers = ([f"{value:.7g}" for value in line] for line in self.matrix("+".join(FEATURES)))
        write_csv(self.path, header, ([*who, *line] for who, line in zip(ids, numbers, strict=True)))
        # "file" is np.savez's own first argument.
        columns = {key.replace("file", "path"): np.array(column) for key, column in zip(keys, zip(*ids), strict=True)}
        with atomic_path(Path(self.path).with_suffix(".npz")) as temporary, temporary.open("wb") as binary:
            np.savez(binary, **columns, **arrays)  # type: ignore[arg-type]
        print_marks([(row["file"], row["marks"]) for row in rows], len(rows))
        print(f"{len(rows)} embeddings in {self.path} and .npz")


def embedding_picture(
    table: EmbeddingTable, items: Sequence[Mapping[str, Any]], keys: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Scatter plot of the summaries' first two principal components, once for each key, coloured by its values."""
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
