# SPDX-License-Identifier: Apache-2.0
"""Where a training starts: pretrained weights, frozen blocks, saved models."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import nn

from volta_components.distributed import process_rank, unwrapped
from volta_components.downstream.inits import is_pretrained
from volta_components.errors import InputError
from volta_components.files import write_text
from volta_components.method.monai_versions import fit_cross_attention, freeze_cross_attention
from volta_components.method.networks import parameter_groups
from volta_components.method.weights import (
    LoadReport,
    is_spacing,
    load_pretrained,
    read_record,
    read_weights,
    trained_settings,
    write_weights,
)
from volta_components.training.archive import write_archive
from volta_components.training.record import find_calling_config, plain_settings
from volta_components.training.tracking import hide_folders

logger = logging.getLogger(__name__)


def freeze_encoder(encoder: nn.Module, unfrozen_blocks: int) -> None:
    """Let only the last blocks of a ViT (``VoltaViT``, MONAI's ``ViT`` or ``ViTAutoEnc``) train.

    With 0, the whole encoder (and its summariser) is frozen; with ``n``, the last ``n`` blocks train, and the final
    norm and the summariser after them; with all blocks, the patch and position embeddings train as well. What did not
    train before stays as it is: DDP would wait for the gradient of a summariser that a classifier does not use.

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


ENCODER_ATTRIBUTES = ("encoder", "vit")  # where a classifier and a UNETR have it


def encoder_name(network: nn.Module) -> str:
    """The attribute of a network that is its encoder.

    Raises:
        InputError: if it has none.
    """
    for name in ENCODER_ATTRIBUTES:
        if isinstance(getattr(network, name, None), nn.Module):
            return name
    names = " or ".join(ENCODER_ATTRIBUTES)
    raise InputError(f"{type(network).__name__} has no {names} to load pretrained weights into")


def freeze_for(network: nn.Module, init: str, unfrozen_blocks: int) -> nn.Module:
    """The network, with what an init does not train frozen; see ``freeze_encoder``. From scratch it trains whole.

    It is done before the optimiser is made. The weights come later, by ``LoadPretrained``, so that a config can be read
    without them.
    """
    if is_pretrained(init):
        freeze_encoder(network.get_submodule(encoder_name(network)), unfrozen_blocks)
    return network


def tuning_groups(
    network: nn.Module, init: str, weight_decay: float, encoder_rate: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for the optimiser: of ``parameter_groups``, parted by the share (``rate``) of the learning rate they get.

    In a pretrained encoder a parameter at depth ``d`` gets ``encoder_rate * layer_decay ** d``. The final norm and the
    summariser are at depth 0, the last block at 1, the first of ``n`` blocks at ``n``, the patch and position
    embeddings at ``n + 1``. Whatever else there is gets 1, and so does every parameter of a network from scratch.
    ``TrainingPlan`` multiplies the learning rate by ``rate``. Groups of the encoder are marked ``pretrained``; those
    with the whole rate come first.

    MONAI's ``generate_param_groups`` parts a network by its modules, but not by what is decayed, and takes frozen
    parameters as well.

    Raises:
        InputError: if a rate is not above 0 and at most 1.

    Source: layer-wise decay as in Bao et al., "BEiT: BERT pre-training of image transformers" (2022).
    """
    for name, value in (("encoder_rate", encoder_rate), ("layer_decay", layer_decay)):
        if not 0 < value <= 1:
            raise InputError(
                f"{name} {value}: a share above 0 and at most 1; unfrozen_blocks 0 keeps the encoder still"
            )
    groups: list[dict[str, Any]] = parameter_groups(network, weight_decay)
    if not is_pretrained(init):
        return groups
    encoder: Any = network.get_submodule(encoder_name(network))
    depths = dict.fromkeys(map(id, encoder.parameters()), len(encoder.blocks) + 1)
    levels = [
        [encoder.norm, getattr(encoder, "summariser", nn.Identity())],
        *([block] for block in encoder.blocks[::-1]),
    ]
    for depth, modules in enumerate(levels):
        depths |= {id(parameter): depth for module in modules for parameter in module.parameters()}
    parted: dict[tuple[float, bool, float], list[nn.Parameter]] = defaultdict(list)
    for group in groups:
        for parameter in group["params"]:
            pretrained = id(parameter) in depths
            rate = encoder_rate * layer_decay ** depths[id(parameter)] if pretrained else 1.0
            parted[-rate, pretrained, group["weight_decay"]].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate": -rate, "pretrained": pretrained}
        for (rate, pretrained, decay), parameters in sorted(parted.items(), key=lambda item: item[0])
    ]


@dataclass(eq=False)
class LoadPretrained:
    """Loads pretrained weights when a training starts; does nothing for an init from scratch.

    MONAI's ``CheckpointLoader`` neither resamples a position embedding nor reports what it has loaded. Put it before
    ``ResumableCheckpoint``, which loads what has been trained since.

    Attributes:
        network: the network, without a distributed wrapper.
        init: see ``is_pretrained``.
        encoder_path: the exported encoder.
        report_path: where the first process writes which weights were loaded, resampled or left.

    Raises:
        InputError: when the training starts; see ``load_pretrained``.
    """

    network: nn.Module
    init: str
    encoder_path: str | os.PathLike[str]
    report_path: str | os.PathLike[str] | None = None

    def attach(self, engine: Engine) -> None:
        """Load at the start."""
        engine.add_event_handler(Events.STARTED, self.load)

    def load(self) -> LoadReport | None:
        """Load now; return the report, or None from scratch."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.network.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        line = f"{self.init}: {trained:,} of {total:,} parameters train"
        logger.info("%s", line)
        if not is_pretrained(self.init):
            return None
        report = load_pretrained(self.network, self.encoder_path, prefix=f"{encoder_name(self.network)}.")
        if self.report_path is not None and process_rank() == 0:
            names = [("loaded", report.loaded), ("resampled", report.resampled), ("left", report.missing)]
            rows = [f"{what}  {name}" for what, keys in [*names, ("unused", report.unused)] for name in keys]
            write_text(self.report_path, hide_folders("\n".join([str(report), line, *rows]) + "\n"))
        return report


def save_model(path: str | os.PathLike[str], network: nn.Module, record: Mapping[str, Any]) -> None:
    """Write a trained network as a plain state dict (``.pt``) and, beside it, a JSON that says what it is.

    The JSON is the record, with the file's hash and the network's class and ``config``.
    """
    plain = unwrapped(network)
    state = {name: value.detach().cpu().contiguous() for name, value in plain.state_dict().items()}
    about = {"class": type(plain).__name__, "config": getattr(plain, "config", {})}
    write_weights(path, state, lambda target: write_archive(state, target), {"network": about, **record})


# Ids that change what weights compute, or what their numbers mean, and the shape of no weight.
AS_TRAINED = (
    *("spacing", "volume_size", "global_size", "image_size", "input_extent_mm", "patch_size"),
    *("num_heads", "summary_heads", "pool", "label_key", "classes", "class_names"),
)


def ids_as_trained(parser: ConfigParser) -> dict[str, Any]:
    """What the config that uses weights has for ``AS_TRAINED``, evaluated."""
    return {name: parser.get_parsed_content(name) for name in AS_TRAINED if name in parser}


def other_than_trained(there: Mapping[str, Any], values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (id, trained with, here) of ``AS_TRAINED`` that differ; one that either side does not have is left out.

    Args:
        there: settings that weights were trained with.
        values: see ``ids_as_trained``.
    """
    here = plain_settings({name: values[name] for name in AS_TRAINED if name in values and name in there})
    return [
        (name, str(there[name]), str(value))
        for name, value in here.items()
        if not (is_spacing(value, there[name]) if name == "spacing" else value == there[name])
    ]


def pool_of(path: str | os.PathLike[str]) -> str:
    """What the head of a trained classifier sees (``VoltaClassifier``'s ``pool``), by the JSON beside its weights."""
    made = read_record(path).get("network") or {}
    return str(made.get("config", {}).get("pool", "summary"))


def load_model(network: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a trained network's weights, all of them, after verifying their hash; the JSON beside them, empty for none.

    Called by an expression in a config, it compares the config with the settings that the weights were trained with.

    Raises:
        InputError: if the file is missing, damaged, changed, could run code, is of another network, or was trained with
            other settings.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such model; train it first (python -m monai.bundle run --config_file "
            "bundles/NAME/configs/train.json), download the bundle, or give another (--model_path FILE)"
        )
    plain = unwrapped(network)
    state = fit_cross_attention(read_weights(path), plain)
    record = read_record(path)
    own = plain.state_dict()
    rows = [
        (name, *(str(tuple(values[name].shape)) if name in values else "-" for values in (state, own)))
        for name in sorted(own.keys() | state.keys())
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]
    if rows:
        is_encoder = "summary_heads" in (record.get("network") or {})
        made_by = record.get("bundle") or ("pretrain, an encoder" if is_encoder else "")
        raise InputError.many(
            f"{path} holds weights of another network (name, file, network)",
            rows,
            (f"It is of the bundle {made_by}. " if made_by else "") + "If that is the right one, add the overlays "
            "that it was trained with (tiny.json, swin_scratch.json, ...) to --config_file.",
            limit=8,
        )
    parser = find_calling_config()
    values = {} if parser is None else ids_as_trained(parser)
    if parser is not None and "grid" in parser:
        values["spacing"] = list(parser.get_parsed_content("grid")[0])  # of a datalist, its own
    made, config = record.get("network") or {}, getattr(plain, "config", {})
    others = other_than_trained(trained_settings(record), values)
    others += other_than_trained(made.get("config", made), config)
    if others:
        raise InputError.many(
            f"{path} was trained with other settings (id, trained with, here)",
            dict.fromkeys(others),
            "Add the overlays that it was trained with to --config_file (--overlays), give the same (--ID VALUE), or "
            "prepare the data set with the same --spacing.",
        )
    plain.load_state_dict(state)
    logger.info("%s: %d weights loaded", path, len(state))
    return record
