# SPDX-License-Identifier: Apache-2.0
"""The model that MLflow loads: paths of scans in, a table out. MLflow copies this file to the model and runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from volta_components.inference.apply import apply_bundle

TABLES = ("predictions.csv", "volumes.csv", "embeddings.csv")
TEXT = dict.fromkeys(("subject_id", "session"), str)  # 001 is not 1


class ScanModel(PythonModel):
    """Runs a bundle's inference on scans as they are."""

    def load_context(self, context: Any) -> None:
        """Find the bundle among the model's files."""
        self.bundle = Path(context.artifacts["bundle"])

    # MLflow takes the signature from the types, and lets a model do without its context.
    def predict(  # type: ignore[override]
        self, model_input: list[str], params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """A table with a row for each scan: class and probability, volumes, or an embedding.

        Args:
            model_input: paths of scans, or of folders of scans, where this runs.
            params: ``output``, a folder that keeps the files, such as masks; by default they are removed.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path((params or {}).get("output") or folder)
            count = apply_bundle(self.bundle, list(model_input), output, (), None, False, None, {})
            table = next(path for name in TABLES if (path := output / name).is_file())
            return pd.read_csv(table, dtype=TEXT).head(count)  # after them come scans of earlier calls


set_model(ScanModel())
