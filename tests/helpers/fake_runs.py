# SPDX-License-Identifier: Apache-2.0
"""An MLflow store as the three bundles leave it, with made-up predictions."""

from __future__ import annotations

import csv
import itertools
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from fake_bundle import empty_store
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from scipy.ndimage import binary_dilation, gaussian_filter, shift

from volta_components.training.tracking import group_metrics

QUALITY = {"volta": 1.6, "vit_scratch": 1.1, "swin_scratch": 0.6}
FOLDS = 2
THRESHOLDS = {"ixi_sex": "0.5", "aibl_ad": "youden"}
PENALTY = 180.5
# Of this init and subject the left mask is empty.
FAILED = ("unet_scratch", 3)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def predictions(
    init: str, fold: int, fraction: float, subjects: int, threshold: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of ``predictions.csv``, each init's in an order of its own."""
    people = np.random.default_rng([1, fold])
    noise = np.random.default_rng([2, fold, len(init), int(100 * fraction), seed])
    rows = []
    for number in range(subjects):
        label = int(number % 9 < 4)
        score = 1 / (1 + np.exp(-(QUALITY[init] * np.sqrt(fraction) * (label - 0.5) * 2 + noise.normal())))
        rows.append(
            {
                "subject_id": f"sub-{fold}{number:03d}",
                "patient_id": f"sub-{fold}{number:03d}",
                "session": "ses-M000",
                "site": "ABC"[int(people.integers(3))],
                "sex": "FM"[int(people.integers(2))],
                "age": round(float(people.uniform(20, 90)), 1),
                "label": label,
                "score": score,
                "prediction": int(score >= threshold),
                "threshold": threshold,
                "optimistic_threshold": threshold + 0.05,
            }
        )
    noise.shuffle(rows)
    return rows


def brain(subject: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A volume and its hippocampi at 2 mm."""
    rng = np.random.default_rng([3, subject])
    shape, affine = (56, 64, 52), np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-56, -70, -50]
    places = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1) * 2.0 + affine[:3, 3]

    def ellipsoid(centre, radii):
        return (((places - centre) / radii) ** 2).sum(-1) < 1

    head = ellipsoid([0, -8, 2], [48, 58, 46])
    truth = np.zeros(shape, np.uint8)
    for label, side in ((1, -1), (2, 1)):
        centre = np.array([26 * side, -18, -14]) + rng.normal(0, 1, 3)
        truth[ellipsoid(centre, np.array([7, 16, 7]) * rng.uniform(0.9, 1.1))] = label
    image = head * (0.55 + 0.1 * gaussian_filter(rng.normal(size=shape), 2) * 8) + 0.15 * (truth > 0)
    image = gaussian_filter(np.clip(image, 0, 1), 0.5).astype(np.float32)
    return nib.Nifti1Image(image, affine), nib.Nifti1Image(truth, affine)


def spoilt(truth: nib.Nifti1Image, init: str, subject: int, fraction: float = 1.0, seed: int = 0) -> nib.Nifti1Image:
    """The truth, moved and grown as badly as an init deserves."""
    rng = np.random.default_rng([4, subject, len(init), seed])
    amount = {"volta": 0.4, "unetr_scratch": 0.8, "unet_scratch": 1.2}[init] * (1 + subject / 6) / fraction**0.5
    array = np.asanyarray(truth.dataobj)
    result = np.zeros_like(array)
    for label in (1, 2):
        if label == 1 and (init, subject) == FAILED:
            continue
        moved = shift((array == label).astype(float), rng.normal(0, amount, 3), order=1) > 0.5
        result[binary_dilation(moved) if init == "unet_scratch" else moved] = label
    return nib.Nifti1Image(result, truth.affine)


class Writer:
    """Writes runs as the bundles do."""

    def __init__(self, folder: Path) -> None:
        self.uri = empty_store(folder)
        self.artifacts = (folder / "mlruns").as_uri()
        self.client = MlflowClient(self.uri)
        self.experiments: dict[str, str] = {}

    def run(
        self,
        bundle: str,
        init: str,
        fold: int,
        fraction: float = 1.0,
        metrics: dict[str, float] | None = None,
        curves: dict[str, list[float]] | None = None,
        files: dict[str, Path] | None = None,
        params: dict[str, str] | None = None,
        seed: int | None = None,
        experiment: str | None = None,
        **tags: Any,
    ) -> str:
        """A finished run as crossval starts it; a tag of None is left out (``variant=None``: started by hand)."""
        experiment = experiment or f"volta3d_{bundle}"
        if experiment not in self.experiments:
            self.experiments[experiment] = self.client.create_experiment(experiment, self.artifacts)
        seed = fold if seed is None else seed
        name = f"{init}_fold{fold}_frac{fraction:g}_seed{seed}"
        run_id = self.client.create_run(self.experiments[experiment], run_name=name).info.run_id
        known = {
            "bundle": bundle,
            "init": init,
            "variant": init,
            "fold": fold,
            "fraction": f"{fraction:g}",
            "seed": seed,
            "datalist_name": "phantom",
            "datalist_hash": "0123456789abcdef" * 4,
            "code_version": "0.1.0+abc",
            "encoder_sha256": "" if init.endswith("_scratch") else "e" * 64,
            "leak": "none",
            "phantom": "true",
            "finished": "true",
            **tags,
        }
        settings = {"epochs": "20", "fold": str(fold), "batch_size": "8", **(params or {})}
        if bundle in THRESHOLDS:
            settings.setdefault("threshold", THRESHOLDS[bundle])
        else:
            settings.setdefault("hd95_penalty_mm", str(PENALTY))
        logged = [Metric(key, value, 0, 0) for key, value in group_metrics(metrics or {}, "score/").items()]
        logged += [Metric(k, v, 0, step) for k, line in (curves or {}).items() for step, v in enumerate(line, 1)]
        self.client.log_batch(
            run_id,
            metrics=logged,
            params=[Param(key, value) for key, value in settings.items()],
            tags=[RunTag(key, str(value)) for key, value in known.items() if value is not None],
        )
        for place, path in (files or {}).items():
            self.client.log_artifact(run_id, str(path), place)
        self.client.set_terminated(run_id)
        return run_id

    def classification(self, bundle: str, fractions: tuple[float, ...], subjects: int, **tags: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for init, fold, fraction in itertools.product(QUALITY, range(FOLDS), fractions):
                rows = predictions(init, fold, fraction, subjects, 0.5)
                path = write_rows(Path(folder) / "predictions.csv", rows)
                noise = np.random.default_rng([5, fold, len(init)]).normal(0, 0.02, (2, 20))
                fall = np.exp(-np.arange(20) / (4 + 4 / QUALITY[init]))
                self.run(
                    bundle,
                    init,
                    fold,
                    fraction,
                    {"optimistic_sensitivity": 0.9, "optimistic_specificity": 0.8},
                    {"train/loss": list(0.2 + 0.5 * fall + noise[0]), "val/auroc": list(0.9 - 0.4 * fall + noise[1])},
                    {"predictions": path},
                    **tags,
                )

    def segmentation(
        self, subjects: int = 6, fractions: tuple[float, ...] = (1.0,), seed: int = 0, **tags: Any
    ) -> None:
        from volta_components.downstream.metrics import score_mask, summarise_scores

        with tempfile.TemporaryDirectory() as name:
            for init, fraction in itertools.product(("volta", "unetr_scratch", "unet_scratch"), fractions):
                folder = Path(name) / init / str(fraction) / "predictions"
                rows = []
                for number in range(subjects):
                    image, truth = brain(number)
                    mask = spoilt(truth, init, number, fraction, seed)
                    volumes = {"masks": mask, **({"images": image, "labels": truth} if init == "volta" else {})}
                    for kind, volume in volumes.items():
                        (folder / kind).mkdir(parents=True, exist_ok=True)
                        nib.save(volume, folder / kind / f"sub-{number:04d}_ses-1.nii.gz")
                    person = {"subject_id": f"sub-{number:04d}", "patient_id": f"sub-{number:04d}", "session": "ses-1"}
                    rows.append(
                        {**person, "site": "A", "sex": "FM"[number % 2], "age": 65 + number}
                        | score_mask(np.asanyarray(mask.dataobj), np.asanyarray(truth.dataobj), (2.0, 2.0, 2.0))
                    )
                metrics = summarise_scores(rows, PENALTY)
                # The bundle leaves what is not a number empty.
                blank = [{key: "" if value != value else value for key, value in row.items()} for row in rows]
                np.random.default_rng([6, len(init)]).shuffle(blank)
                write_rows(folder / "scores.csv", blank)
                # Stopped before the 20 epochs that its settings ask for.
                fall = np.exp(-np.arange(12) / 6)
                curves = {
                    "train/loss": list(0.3 + fall),
                    "val/loss": list(0.35 + fall),
                    "val/mean_dice": list(0.9 - fall),
                }
                metrics |= {
                    "optimistic_mean_dice": 0.95,
                    "optimistic_dice_left": 0.94,
                    "optimistic_epoch": 7.0,
                }
                run_id = self.run("harp_hippocampus", init, 0, fraction, metrics, curves, seed=seed, **tags)
                self.client.log_artifacts(run_id, str(folder), "predictions")
