# SPDX-License-Identifier: Apache-2.0
"""MONAI Label app: serves this project's bundles, several at a time, segmentation and classification.

MONAI Label loads ``main.py`` of an app's folder by its path, in an environment of its own, and writes beside it; so
this folder is no part of the package, and ``serve.py`` copies this file to where it may write. MONAI Label's own app
for bundles, ``monaibundle``, is not enough for four reasons: it cannot serve classification, it loads weights that do
not fit without a word, it does not verify their hash, and a training replaces the model without keeping the one before.

The server's ``--conf models a,b`` names bundles in the app's folder ``model``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monailabel
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask

from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file
from volta_components.method.weights import read_record, read_weights


def find_bundles(app_dir: Path, conf: Mapping[str, str]) -> dict[str, Path]:
    """Folders of the bundles that the server was told to serve, by name.

    Raises:
        InputError: if there are none, or one lacks its configs or its model; or its weights are changed, or could run
            code.
    """
    names = [name.strip() for name in conf.get("models", "").split(",") if name.strip()]
    if not names:
        raise InputError(f"no models to serve; give names of folders in {app_dir / 'model'}: --conf models a,b")
    found = {name: app_dir / "model" / name for name in names}
    missing = [
        (name, str(folder / needed))
        for name, folder in found.items()
        for needed in ("configs/inference.json", "configs/metadata.json", "models/model.pt")
        if not (folder / needed).is_file()
    ]
    if missing:
        raise InputError.many("bundles that cannot be served, since a file is missing", missing, "See serve.py --help.")
    for folder in found.values():
        read_weights(folder / "models" / "model.pt")
    return found


def is_classification(bundle: Path) -> bool:
    """Whether a bundle's network gives scores of classes, by its metadata."""
    outputs = read_json(bundle / "configs" / "metadata.json")["network_data_format"]["outputs"]
    return next(iter(outputs.values()))["format"] == "classes"


def requested_model(bundle: Path, request: Mapping[str, Any] | None) -> Path:
    """The file of the model that a request asks for: ``model_filename``, a name or a list of them; or ``model.pt``."""
    name = (request or {}).get("model_filename") or "model.pt"
    name = name if isinstance(name, str) else name[0]
    if Path(name).name != name:
        raise InputError(f"model_filename {name!r}: give a name, not a path")
    return bundle / "models" / name


class VoltaInferTask(BundleInferTask):
    """``BundleInferTask`` that verifies the weights' hash whenever they are read, and loads all of them or none.

    Clients get the message of whatever is wrong with a scan or with the weights. For classification it answers with a
    score for each class, as ``BundleInferTask`` does only without its last step, which would restore a mask to the
    scan's grid.

    Args:
        bundle: the bundle's folder.
        conf: the server's.
    """

    def __init__(self, bundle: Path, conf: Mapping[str, str]) -> None:
        classifies = is_classification(bundle)
        super().__init__(
            str(bundle),
            conf,
            type=InferType.CLASSIFICATION if classifies else InferType.SEGMENTATION,
            add_post_restore=not classifies,
            load_strict=True,
        )
        self._verified: tuple[Path, int] | None = None

    def __call__(self, request: dict[str, Any], callbacks: dict[Any, Any] | None = None) -> Any:
        """Answer a request.

        Raises:
            HTTPException: 422 with the message, where the input is at fault.
        """
        try:
            return super().__call__(request, callbacks)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise HTTPException(status_code=422, detail=str(cause)) from error

    def _get_network(self, device: str, data: Mapping[str, Any] | None) -> Any:
        path = requested_model(Path(self.bundle_path), data)
        if not path.is_file():
            raise InputError(f"{path.name}: no such model in this bundle")
        version = (path, path.stat().st_mtime_ns)
        if version != self._verified:
            read_weights(path)
            # The task keeps one network and tells files by their time alone.
            self.clear_cache()
            self._verified = version
        return super()._get_network(device, data)


class VoltaTrainTask(BundleTrainTask):
    """``BundleTrainTask`` that verifies the weights it starts from, and keeps the model that it replaces.

    The model before is kept as ``models/model_HASH.pt``, with its record, where clients can choose it. The learning
    rate stays at the bundle's: a schedule that rises from zero and falls back to it would train a few scans for a few
    epochs at next to nothing.

    Args:
        bundle: the bundle's folder.
        conf: the server's.
    """

    def __init__(self, bundle: Path, conf: Mapping[str, str]) -> None:
        super().__init__(str(bundle), conf, load_strict=True)

    def __call__(self, request: dict[str, Any], datastore: Any) -> Any:
        """Train on the scans with a final label map."""
        if not datastore.datalist():
            raise InputError("no scan has a final label map; correct and submit one first")
        bundle = Path(self.bundle_path)
        read_weights(requested_model(bundle, request))
        keep_model(bundle / "models" / "model.pt")
        return super().__call__(request, datastore)

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        constant = {"warmup_epochs": 0, "final_learning_rate": "@learning_rate"}
        overrides |= {name: value for name, value in constant.items() if self.bundle_config.get(name) is not None}
        return overrides


def keep_model(path: Path) -> Path:
    """Copy a model and its record to a name with the first digits of its hash.

    Returns:
        The copy.
    """
    copy = path.with_name(f"{path.stem}_{sha256_file(path)[:8]}{path.suffix}")
    if not copy.is_file():
        if read_record(path):
            shutil.copyfile(path.with_suffix(".json"), copy.with_suffix(".json"))
        shutil.copyfile(path, copy)
    return copy


class VoltaApp(MONAILabelApp):
    """The app; MONAI Label finds it by its base class.

    Args:
        app_dir: its folder, which has the bundles in ``model``.
        studies: the folder with scans, or the address of a DICOMweb server.
        conf: ``models``: names of bundles, separated by commas.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = find_bundles(Path(app_dir), conf)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"VolTA-3D (MONAI Label {monailabel.__version__})",
            description="Hippocampus segmentation and whole-scan classification. Not a medical device.",
            version=monailabel.__version__,
        )

    def init_infers(self) -> dict[str, InferTask]:
        """A task for each bundle."""
        return {name: VoltaInferTask(bundle, self.conf) for name, bundle in self.bundles.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """A task for each segmentation bundle; clients have no way to give a scan's class."""
        return {
            name: VoltaTrainTask(bundle, self.conf)
            for name, bundle in self.bundles.items()
            if not is_classification(bundle) and (bundle / "configs" / "train.json").is_file()
        }

    def init_strategies(self) -> dict[str, Strategy]:
        """Which scan comes next."""
        return {"first": First(), "random": Random()}
