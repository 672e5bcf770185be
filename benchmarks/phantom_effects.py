# SPDX-License-Identifier: Apache-2.0
"""How hard the phantoms' labels are: AUROC of simple probes, beside the band that each should lie in.

Makes (or takes) a cohort of phantoms and asks for sex and diagnosis from

- voxels: 100 principal components of the [0, 1] scaled images, fitted on the training part of each fold;
- the mean token of a randomly initialised encoder: what a network knows before it has learned anything.

Each with logistic regression, 5-fold cross-validation, 95 % bootstrap interval. Run with ``python
benchmarks/phantom_effects.py [--output FOLDER] [--subjects 800]``; a folder that is given is kept, and used again.

Last results (800 subjects of 3 mm, seed 1, default effects)::

    features                  label      AUROC (95 % interval)   band
    voxel PCA-100             diagnosis  0.929 (0.911 to 0.945)  0.85 to 0.97  in
    random tokens, patch 16   diagnosis  0.562 (0.521 to 0.601)  0.00 to 0.75  in
    random tokens, patch 9    diagnosis  0.648 (0.613 to 0.685)  0.00 to 0.75  in
    voxel PCA-100             sex        0.898 (0.876 to 0.918)  0.80 to 0.95  in
    random tokens, patch 16   sex        0.913 (0.893 to 0.931)
    random tokens, patch 9    sex        0.935 (0.919 to 0.951)

With --effect_hippocampus 0.35 --effect_ventricles 0.5, voxels tell the diagnosis with 0.784 (0.753 to 0.813) only. The
true volumes themselves give 0.96 (ventricles) and 0.90 (a hippocampus) for the diagnosis, 0.94 (brain) for sex.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cyclopts
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from volta_components.data.phantom.command import phantom
from volta_components.downstream.metrics import auroc_interval
from volta_components.inference.probes import out_of_fold_scores
from volta_components.method.networks import VoltaViT

BANDS = {
    ("voxel PCA-100", "diagnosis"): (0.85, 0.97),
    ("voxel PCA-100", "sex"): (0.80, 0.95),
    ("random tokens", "diagnosis"): (0.0, 0.75),
}


def load(folder: Path, subjects: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Images ``[n, X, Y, Z]`` in [0, 1] (percentiles 0.5 and 99.5 of the brain) and their subjects' table."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t").head(subjects)
    images, diagnoses = [], []
    for name in table["participant_id"]:
        sessions = pd.read_csv(folder / name / f"{name}_sessions.tsv", sep="\t")
        diagnoses.append(sessions["diagnosis"][0])
        image = np.asarray(nib.load(folder / name / "ses-M000" / "anat" / f"{name}_ses-M000_T1w.nii.gz").dataobj)
        low, high = np.percentile(image[image > 0], [0.5, 99.5])
        images.append((np.clip((image - low) / (high - low), 0, 1) * (image > 0)).astype(np.float32))
    return np.stack(images), table.assign(diagnosis=diagnoses)


@torch.inference_mode()
def random_tokens(images: np.ndarray, patch: int, seed: int) -> np.ndarray:
    """Mean token ``[n, 192]`` of a randomly initialised encoder of 6 blocks."""
    torch.manual_seed(seed)
    # Whole patches only: pad with background.
    padding = [(0, -side % patch) for side in images.shape[1:]]
    volumes = torch.from_numpy(np.pad(images, [(0, 0), *padding]))[:, None]
    network = VoltaViT(
        img_size=volumes.shape[2:],
        patch_size=(patch,) * 3,
        hidden_size=192,
        mlp_dim=384,
        num_layers=6,
        num_heads=6,
        decoder=False,
    ).eval()
    return np.concatenate([network.encode(batch).mean(dim=1).numpy() for batch in tqdm(volumes.split(8), "encoder")])


def main(output: str | None = None, subjects: int = 800, spacing: int = 3, seed: int = 0, **options: float) -> None:
    """Print a table of AUROCs and their bands.

    Args:
        output: folder of the cohort; made, if need be, and kept. By default a temporary one.
        subjects: size of the cohort.
        spacing: voxel size, mm.
        seed: of the cohort, the encoder and the folds.
        options: further options of ``volta3d phantom``, such as ``--effect_sex 0.06``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary)
        phantom(folder, subjects, seed=seed, spacing=spacing, **options)  # type: ignore[arg-type]
        images, table = load(folder, subjects)
    flat = images.reshape(len(images), -1)
    patches = (16, 9)
    tokens = {f"random tokens, patch {patch}": random_tokens(images, patch, seed) for patch in patches}

    print(f"{'features':<25} {'label':<10} {'AUROC (95 % interval)':<23} band")
    for label, positive in (("diagnosis", "AD"), ("sex", "F")):
        truth = (table[label] == positive).to_numpy(int)
        folds = np.zeros(len(truth), int)
        splits = StratifiedKFold(5, shuffle=True, random_state=seed).split(flat, truth)
        scores = np.zeros(len(truth))
        for fold, (fitted, scored) in enumerate(splits):
            folds[scored] = fold
            pca = PCA(100, svd_solver="randomized", random_state=seed).fit(flat[fitted])
            inside = out_of_fold_scores(pca.transform(flat), truth, np.isin(range(len(truth)), scored), "linear")
            scores[scored] = inside[scored]
        rows = {"voxel PCA-100": scores}
        rows |= {name: out_of_fold_scores(matrix, truth, folds, "linear") for name, matrix in tokens.items()}
        for name, values in rows.items():
            auroc, low, high = auroc_interval(truth, values, list(table["participant_id"]))
            band = BANDS.get((name.split(",")[0], label))
            verdict = (
                ""
                if band is None
                else f"{band[0]:.2f} to {band[1]:.2f}  {'in' if band[0] <= auroc <= band[1] else 'OUT'}"
            )
            print(f"{name:<25} {label:<10} {f'{auroc:.3f} ({low:.3f} to {high:.3f})':<23} {verdict}")


if __name__ == "__main__":
    cyclopts.run(main)
