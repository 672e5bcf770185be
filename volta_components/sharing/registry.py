# SPDX-License-Identifier: Apache-2.0
"""The command ``volta3d register``: a trained model in MLflow's registry, with the run that trained it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volta_components.errors import InputError

# By which a model's run is found: two runs may have the same results.
TAGS = ("bundle", "init", "fold", "seed", "fraction", "datalist_hash", "encoder_sha256")


def register(
    bundle: Path | str,
    name: str | None = None,
    overlays: Sequence[str] = (),
    model: Path | str | None = None,
    tracking_uri: str | None = None,
) -> int:
    """Put a fine-tuned model into MLflow: beside the run that trained it, and into the registry.

    MLflow gets a model that takes paths of scans: mlflow.pyfunc.load_model("models:/NAME/1").predict(["scan.nii.gz"]).
    It holds the bundle and its weights, and needs volta-components where it is loaded.

    Args:
        bundle: Folder of the bundle.
        name: Name in the registry; by default as pack would call it.
        overlays: Overlays that the model was trained with, such as tiny.
        model: The weights; models/model.pt by default, with the suffix that the overlays give it.
        tracking_uri: MLflow's store that has the run; by default that of MLFLOW_TRACKING_URI, or else runs/mlruns.db.

    Returns:
        0.

    Raises:
        InputError: if the bundle or its weights cannot be used, or the store does not have the model's run.
    """
    # Here, since they import torch: help and mistakes should not wait for it.
    import mlflow
    from mlflow.models import Model
    from mlflow.types.schema import DataType, ParamSchema, ParamSpec

    from volta_components.crossval.store import mlflow_client, tracking_address
    from volta_components.files import read_json
    from volta_components.sharing.pack import assemble, check_paths, default_name

    uri = tracking_address(tracking_uri, Path("runs"))
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary) / (name or default_name(Path(bundle), overlays, model))
        assemble(Path(bundle), top, overlays, model)
        check_paths(top)
        client = mlflow_client(uri)
        run = _find_run(client, uri, read_json(top / "models" / "model.json"))
        folder, code = Path(temporary) / "logged", Path(__file__).with_name("scan_model.py")
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(code),
            artifacts={"bundle": str(top)},
            pip_requirements=["volta-components"],
        )
        facts = folder / "MLmodel"
        # MLflow takes the inputs from the types of predict, and hands on only the parameters that the signature names.
        saved = Model.load(str(facts))
        saved.signature.params = ParamSchema([ParamSpec("output", DataType.string, "")])
        saved.save(str(facts))
        # It looks for the name alone when it loads the model, and writes where this package lies.
        facts.write_text(facts.read_text(encoding="utf-8").replace(str(code), code.name), encoding="utf-8")
        client.log_artifacts(run.info.run_id, str(folder), "model")
        mlflow.set_tracking_uri(uri)
        version = mlflow.register_model(f"runs:/{run.info.run_id}/model", top.name)
    print(f"models:/{top.name}/{version.version}: the model of {run.info.run_name}")
    return 0


def _find_run(client: Any, uri: str, record: Mapping[str, Any]) -> Any:
    """The run with the tags and the results of a model's record."""
    from volta_components.crossval.store import search_runs

    known, metrics = record.get("tags") or {}, record.get("metrics") or {}
    tags = {key: str(known[key]) for key in TAGS if key in known}
    ours = {key: value for key, value in metrics.items() if not key.startswith("optimistic_")}
    if not tags or not ours:
        raise InputError(
            "models/model.json: no tags or no results of a fine-tuning, by which its run could be found. An encoder "
            "and a model of MONAI Label have none: share them with volta3d pack"
        )
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    experiments = [item.experiment_id for item in client.search_experiments()]
    for run in search_runs(client, experiments, f"{query} and tags.finished = 'true'"):
        logged = {key.removeprefix("score/"): value for key, value in run.data.metrics.items()}
        if all(math.isclose(logged.get(key, math.nan), value, abs_tol=1e-6) for key, value in ours.items()):
            return run
    words = ", ".join(f"{key} {value}" for key, value in tags.items())
    raise InputError(f"{uri}: no finished run has this model's results ({words}); name its store with --tracking-uri")
