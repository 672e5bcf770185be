# SPDX-License-Identifier: Apache-2.0
"""Print what the quick start has made: reconstruction, health of both branches, probes, and where the pictures are."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient
from monai.utils import path_to_sqlite_uri

from volta_components.files import read_json

RUN = Path("bundles/pretrain/runs/phantom_tiny")
PROBES = Path("bundles/pretrain/eval/phantom_tiny")


def last_metrics() -> dict[str, float]:
    """The last values of the pretraining run's metrics, from MLflow."""
    client = MlflowClient(path_to_sqlite_uri(str(RUN / "mlruns.db")))
    experiment = client.get_experiment_by_name("volta3d_pretrain")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    # A start that found nothing left to do has a run of its own, without metrics.
    return next(dict(run.data.metrics) for run in runs if run.data.metrics)


def main() -> None:
    """Print the summary."""
    errors = read_json(RUN / "reconstruction.json")
    metrics = last_metrics()
    ratio = errors["reconstruction"] / errors["mean_view"]
    print("Everything here is of phantoms: it shows that the pipeline works, nothing about patients.\n")
    print(f"masked reconstruction error on {errors['volumes']} held-out volumes (mean squared, intensities in [0, 1])")
    print(f"  this network {errors['reconstruction']:.4f}   mean volume {errors['mean_view']:.4f}   ratio {ratio:.2f}")
    print(f"  lower than the mean volume's on {errors['share_better']:.0%} of the volumes")
    print("\nself-distillation, last epoch (entropy 1: uniform, 0: a single prototype; 0.3 to 0.97 is healthy;")
    print("predicted: what the student tells of the teacher's targets, 0 when views agree on nothing)")
    for branch in ("global", "patch"):
        entropy, predicted = (metrics[f"train/{branch}_{name}"] for name in ("teacher_entropy", "predicted"))
        print(f"  {branch:<7} entropy {entropy:.2f} of ln K, predicted {predicted:.3f} of ln K")
    print(f"effective rank of the summaries: {metrics['train/effective_rank']:.1f}")
    print("\nprobes of the frozen encoder, of random weights and of plain voxels, out of fold (95 % interval), chance")
    for row in read_json(PROBES / "probes.json"):
        if row["probe"] != "knn":
            print(
                f"  {row['label']:<24} {row['embedding']:<13} {row['encoder']:<7} {row['measure']:<6} "
                f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f}), {row['chance']:.2f}; "
                f"{row['scans']} scans"
            )
    print("\npictures to look at:")
    for path in [
        Path("data/phantom_pretrain/qc/index.html"),
        *sorted((RUN / "pictures").glob("*.png"))[-1:],
        PROBES / "embeddings.png",
    ]:
        print(f"  {path}")


if __name__ == "__main__":
    main()
