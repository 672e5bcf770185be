# SPDX-License-Identifier: Apache-2.0
"""What the downstream bundles share: splits by patient, the leak guard, pretrained weights, freezing, and the record.

Every choice of subjects follows from the datalist's stored folds, the seed and the patients' ids alone, so that all
inits of a fold see the same subjects.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from volta_components.cores import cores
from volta_components.data.datalist import Datalist
from volta_components.data.identity import canonical_patient_id
from volta_components.distributed import mean_over_processes, process_rank
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json
from volta_components.handlers import find_mlflow_handler
from volta_components.networks import fit_cross_attention, freeze_cross_attention
from volta_components.record import code_version, patient_keys
from volta_components.sampling import KeyedDataset, ResumableSampler, derived_seed
from volta_components.weights import (
    LoadReport,
    find_encoder,
    load_pretrained,
    read_record,
    read_weights,
    write_weights,
)

logger = logging.getLogger(__name__)

PRETRAINED = "volta"
SCRATCH = "_scratch"

Item = dict[str, Any]


def is_pretrained(init: str) -> bool:
    """Whether an init starts from pretrained weights (``volta``) or not (``..._scratch``).

    Raises:
        InputError: if it is neither.
    """
    if init == PRETRAINED:
        return True
    if init.endswith(SCRATCH):
        return False
    raise InputError(f"init {init!r}: choose {PRETRAINED!r}, or one that ends in {SCRATCH!r} through its overlay")


# --- who is trained on, who chooses, who is scored ---------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Items of one run; no patient is in two of the lists.

    Attributes:
        training: what the weights are fitted on.
        validation: the inner validation part: thresholds, epochs and learning curves, never the fit.
        scored: the fold that results are about; always whole.
        unused: items of the training part that the fraction leaves out.
    """

    training: list[Item]
    validation: list[Item]
    scored: list[Item]
    unused: list[Item] = field(default_factory=list)

    @property
    def in_use(self) -> dict[str, list[Item]]:
        """The parts that a run goes through, by name."""
        return {"training": self.training, "inner validation": self.validation, "scored": self.scored}


def patients_of(items: Iterable[Mapping[str, Any]]) -> set[str]:
    """Patient ids of items."""
    return {str(item["patient_id"]) for item in items}


def item_name(item: Mapping[str, Any]) -> str:
    """Subject and session, as files are named."""
    return "_".join(str(item[key]) for key in ("subject_id", "session") if item.get(key))


def split_items(
    items: Sequence[Item],
    fold: int,
    fraction: float = 1.0,
    validation_fraction: float = 0.2,
    seed: int = 0,
    stratify: str | None = None,
) -> Parts:
    """Split items into training, inner validation and scored part, by patient.

    The scored part is the stored fold. The patients of the other folds are put in an order that a hash of seed, fold
    and id decides, for each stratum alone; a fraction takes the first ones, so that a smaller fraction is a subset of
    a larger one. Of those taken, evenly spread ones are the inner validation part, so that it is nested as well.

    Args:
        items: those that can be used, with ``patient_id`` and ``fold``.
        fold: the scored fold.
        fraction: share of the training part that is used, in (0, 1].
        validation_fraction: share of the used ones that is held out for inner validation, in [0, 1).
        seed: of the order.
        stratify: a key of the items; both shares hold in each of its values (rounded, a half up). A patient with
            several scans counts by the largest.

    Raises:
        InputError: if a share is out of range, the fold has no items, or a patient is in two folds.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction}: a share of the training part in (0, 1] is wanted")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction {validation_fraction}: a share in [0, 1) is wanted")
    scored = [item for item in items if item["fold"] == fold]
    rest = [item for item in items if item["fold"] != fold]
    if not scored or not rest:
        known = sorted({int(item["fold"]) for item in items})
        raise InputError(
            f"fold {fold} cannot be scored: the usable items are in fold{'s' * (len(known) != 1)} "
            f"{', '.join(map(str, known)) or '(none)'}; choose another fold, or prepare more subjects"
        )
    check_disjoint({"scored fold": scored, "other folds": rest})
    by_patient: dict[str, list[Item]] = defaultdict(list)
    for item in rest:
        by_patient[str(item["patient_id"])].append(item)
    strata: dict[Any, list[str]] = defaultdict(list)
    for patient, scans in by_patient.items():
        values = [scan.get(stratify) for scan in scans] if stratify else [None]
        strata[max(values, key=lambda value: (value is not None, str(value)))].append(patient)
    place: dict[str, str] = {}
    for patients in strata.values():
        patients.sort(key=lambda patient: hashlib.sha256(f"{seed}:{fold}:{patient}".encode()).hexdigest())
        taken = int(fraction * len(patients) + 0.5)
        for number, patient in enumerate(patients):
            before, after = (int(validation_fraction * count + 0.5) for count in (number, number + 1))
            place[patient] = "unused" if number >= taken else "validation" if after > before else "training"
    parts: dict[str, list[Item]] = {"training": [], "validation": [], "unused": []}
    for item in rest:
        parts[place[str(item["patient_id"])]].append(item)
    return Parts(scored=scored, **parts)


def check_disjoint(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Make sure that no patient is in two parts.

    Raises:
        InputError: with the ids.
    """
    where: dict[str, list[str]] = defaultdict(list)
    for name, items in parts.items():
        for patient in patients_of(items):
            where[canonical_patient_id(patient)].append(name)
    rows = [(patient, " and ".join(names)) for patient, names in sorted(where.items()) if len(names) > 1]
    if rows:
        raise InputError.many(
            f"{len(rows)} patients are in two parts of the split",
            rows,
            "Give each patient one fold: prepare the data set again, or volta3d merge --refold.",
        )


def check_shares(parts: Mapping[str, Sequence[Any]], processes: int) -> None:
    """Make sure that every process has scans of every part, where a part has any.

    MONAI's evaluators skip a process without scans, and the others would wait for it for ever.

    Args:
        parts: scans by name of the part.
        processes: how many train together.

    Raises:
        InputError: naming the parts, their scans, and the number of processes.
    """
    rows = [(name, f"{len(items)} scans") for name, items in parts.items() if 0 < len(items) < processes]
    if rows:
        most = min(len(items) for items in parts.values() if items)
        raise InputError.many(
            f"{processes} processes cannot share a part of fewer scans",
            rows,
            f"Start no more than {most} (torchrun --nproc_per_node, crossval --gpus-per-run), or make the part larger: "
            "a larger fraction or validation_fraction, fewer folds (volta3d prepare --folds), more subjects.",
        )


def check_classes(
    parts: Parts,
    classes: Sequence[str],
    fraction: float = 1.0,
    validation: bool = True,
    key: str = "label",
) -> None:
    """Make sure that every part has every class, before anything is trained.

    Args:
        parts: items with ``key``, the index of the class.
        classes: names of the classes, by index.
        fraction: named in the message.
        validation: whether the inner validation part needs every class as well.
        key: where items have their class.

    Raises:
        InputError: naming the part, the class, and the subjects that are there.
    """

    def lacking(items: Sequence[Item]) -> list[str]:
        there = {int(item[key]) for item in items}
        return [name for index, name in enumerate(classes) if index not in there]

    def counted(items: Sequence[Item]) -> str:
        counts = Counter(classes[int(item[key])] for item in items)
        return ", ".join(f"{counts[name]} {name}" for name in classes)

    def listed(items: Sequence[Item]) -> list[tuple[str, str]]:
        return [(item_name(item), classes[int(item[key])]) for item in items]

    if missing := lacking(parts.scored):
        raise InputError.many(
            f"the scored fold has nobody of {', '.join(missing)}; it has {counted(parts.scored)}",
            listed(parts.scored),
            "Prepare the data set with fewer folds (volta3d prepare --folds), or with more subjects.",
        )
    whole = [*parts.training, *parts.validation, *parts.unused]
    if missing := lacking(whole):
        raise InputError.many(
            f"the training part has nobody of {', '.join(missing)}; it has {counted(whole)}",
            listed(whole),
            "Prepare the data set with more folds, or with more subjects.",
        )
    for name, items in (("training", parts.training), ("inner validation", parts.validation)):
        if (name == "training" or validation) and (missing := lacking(items)):
            raise InputError.many(
                f"fraction {fraction:g} is too small: of {len(whole)} scans in the training part ({counted(whole)}) it "
                f"leaves nobody of {', '.join(missing)} for {name}; there are {counted(items)}",
                listed(items),
                "Take a larger fraction, or prepare more subjects.",
            )


def class_weights(items: Sequence[Mapping[str, Any]], num_classes: int, key: str = "label") -> Tensor:
    """Weights that balance the classes in a cross-entropy: ``n / (num_classes * n_class)``.

    Args:
        items: the training part, with ``key``, the index of the class.
        num_classes: number of classes.
        key: where items have their class.

    Returns:
        ``[num_classes]``; their mean over the items is 1.

    Raises:
        InputError: if a class has no items.
    """
    counts = np.bincount([int(item[key]) for item in items], minlength=num_classes)
    if counts.min() == 0:
        raise InputError(f"class {int(counts.argmin())} has no items to compute a weight from")
    return torch.tensor(len(items) / (num_classes * counts), dtype=torch.float32)


# --- pretrained weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a run's weights come from.

    Attributes:
        encoder_sha256: hash of the file; empty when training from scratch.
        pretrain_datalist_hash: of the data that the encoder was trained on.
        leak: ``none``, or ``allowed`` when scored patients were, or may have been, pretrained on.
        leaked: those patients' ids.
        patient_ids: keys of everybody pretrained on (``patient_key``), or None where the encoder does not tell.
    """

    encoder_sha256: str = ""
    pretrain_datalist_hash: str = ""
    leak: str = "none"
    leaked: tuple[str, ...] = ()
    patient_ids: tuple[str, ...] | None = ()

    @property
    def record(self) -> dict[str, Any]:
        """What a model's record keeps, so that its evaluation can rule out a leak as well."""
        return {
            "encoder_sha256": self.encoder_sha256,
            "datalist_hash": self.pretrain_datalist_hash,
            "patient_ids": None if self.patient_ids is None else list(self.patient_ids),
        }


@functools.lru_cache
def _digest(path: Path, _changed: int) -> str:
    """A cross-validation asks for each of its runs."""
    return sha256_file(path)


def check_origin(
    init: str, encoder_path: str | os.PathLike[str], scored: Sequence[Mapping[str, Any]], allow_leak: bool = False
) -> Origin:
    """The leak guard: nobody who is scored was in the data that the encoder was pretrained on.

    Args:
        init: see ``is_pretrained``.
        encoder_path: the exported encoder, with its JSON beside it, or a folder that holds one (``find_encoder``).
        scored: items of the scored fold.
        allow_leak: go on all the same; the run is marked.

    Raises:
        InputError: with the ids of those who were pretrained on; when the encoder does not tell its patients; or when
            it is missing.
    """
    if not is_pretrained(init):
        return Origin()
    path = find_encoder(encoder_path, required=False)
    if not path.is_file():
        raise InputError(
            f"{path}: no such encoder. Pretrain one (python -m monai.bundle run --config_file "
            "bundles/pretrain/configs/train.json), give another (--encoder_path FILE), or train from scratch "
            "(the overlay of a *_scratch init)"
        )
    record = path.with_suffix(".json")
    provenance = read_record(path).get("provenance") or {}
    digest, datalist_hash = _digest(path, path.stat().st_mtime_ns), str(provenance.get("datalist_hash") or "")
    known = provenance.get("patient_ids")
    if known is None:
        if allow_leak:
            logger.warning("%s does not tell whom it was pretrained on; the run is marked as a possible leak", path)
            return Origin(digest, datalist_hash, leak="allowed", patient_ids=None)
        raise InputError(
            f"{record}: does not tell whom the encoder was pretrained on (provenance.patient_ids), so that a leak into "
            "the scored fold cannot be ruled out; export the encoder again, or say --allow_leak True"
        )
    leaked = patients_known_to(scored, known)
    if leaked and not allow_leak:
        raise InputError.many(
            f"{path} was pretrained on {len(leaked)} of the {len(patients_of(scored))} scored patients",
            [(patient,) for patient in leaked],
            "Pretrain without them (volta3d prepare --exclude-patients-of), or say --allow_leak True, which marks the "
            "run.",
        )
    if leaked:
        logger.warning("%d scored patients were pretrained on; the run is marked: %s", len(leaked), ", ".join(leaked))
    return Origin(digest, datalist_hash, "allowed" if leaked else "none", tuple(leaked), tuple(known))


def patients_known_to(items: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> list[str]:
    """Ids of the items' patients who are among a record's (``patient_ids``)."""
    known = set(keys)
    return sorted({str(item["patient_id"]) for item in items if patient_keys(item) & known})


def known_patients(record: Mapping[str, Any]) -> tuple[list[str] | None, list[str] | None]:
    """Keys of those whom a model was trained on and pretrained on, as its record tells; None where it does not."""
    trained = (record.get("provenance") or {}).get("patient_ids")
    if "pretraining" in record:
        return trained, record["pretraining"].get("patient_ids")
    from_scratch = (record.get("tags") or {}).get("encoder_sha256") == ""
    return trained, [] if from_scratch else None


def check_model(record: Mapping[str, Any], scored: Sequence[Mapping[str, Any]], allow_leak: bool = False) -> str:
    """The leak guard of a trained model: nobody who is scored was pretrained on or trained on.

    Args:
        record: the JSON beside the model; see ``save_model``.
        scored: items to be scored.
        allow_leak: go on all the same.

    Returns:
        ``none``, or ``allowed`` when scored patients were, or may have been, among them.

    Raises:
        InputError: with the ids of those who were; or when the record does not tell.
    """
    trained, pretrained = known_patients(record)
    unknown = [name for name, ids in (("trained", trained), ("pretrained", pretrained)) if ids is None]
    rows = [
        (patient, what)
        for what, ids in (("pretrained on", pretrained), ("trained on", trained))
        for patient in patients_known_to(scored, ids or ())
    ]
    if rows and not allow_leak:
        raise InputError.many(
            f"the model was trained or pretrained on {len({row[0] for row in rows})} of the "
            f"{len(patients_of(scored))} scored patients",
            rows,
            "Score the fold that it was trained for (--fold), or say --allow_leak True.",
            limit=10,
        )
    if unknown and not allow_leak:
        raise InputError(
            f"the JSON beside the model does not tell whom it was {' and '.join(unknown)} on, so that a leak into the "
            "scored part cannot be ruled out; fetch the model with its JSON or train it again, or say --allow_leak True"
        )
    if rows:
        logger.warning("scored patients are known to the model: %s", ", ".join(sorted({row[0] for row in rows})))
    return "allowed" if rows or unknown else "none"


def freeze_encoder(encoder: nn.Module, unfrozen_blocks: int) -> None:
    """Let only the last blocks of a ViT train.

    With 0, the whole encoder (and its summariser) is frozen; with ``n``, the last ``n`` blocks train, and the final
    norm and the summariser after them; with all blocks, the patch and position embeddings train as well. What did not
    train before stays as it is: DDP would wait for the gradient of a summariser that a classifier does not use.

    Args:
        encoder: ``VoltaViT``, or MONAI's ``ViT`` or ``ViTAutoEnc``.
        unfrozen_blocks: how many of its blocks train.

    Raises:
        InputError: if there are not so many blocks.
    """
    blocks = encoder.blocks
    assert isinstance(blocks, nn.ModuleList)
    if not 0 <= unfrozen_blocks <= len(blocks):
        raise InputError(f"unfrozen_blocks {unfrozen_blocks}: the encoder has {len(blocks)} blocks")
    if unfrozen_blocks == len(blocks):
        return
    trained = {id(parameter) for parameter in encoder.parameters() if parameter.requires_grad}
    encoder.requires_grad_(False)
    if unfrozen_blocks == 0:
        return
    for module in [*blocks[len(blocks) - unfrozen_blocks :], encoder.norm, getattr(encoder, "summariser", None)]:
        for parameter in () if module is None else module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    freeze_cross_attention(encoder)


def start_from(
    network: nn.Module,
    init: str,
    encoder_path: str | os.PathLike[str],
    unfrozen_blocks: int,
    prefix: str,
    report_path: str | os.PathLike[str] | None = None,
) -> LoadReport | None:
    """Give a network its start: pretrained weights and frozen blocks, or nothing when it trains from scratch.

    Args:
        network: the network, changed in place.
        init: see ``is_pretrained``; models from scratch always train whole.
        encoder_path: the exported encoder.
        unfrozen_blocks: see ``freeze_encoder``.
        prefix: where the encoder sits in the network: ``"encoder."``, or ``"vit."`` in a UNETR.
        report_path: where the report of what was loaded, resampled or left is written as text.

    Returns:
        That report, or None from scratch.

    Raises:
        InputError: see ``load_pretrained`` and ``freeze_encoder``.
    """
    if not is_pretrained(init):
        logger.info("%s: all %d parameters train from scratch", init, sum(p.numel() for p in network.parameters()))
        return None
    report = load_pretrained(network, encoder_path, prefix=prefix)
    freeze_encoder(network.get_submodule(prefix.rstrip(".")), unfrozen_blocks)
    total, trained = (
        sum(p.numel() for p in network.parameters() if p.requires_grad or every) for every in (True, False)
    )
    line = f"{trained:,} of {total:,} parameters train ({unfrozen_blocks} blocks of the encoder unfrozen)"
    logger.info("%s", line)
    if report_path is not None:
        target = Path(report_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        names = [("loaded", report.loaded), ("resampled", report.resampled), ("left", report.missing)]
        rows = [f"{what}  {name}" for what, keys in [*names, ("unused", report.unused)] for name in keys]
        target.write_text("\n".join([str(report), line, *rows]) + "\n", encoding="utf-8")
    return report


# --- data --------------------------------------------------------------------------------------------------------


class KeyedCacheDataset(KeyedDataset):
    """``KeyedDataset`` that computes what comes before the first random transform only once.

    MONAI's ``CacheDataset`` seeds random transforms once for each worker and fills its cache when it is built, even
    for a run that turns out to be finished; this one is filled by ``FillCache``, or as it is used.

    Args:
        data: items.
        transform: a ``Compose``; the part before its first random transform is cached.
        seed: base seed.
        cache: whether to keep anything in memory.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        super().__init__(data, transform if isinstance(transform, Compose) else Compose(transform or []), seed)
        first = self._compose.get_index_of_first(lambda t: isinstance(t, RandomizableTrait))
        self._first = len(self._compose.transforms) if first is None else int(first)
        self.cache = cache
        self._cache: dict[int, Any] = {}

    @property
    def _compose(self) -> Compose:
        assert isinstance(self.transform, Compose)
        return self.transform

    def fill(self, indices: Iterable[int] | None = None, workers: int | None = None) -> None:
        """Fill the cache with threads, before workers are forked off.

        Args:
            indices: items that are wanted; all by default.
            workers: threads; the number of cores, up to 8, by default.
        """
        wanted = range(len(self.data)) if indices is None else indices
        missing = [index for index in wanted if index not in self._cache]
        if not self.cache or not missing:
            return
        with ThreadPoolExecutor(workers or min(8, cores())) as pool:
            self._cache.update(zip(missing, pool.map(self._deterministic, missing)))

    def _deterministic(self, index: int) -> Any:
        return self._compose(dict(self.data[index]), end=self._first, threading=True)

    def __getitem__(self, key: tuple[int, ...] | int) -> Any:
        epoch, index = (0, key) if isinstance(key, int) else key[:2]
        if index in self._cache:
            item = copy.deepcopy(self._cache[index])
        else:
            item = self._deterministic(index)
            if self.cache:
                self._cache[index] = copy.deepcopy(item)
        item["key"] = torch.tensor([epoch, index])
        self._compose.set_random_state(seed=derived_seed(self.seed, "transform", epoch, index) % 2**32)
        return self._compose(item, start=self._first)


# --- trained models ----------------------------------------------------------------------------------------------


def save_model(path: str | os.PathLike[str], network: nn.Module, record: Mapping[str, Any]) -> None:
    """Write a trained network as a plain state dict and, beside it, a JSON that says what it is.

    Args:
        path: the ``.pt`` file, which ``torch.load(..., weights_only=True)`` reads; the JSON has the suffix ``.json``.
        network: the network, with or without a distributed wrapper.
        record: written into the JSON, with the file's hash and the network's class and ``config``.
    """
    plain = network.module if isinstance(network, DistributedDataParallel) else network
    state = {name: value.detach().cpu().contiguous() for name, value in plain.state_dict().items()}
    about = {"class": type(plain).__name__, "config": getattr(plain, "config", {})}
    write_weights(path, state, lambda target: torch.save(state, target), {"network": about, **record})


def load_model(network: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a trained network's weights, all of them, after verifying their hash.

    Args:
        network: a network of the same class and sizes, changed in place; with or without a distributed wrapper.
        path: the ``.pt`` file.

    Returns:
        The JSON beside it; empty when there is none.

    Raises:
        InputError: if the file is missing, damaged, changed, could run code, or is of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such model; train it first (python -m monai.bundle run --config_file "
            "bundles/NAME/configs/train.json), download the bundle, or give another (--model_path FILE)"
        )
    plain = network.module if isinstance(network, DistributedDataParallel) else network
    state = fit_cross_attention(read_weights(path), plain)
    record = read_record(path)
    own = plain.state_dict()
    rows = [
        (name, *(str(tuple(values[name].shape)) if name in values else "-" for values in (state, own)))
        for name in sorted(own.keys() | state.keys())
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]
    if rows:
        raise InputError.many(
            f"{path} holds weights of another network (name, file, network)",
            rows,
            "Add the overlays that it was trained with (tiny.json, swin_scratch.json, ...) to --config_file.",
            limit=8,
        )
    plain.load_state_dict(state)
    logger.info("%s: %d weights loaded", path, len(state))
    return record


# --- handlers ----------------------------------------------------------------------------------------------------


class FillCache:
    """Fills a data set's cache before an engine's first epoch: what a loader's workers cache dies with them.

    Args:
        dataset: of the engine's loader.
        indices: items that this process needs, where it never sees the others; all by default.
    """

    def __init__(self, dataset: KeyedCacheDataset, indices: Iterable[int] | None = None) -> None:
        self.dataset = dataset
        self.indices = indices

    def attach(self, engine: Engine) -> None:
        """Fill as late as can be: a run that is finished already has no epoch."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: self.dataset.fill(self.indices))


class TrainingPlan:
    """Order and learning rate of a ``SupervisedTrainer``, as functions of epoch and mini-batch: nothing to restore.

    MONAI's ``LrScheduleHandler`` drives PyTorch's schedulers, whose counters would have to be saved with the run.

    Args:
        sampler: told where each epoch begins.
        learning_rate: of an optimiser step, counted from 0.
    """

    def __init__(self, sampler: ResumableSampler, learning_rate: Callable[[int], float]) -> None:
        self.sampler = sampler
        self.learning_rate = learning_rate

    def attach(self, engine: Engine) -> None:
        """Follow epochs and mini-batches."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)

    def _epoch_started(self, engine: Engine) -> None:
        self.sampler.set_position(engine.state.epoch)

    def _iteration_started(self, engine: Any) -> None:
        rate = self.learning_rate(engine.state.iteration - 1)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate


class RunRecord:
    """Settings, tags and epoch means of a fine-tuning run, for MLflow, the log and ``history``.

    MONAI's MLflow handler records a loss at every mini-batch, by iteration; here ``train_loss`` is the epoch's mean
    over all processes, at the epoch, as the validation's numbers are, and tags are set. A fine-tuning run has
    checkpoints at ends of epochs only, so that no epoch's mean misses its beginning.

    Args:
        settings: recorded as parameters.
        tags: see ``run_tags``.
        evaluator: the validation engine, whose metrics ``history`` holds too; run it before this handler.
    """

    def __init__(self, settings: Mapping[str, Any], tags: Mapping[str, Any], evaluator: Engine | None = None) -> None:
        self.settings = dict(settings)
        self.tags = {name: str(value) for name, value in tags.items()}
        self.evaluator = evaluator
        self.history: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._recorded = False
        self._engine: Engine | None = None

    def state_dict(self) -> dict[str, Any]:
        """The numbers of past epochs."""
        return {"history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.history = [dict(row) for row in state["history"]]

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch and epoch; once, whoever attaches it."""
        if self._engine is engine:
            return
        self._engine = engine
        engine.add_event_handler(Events.EPOCH_STARTED, self.record)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.record)

    def record(self, engine: Engine) -> None:
        """Parameters and tags to MLflow, once."""
        handler = find_mlflow_handler(engine)
        if handler is None or self._recorded:
            return
        self._recorded = True
        handler.iteration_logger = lambda _: None
        run_id = handler.cur_run.info.run_id
        known = handler.client.get_run(run_id).data.params
        handler._log_params({name: value for name, value in self.settings.items() if name not in known})
        for name, value in self.tags.items():
            handler.client.set_tag(run_id, name, value)

    def _iteration_completed(self, engine: Engine) -> None:
        output: Any = engine.state.output
        self._losses.append((output[0] if isinstance(output, list) else output)["loss"].detach())

    def _epoch_completed(self, engine: Any) -> None:
        row = {
            "epoch": engine.state.epoch,
            "train_loss": float(mean_over_processes(torch.stack(self._losses).double().mean())),
            "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        }
        self._losses.clear()
        engine.state.metrics |= {name: value for name, value in row.items() if name != "epoch"}
        if self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch:
            row |= {name: float(value) for name, value in self.evaluator.state.metrics.items()}
        self.history.append(row)


def run_tags(
    bundle: str, init: str, fold: int, fraction: float, seed: int, datalist: Datalist, origin: Origin
) -> dict[str, str]:
    """The tags by which MLflow's runs are found and compared; ``finished`` comes last, by ``log_results``."""
    cohorts = {str(item.get("cohort", "")) for item in datalist.content["training"]} | {datalist.name}
    return {
        "bundle": bundle,
        "init": init,
        "fold": str(fold),
        "fraction": f"{fraction:g}",
        "seed": str(seed),
        "datalist_hash": datalist.hash,
        "datalist_name": datalist.name,
        "code_version": code_version(),
        "encoder_sha256": origin.encoder_sha256,
        "pretrain_datalist_hash": origin.pretrain_datalist_hash,
        "leak": origin.leak,
        "phantom": str(any("phantom" in cohort.lower() for cohort in cohorts)).lower(),
    }


@dataclass(frozen=True)
class Results:
    """What a finished run leaves.

    Attributes:
        metrics: final numbers, for MLflow and the record.
        artifacts: files or folders within the run's folder, each with the folder of MLflow's artifacts that it goes to.
        record: more of the run's record: whatever JSON can hold.
    """

    metrics: Mapping[str, float]
    artifacts: Sequence[tuple[str, str]]
    record: Mapping[str, Any] = field(default_factory=dict)


class FinishRun:
    """Scores a run once, when it is complete, and keeps a complete run from being done again.

    At the end: ``results`` writes its files; ``result.json`` with settings, tags, numbers and history is written; the
    checkpoint is removed, as it is no longer needed; MLflow gets everything, ``finished`` last. A run that was killed
    in between goes on with what was left. Where ``result.json`` is already there, no epoch is trained.

    Put it after ``ValidationHandler`` and before ``ResumableCheckpoint``. It attaches ``record`` as well: MONAI's
    ``check_properties`` cannot read a list of handlers in which one is a reference.

    Args:
        output_dir: the run's folder.
        settings: must be the same when the run is started again.
        tags: see ``run_tags``.
        results: called in every process with the trainer; writes files in the first one only.
        record: settings, tags and the history of epochs.
        checkpoint_path: the checkpoint to remove.

    Raises:
        InputError: at the start, if the folder holds a finished run of other settings.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        settings: Mapping[str, Any],
        tags: Mapping[str, Any],
        results: Callable[[Engine], Results],
        record: RunRecord | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder = Path(output_dir)
        # As JSON gives it back.
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        self.tags = {name: str(value) for name, value in tags.items()}
        self.results = results
        self.record = record
        self.checkpoint_path = None if checkpoint_path is None else Path(checkpoint_path)
        self._before: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The record of a finished run."""
        return self.folder / "result.json"

    def attach(self, engine: Engine) -> None:
        """Look for a finished run at the start; finish at the end."""
        if self.record is not None:
            self.record.attach(engine)
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        before = read_json(self.path)
        there = before.get("settings", {})
        rows = [
            (name, str(there.get(name)), str(self.settings.get(name)))
            for name in sorted(there.keys() | self.settings.keys())
            if there.get(name) != self.settings.get(name)
        ]
        if rows:
            raise InputError.many(
                f"{self.path} is of a finished run with other settings (name, there, here)",
                rows,
                "Choose another run_name (--run_name NAME), or remove the folder to start anew.",
            )
        self._before = before
        logger.info("%s is of the same run, which is finished: nothing is trained", self.path)
        length, epochs = engine.state.epoch_length, engine.state.max_epochs
        assert length is not None and epochs is not None
        engine.load_state_dict({"iteration": epochs * length, "epoch_length": length, "max_epochs": epochs})

    def _completed(self, engine: Engine) -> None:
        handler = find_mlflow_handler(engine)
        run_id = None if handler is None else str(handler.cur_run.info.run_id)
        content = self._before
        if content is None:
            results = self.results(engine)
            content = {
                "settings": self.settings,
                "tags": self.tags,
                "metrics": dict(results.metrics),
                "artifacts": [list(artifact) for artifact in results.artifacts],
                "history": [] if self.record is None else self.record.history,
                "mlflow_run_id": run_id,
                **results.record,
            }
            if process_rank() == 0:
                write_json(self.path, content)
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in content["metrics"].items())
                logger.info("finished: %s; all of it is in %s", numbers, self.path)
        elif handler is not None and content["mlflow_run_id"] not in (None, run_id):
            known = handler.client.search_runs(
                [handler.cur_run.info.experiment_id], f"attributes.run_id = '{content['mlflow_run_id']}'"
            )
            if known and known[0].data.tags.get("finished") == "true":
                # MONAI's handler opens a new run beside a finished one of the same name.
                handler.client.set_tag(run_id, "superseded", "true")
                return
        if process_rank() == 0:
            if self.checkpoint_path is not None:
                self.checkpoint_path.unlink(missing_ok=True)
            artifacts = [(self.folder / name, folder) for name, folder in content["artifacts"]]
            log_results(engine, content["metrics"], [*artifacts, (self.path, "")])


def log_results(
    engine: Engine,
    metrics: Mapping[str, float],
    artifacts: Iterable[tuple[str | os.PathLike[str], str]],
    tags: Mapping[str, str] | None = None,
) -> str | None:
    """Give MLflow a finished run's numbers and files, and mark it as finished when all of it is there.

    Args:
        engine: the trainer.
        metrics: final numbers.
        artifacts: files or folders, each with the folder of the run's artifacts that it goes to.
        tags: more tags.

    Returns:
        The MLflow run's id, or None without tracking.
    """
    handler = find_mlflow_handler(engine)
    if handler is None:
        return None
    run_id = str(handler.cur_run.info.run_id)
    handler._log_metrics({name: float(value) for name, value in metrics.items()}, step=engine.state.epoch)
    for path, folder in artifacts:
        if Path(path).is_dir():
            handler.client.log_artifacts(run_id, str(path), folder or None)
        else:
            handler.client.log_artifact(run_id, str(path), folder or None)
    for name, value in {**(tags or {}), "finished": "true"}.items():
        handler.client.set_tag(run_id, name, str(value))
    return run_id
