# SPDX-License-Identifier: Apache-2.0
"""Where a training starts: pretrained weights, frozen blocks, saved models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from volta_components.downstream.inits import is_pretrained
from volta_components.errors import InputError
from volta_components.method.monai_versions import fit_cross_attention, freeze_cross_attention
from volta_components.method.weights import LoadReport, load_pretrained, read_record, read_weights, write_weights

logger = logging.getLogger(__name__)


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
