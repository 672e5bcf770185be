# SPDX-License-Identifier: Apache-2.0
"""MONAI Label app: serves this project's bundles, several at a time, segmentation and classification.

MONAI Label loads ``main.py`` of an app's folder by its path, in an environment of its own, and writes beside it; so
this folder is no part of the package, and ``serve.py`` copies this file to where it may write. MONAI Label's own app
for bundles, ``monaibundle``, is not enough for five reasons: it cannot serve classification, it loads weights that do
not fit without a word, it does not verify their hash, a training replaces the model by a worse one without a word, and
it runs texts of a request that begin with ``$``. ``guard.py`` says who may send requests.

The server's ``--conf models a,b`` names bundles in the app's folder ``model``.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monailabel
import nibabel as nib
import numpy as np
import torch
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import device_list

from volta_components.data.headers import read_header
from volta_components.data.nifti import write_nifti
from volta_components.data.unusable import named_errors
from volta_components.errors import InputError, find_input_error
from volta_components.files import file_tag, read_json, sha256_file
from volta_components.inference.masks import marks_of_result
from volta_components.inference.tables import marks_of
from volta_components.method.weights import read_record, read_weights
from volta_components.sharing.annotation import STATS, renumber, split_scans

logger = logging.getLogger(__name__)

VOLUMES = (".nii.gz", ".nii")
# A few scans do not bear the rate that a whole data set does.
RATE_SHARE = 0.1
UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]|\.\.|^[.$~]")
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


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


def segmentation_labels(bundles: Mapping[str, Path]) -> dict[str, int]:
    """The numbers of the labels that the segmentation bundles draw.

    Raises:
        InputError: if two bundles number them differently, since a label map is stored once for all of them.
    """
    labels: dict[str, int] = {}
    for name, bundle in bundles.items():
        if is_classification(bundle):
            continue
        outputs = read_json(bundle / "configs" / "metadata.json")["network_data_format"]["outputs"]
        channels = next(iter(outputs.values()))["channel_def"]
        own = {label.lower(): int(value) for value, label in channels.items() if label.lower() != "background"}
        if any(labels.get(label, value) != value for label, value in own.items()) or (
            len({**labels, **own}) != len({*labels.values(), *own.values()})
        ):
            raise InputError(f"{name} numbers its labels differently from the other bundles; serve it alone")
        labels |= own
    return dict(sorted(labels.items(), key=lambda item: item[1]))


def is_volume(name: str) -> bool:
    """Whether a file's name is that of a NIfTI volume, and no more than a name."""
    return name.endswith(VOLUMES) and UNSAFE.search(name) is None


def check_settings(request: Mapping[str, Any]) -> None:
    """Refuse settings that MONAI would run as code or make objects of, and those that would become parts of paths.

    Raises:
        HTTPException: 422.
    """
    pending: list[Any] = [request]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise HTTPException(422, "_target_: objects are not taken from clients")
            pending += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, str) and value.startswith(("$", "@", "%")):
            raise HTTPException(422, f"{value!r}: texts that begin with $, @ or % are not taken from clients")
    device = request.get("device") or "cpu"
    for name in device if isinstance(device, (list, tuple)) else [device]:
        if not DEVICE.fullmatch(str(name)) and name not in device_list():
            raise HTTPException(422, f"device {name!r}: give cpu or cuda:0")
    extension = request.get("result_extension") or VOLUMES[0]
    if extension not in VOLUMES:
        raise HTTPException(422, f"result_extension {extension!r}: masks are .nii.gz or .nii")
    if UNSAFE.search(str(request.get("label_tag") or "")):
        raise HTTPException(422, f"label_tag {request['label_tag']!r}: give a name, not a path")


def requested_model(bundle: Path, request: Mapping[str, Any] | None) -> Path:
    """The file of the model that a request asks for: ``model_filename``, a name or a list of them; or ``model.pt``."""
    name = (request or {}).get("model_filename") or "model.pt"
    name = name if isinstance(name, str) else name[0]
    if Path(name).name != name:
        raise InputError(f"model_filename {name!r}: give a name, not a path")
    return bundle / "models" / name


class VoltaInferTask(BundleInferTask):
    """``BundleInferTask`` that verifies the weights' hash whenever they are read, and loads all of them or none.

    Clients get the message of whatever is wrong with a scan or with the weights, and what is odd about a scan or its
    mask as ``marks`` beside the result, in the words of ``volta3d segment``. For classification it answers with a
    score for each class, as ``BundleInferTask`` does only without its last step, which would restore a mask to the
    scan's grid. Beside the scores goes an empty mask: MONAI Label's client, and with it 3D Slicer, reads scores only
    from an answer that has a file.

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
            file, answer = super().__call__(request, callbacks)
            if self.type == InferType.CLASSIFICATION and not file and not request.get("save_label"):
                file = empty_mask(Path(request["image"]))
            return file, answer
        except Exception as error:
            if (cause := find_input_error(error)) is None:
                raise
            raise HTTPException(status_code=422, detail=str(cause)) from error

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write the mask, with its scan's own qform, sform and codes; note the marks in the answer and in the log."""
        scan, image = Path(data["image_path"]), data[self.input_key]
        if self.type == InferType.CLASSIFICATION:
            file, answer = super().writer(data, extension, dtype)
            marks = marks_of(image)
        else:
            mask = data[self.output_label_key]
            own = ".nii" if scan.name.endswith(".nii") else ".nii.gz"
            suffix = extension or data.get("result_extension") or own
            with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as stream:
                file, answer = stream.name, {}
            write_nifti(file, mask.cpu().numpy().astype(np.uint8), np.asarray(mask.affine.cpu(), float), like=scan)
            marks = marks_of_result(image, mask)
        if marks:
            logger.warning("%s is marked; look at it before you use the result: %s", scan.name, marks)
        return file, {**answer, "marks": marks}

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


def empty_mask(scan: Path) -> str | None:
    """A mask of nothing on a scan's grid, in a temporary file; None where the scan is no single NIfTI file."""
    if not scan.name.endswith(VOLUMES):
        return None
    header = read_header(scan)
    with tempfile.NamedTemporaryFile(suffix=VOLUMES[0], delete=False) as stream:
        write_nifti(stream.name, np.zeros(header.shape, np.uint8), header.affine, like=scan)
    return stream.name


class VoltaTrainTask(BundleTrainTask):
    """``BundleTrainTask`` that verifies the weights it starts from, and never replaces the model by a worse one.

    The model before is kept as ``models/model_HASH.pt``, with its record, where clients can choose it. The learning
    rate is a tenth of the bundle's (``learning_rate`` of the request changes it) and stays there: a schedule that rises
    from zero and falls back to it would train a few scans for a few epochs at next to nothing. Of two or more patients
    at least one validates; a single one validates itself. No data set is read but the studies. Of a request only the
    settings of ``config`` are taken: MONAI would also let it choose where to track the run, on this disk or elsewhere.
    One GPU trains: by default MONAI would take all, whose processes often are more than there are scans.

    Args:
        bundle: the bundle's folder.
        conf: the server's.
    """

    def __init__(self, bundle: Path, conf: Mapping[str, str]) -> None:
        super().__init__(str(bundle), conf, load_strict=True)
        self._request: Mapping[str, Any] = {}

    @property
    def _rate(self) -> float:
        """The learning rate, unless a client gives another."""
        return RATE_SHARE * float(self.bundle_config.get("learning_rate"))

    def config(self) -> dict[str, Any]:
        """Settings that clients can change, and no others."""
        hidden = ("run_id", "multi_gpu", "gpus")
        offered = {k: v for k, v in super().config().items() if k not in hidden and not k.startswith("tracking")}
        return {**offered, "learning_rate": self._rate}

    def stats(self) -> dict[str, Any]:
        """How the last training went, or goes; see ``SaveModel``."""
        path = Path(self.bundle_path) / "models" / STATS
        return read_json(path) if path.is_file() else {}

    def __call__(self, request: dict[str, Any], datastore: Any) -> Any:
        """Train on the scans with a final label map."""
        if not datastore.datalist():
            raise InputError("no scan has a final label map; correct and submit one first")
        known = {"model", *self.config()}
        # bundle_path is MONAI Label's own.
        if left_out := ", ".join(sorted(request.keys() - known - {"bundle_path"})):
            logger.warning("settings of the request that are not taken from clients: %s", left_out)
        taken = {name: value for name, value in request.items() if name in known}
        self._request = request = {**taken, "multi_gpu": False}
        check_settings(request)
        bundle = Path(self.bundle_path)
        model = bundle / "models" / "model.pt"
        read_weights(requested_model(bundle, request))
        before = sha256_file(model)
        copy = keep_model(model)
        (bundle / "models" / STATS).unlink(missing_ok=True)
        result = super().__call__(request, datastore)
        if sha256_file(model) == before:
            copy.unlink()
            copy.with_suffix(".json").unlink(missing_ok=True)
        print(self.stats().get("message", ""), flush=True)
        return result

    def _partition_datalist(
        self, datalist: list[Any], request: Mapping[str, Any], shuffle: bool = False
    ) -> tuple[list[Any], list[Any]]:
        return split_scans(datalist, float(request.get("val_split", 0.2)))

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        rate = float(self._request.get("learning_rate") or self._rate)
        values = {
            "learning_rate": rate,
            "final_learning_rate": rate,
            "warmup_epochs": 0,
            "val_interval": max(1, int(self._request.get("max_epochs", 50)) // 10),
            "dataset_dir": str(Path(self.bundle_path) / "no_data_set"),
        }
        overrides |= {name: value for name, value in values.items() if self.bundle_config.get(name) is not None}
        return overrides


def keep_model(path: Path) -> Path:
    """Copy a model and its record to a name with the first digits of its hash.

    Returns:
        The copy.
    """
    copy = path.with_name(f"{path.stem}_{file_tag(path)}{path.suffix}")
    if not copy.is_file():
        if read_record(path):
            shutil.copyfile(path.with_suffix(".json"), copy.with_suffix(".json"))
        shutil.copyfile(path, copy)
    return copy


class Studies(LocalDatastore):
    """``LocalDatastore`` that writes into its folder alone, and keeps label maps in the model's numbers.

    Args:
        folder: the scans.
        labels: the model's number of each label.
    """

    def __init__(self, folder: str, labels: Mapping[str, int]) -> None:
        self.labels = labels
        super().__init__(
            folder,
            extensions=[f"*{suffix}" for suffix in VOLUMES],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Store a scan.

        Raises:
            HTTPException: 422, if it is no NIfTI volume, or its name leads out of the folder.
        """
        name, suffix = self._to_id(Path(image_filename).name)
        self._check_target(Path(self._datastore.image_path()), (image_id or name) + suffix)
        added: str = super().add_image(image_id, image_filename, image_info)
        return added

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a label map, in the model's numbers; see ``renumber``.

        Raises:
            HTTPException: 404, if there is no such scan; 422, if the label map cannot be used, with the reason.
        """
        if image_id not in self._datastore.objects:
            raise HTTPException(404, f"{image_id!r}: no such scan in the studies")
        if UNSAFE.search(str(label_tag)):
            raise HTTPException(422, f"tag {label_tag!r}: give a name, not a path")
        self._check_target(Path(self._datastore.label_path(label_tag)), image_id + self._to_id(label_filename)[1])
        try:
            with named_errors(Path(label_filename)):
                image = nib.load(label_filename)
                values = np.asanyarray(image.dataobj)
            renumbered = renumber(values, label_info.get("label_info") or [], self.labels)
        except (InputError, TypeError, ValueError) as error:
            raise HTTPException(422, f"label map of {image_id}: {error}") from error
        if not np.array_equal(renumbered, values):
            changed = nib.Nifti1Image(renumbered, image.affine, image.header)
            changed.set_data_dtype(np.uint8)
            changed.header.set_slope_inter(1, 0)
            nib.save(changed, label_filename)
        # The names go with the numbers that are stored.
        names = [{"name": name, "idx": value} for name, value in self.labels.items()]
        saved: str = super().save_label(image_id, label_filename, label_tag, {**label_info, "label_info": names})
        return saved

    def _check_target(self, folder: Path, name: str) -> None:
        if not is_volume(name):
            raise HTTPException(422, f"{name!r}: give a NIfTI volume (.nii.gz) and a name without /, \\ or ..")
        root = Path(self._datastore_path).resolve()
        if not (folder / name).resolve().is_relative_to(root):
            raise HTTPException(422, f"{name!r} is a link that leaves the studies")


class VoltaApp(MONAILabelApp):
    """The app; MONAI Label finds it by its base class.

    Args:
        app_dir: its folder, which has the bundles in ``model``.
        studies: the folder with scans, or the address of a DICOMweb server.
        conf: ``models``: names of bundles, separated by commas.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = find_bundles(Path(app_dir), conf)
        self.label_numbers = segmentation_labels(self.bundles)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"VolTA-3D (MONAI Label {monailabel.__version__})",
            description="Hippocampus segmentation and whole-scan classification. Not a medical device.",
            version=monailabel.__version__,
        )

    def init_datastore(self) -> Datastore:
        """The studies."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return Studies(self.studies, self.label_numbers)

    def info(self) -> dict[str, Any]:
        """What clients read first. ``labels`` are those that are drawn, for which 3D Slicer makes segments."""
        return {**super().info(), "labels": list(self.label_numbers)}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> Any:
        """Answer a request.

        Raises:
            HTTPException: 404 without such a model or scan; 422 for a setting that is not taken from clients.
        """
        self.bundle_path(request.get("model"))
        check_settings(request)
        image = str(request.get("image") or "")
        # Absolute paths are those of uploaded files; guard.py lets no client give one.
        if not (Path(image).is_absolute() and Path(image).exists()) and not self.datastore().get_image_uri(image):
            raise HTTPException(404, f"{image!r}: no such scan in the studies")
        return super().infer(request, datastore)

    def batch_infer(self, request: dict[str, Any], datastore: Any = None) -> Any:
        """Answer for many scans; without a GPU, on the CPU."""
        if not torch.cuda.is_available():
            request = {**request, "multi_gpu": False, "device": "cpu"}
        return super().batch_infer(request, datastore)

    def bundle_path(self, model: str | None) -> str | None:
        """A trainer's bundle. MONAI Label asks for it before it starts any task.

        Raises:
            HTTPException: 404 without such a model.
        """
        if model is not None and model not in self.bundles:
            raise HTTPException(404, f"{model!r}: no such model; there are {', '.join(self.bundles)}")
        path: str | None = super().bundle_path(model)
        return path

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
