# SPDX-License-Identifier: Apache-2.0
"""State dicts of MONAI 1.5 and 1.6: cross-attention weights that their transformer blocks register and never use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from monai.networks.blocks.transformerblock import TransformerBlock
from torch import nn


def _unused_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Cross-attention of MONAI's transformer blocks that are without it, and its norm, by name."""
    for name, block in network.named_modules():
        if isinstance(block, TransformerBlock) and not block.with_cross_attention:
            for child in ("cross_attn", "norm_cross_attn"):
                if hasattr(block, child):
                    yield f"{name}.{child}" if name else child, getattr(block, child)


def freeze_cross_attention(network: nn.Module) -> None:
    """Freeze the cross-attention that MONAI's blocks register and never use; DDP would wait for its gradient."""
    for _, module in _unused_modules(network):
        module.requires_grad_(False)


def fit_cross_attention(state: Mapping[str, Any], network: nn.Module, prefix: str = "") -> dict[str, Any]:
    """A state dict of one version of MONAI, made to fit a network of another version, or a part (``prefix``) of it.

    MONAI's ``TransformerBlock`` registers weights of cross-attention even where it never uses them: version 1.5 whole
    attention blocks, version 1.6 only their norm. Those that the network does not have are removed, and those that the
    state dict lacks are taken from the network. No output depends on them. Every other key stays.
    """
    unused = tuple(f"{prefix}{name}." for name, _ in _unused_modules(network))
    own = {name: value for name, value in network.state_dict(prefix=prefix).items() if name.startswith(unused)}
    fitted = {name: value for name, value in state.items() if name in own or not name.startswith(unused)}
    return {**own, **fitted}


def _fit_before_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    fitted = fit_cross_attention(state, module, prefix)
    state.clear()
    state.update(fitted)


def settle_cross_attention(network: nn.Module) -> None:
    """Freeze cross-attention that is never used, and make ``load_state_dict`` accept state dicts with or without it.

    Strict or not, it then takes state dicts of MONAI 1.5 and 1.6 alike; see ``fit_cross_attention``.
    """
    freeze_cross_attention(network)
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            block.register_load_state_dict_pre_hook(_fit_before_loading)
