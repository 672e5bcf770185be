# SPDX-License-Identifier: Apache-2.0
"""Pictures that MLflow gets with a run; the report's figures of masks are drawn with the same functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

from volta_components.data.labels import SIDE_COLOURS
from volta_components.files import atomic_path

MARGIN_MM = 28.0  # around the truth, in a picture of masks


def write_classification_picture(
    path: Path, labels: ArrayLike, scores: ArrayLike, threshold: float, class_names: Sequence[str]
) -> None:
    """Write the ROC curve and the confusion matrix of one fold, side by side.

    Args:
        path: the PNG file.
        labels: ``[n]``, 0 or 1.
        scores: ``[n]``, higher for label 1.
        threshold: scores from it on are called 1.
        class_names: of labels 0 and 1.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, matrix = figure.subplots(1, 2)
    # The defaults' names differ between releases of scikit-learn, so the legend is our own.
    shown = RocCurveDisplay.from_predictions(labels, scores, ax=axes, plot_chance_level=True)
    axes.set(title=f"AUROC {shown.roc_auc:.3f}", xlabel="1 − specificity", ylabel="sensitivity")
    if legend := axes.get_legend():
        legend.remove()
    called = (np.asarray(scores) >= threshold).astype(int)
    ConfusionMatrixDisplay.from_predictions(
        labels, called, labels=[0, 1], display_labels=list(class_names), cmap="Blues", colorbar=False, ax=matrix
    )
    matrix.set(title=f"threshold {threshold:.3g}", xlabel="predicted", ylabel="true")
    _save(figure, path)


def write_overlay(path: Path, cases: Mapping[str, tuple[Path, Path, Path]]) -> None:
    """Write a coronal slice of each scan: the truth's outline at the left, the mask's at the right.

    Args:
        path: the PNG file.
        cases: volume, label map and mask of each scan, by the text beside it.
    """
    figure = Figure(figsize=(7, 3 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for row, (name, files) in zip(panels, cases.items(), strict=True):
        volumes = dict(zip(("image", "truth", "mask"), map(nib.load, files), strict=True))
        background, planes, aspect = coronal_slice(volumes)
        for axes, kind in zip(row, ("truth", "mask"), strict=True):
            draw_outlines(axes, background, planes[kind], aspect)
            axes.set_title(kind)
        row[0].set_ylabel(name, fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def coronal_slice(volumes: Mapping[str, Any]) -> tuple[NDArray[Any], dict[str, NDArray[Any]], float]:
    """The coronal slice with most of the truth, cut out around it.

    Args:
        volumes: ``image``, ``truth`` and others by name; those on another grid than the image's are left out.

    Returns:
        Background ``[left-right, bottom-top]``, label maps of truth and others on the same cut-out, and the pixels'
        aspect ratio (height over width).
    """
    closest = {name: nib.as_closest_canonical(item) for name, item in volumes.items()}
    arrays = {name: np.asanyarray(item.dataobj) for name, item in closest.items()}
    sides = nib.affines.voxel_sizes(closest["truth"].affine)
    truth = arrays["truth"] > 0
    there = truth if truth.any() else np.ones_like(truth)
    place = int(there.sum(axis=(0, 2)).argmax())
    box = []
    for axis in (0, 2):
        extent = np.flatnonzero(there.any(axis=tuple({0, 1, 2} - {axis})))
        margin = int(np.ceil(MARGIN_MM / sides[axis]))
        box.append(slice(max(0, extent[0] - margin), extent[-1] + margin + 1))
    cut = {name: array[box[0], place, box[1]] for name, array in arrays.items() if array.shape == arrays["image"].shape}
    return cut.pop("image"), cut, float(sides[2] / sides[0])


def draw_outlines(axes: Any, background: NDArray[Any], labels: NDArray[Any] | None, aspect: float) -> None:
    """Draw a slice and the outlines of left and right on it; see ``coronal_slice``."""
    axes.imshow(background.T, origin="lower", cmap="gray", aspect=aspect, interpolation="nearest")
    for label, colour in SIDE_COLOURS.items() if labels is not None else []:
        mask = np.asarray(labels) == label
        if mask.any():
            plain = ListedColormap([colour])
            axes.imshow(np.where(mask.T, 1.0, np.nan), origin="lower", cmap=plain, alpha=0.3, aspect=aspect)
            x, y = (np.arange(-1, size + 1) for size in mask.shape)
            padded = np.pad(mask, 1).astype(float)
            axes.contour(x, y, padded.T, levels=[0.5], colors=[colour], linewidths=1.2)
    # Contours reach over the edge of the picture.
    width, height = background.shape
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)
