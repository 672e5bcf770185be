# SPDX-License-Identifier: Apache-2.0
"""Weights: saved as safetensors with their provenance, loaded by one function that resamples and reports."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from volta_components.errors import InputError
from volta_components.files import (
    atomic_path,
    copy_file,
    file_tag,
    keep_copy,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from volta_components.method.monai_versions import fit_cross_attention
from volta_components.method.networks import VoltaViT, resample_position_embedding
from volta_components.training.archive import DamagedArchiveError, read_archive

logger = logging.getLogger(__name__)

POSITION = "patch_embedding.position_embeddings"
ENCODER = ("patch_embedding.", "blocks.", "norm.", "summariser.")
DECODER = ("conv3d_transpose.", "conv3d_transpose_1.")
# Names of an encoder's file, first choice first; a packed bundle has the second, as MONAI's bundles do.
ENCODERS = ("encoder{}.safetensors", "model{}.pt")


@dataclass
class LoadReport:
    """Which weights were loaded as they were, resampled to another token grid, missing in the file, or unused there."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def some(keys: list[str]) -> str:
            return "" if not keys else f" ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"

        return (
            f"{self.source}: {len(self.loaded)} weights loaded, {len(self.resampled)} resampled{some(self.resampled)}, "
            f"{len(self.missing)} of the network left as they were{some(self.missing)}, "
            f"{len(self.unused)} of the file not used{some(self.unused)}"
        )


def save_encoder(path: str | os.PathLike[str], network: VoltaViT, provenance: Mapping[str, Any], **facts: Any) -> None:
    """Write encoder and summariser (no decoder) as safetensors and, beside them, a JSON with provenance and facts.

    Keys are MONAI's ``ViTAutoEnc``'s, and ``summariser.*``; see ``volta_components.training.record.provenance``.
    """
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in network.state_dict().items()
        if not name.startswith(DECODER)
    }
    record = {"network": network.config, "provenance": dict(provenance), **facts}
    write_weights(path, state, lambda target: save_file(state, target, metadata={"format": "pt"}), record)


def write_weights(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    save: Callable[[Path], None],
    record: Mapping[str, Any],
) -> None:
    """Write weights by ``save`` and, beside them, their record with the file's hash.

    Both are written under temporary names, then renamed one right after the other, while Ctrl-C waits. If the process
    dies between the two renames, the hash check rejects the pair.
    """
    path = Path(path)
    with _signals_wait(), atomic_path(path) as weights:
        save(weights)
        content = {
            "sha256": sha256_file(weights),
            "parameters": sum(value.numel() for value in state.values()),
            **record,
        }
        write_json(path.with_suffix(".json"), content)


def is_of_run(record: Mapping[str, Any], settings: Any) -> bool:
    """Whether a record of weights is of the run with these settings, as ``provenance`` gives them."""
    theirs = (record.get("provenance") or {}).get("settings")
    return sha256_json([theirs]) == sha256_json([settings])


def keep_other_weights(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path | None:
    """Before weights are written: keep those of another run that lie there, with all that is beside them.

    Args:
        path: where weights will be written.
        record: will be written beside them.

    Returns:
        ``NAME_HASH``, the copy; None if nothing was kept.
    """
    path = Path(path)
    try:
        before = read_record(path)
    except InputError:
        before = {}
    if not path.is_file() or is_of_run(before, (record.get("provenance") or {}).get("settings")):
        return None
    kept, beside = path.with_stem(f"{path.stem}_{file_tag(path)}"), file_tag(path.with_suffix(".json"))
    if beside and file_tag(kept.with_suffix(".json")) not in ("", beside):
        kept = kept.with_stem(f"{kept.stem}_{beside}")  # the same weights with another record are kept already
    for suffix in (path.suffix, ".json", ".png"):
        if path.with_suffix(suffix).is_file():
            keep_copy(path.with_suffix(suffix), kept.with_suffix(suffix))
    logger.warning("%s has weights of another run, which are kept as %s", path, kept)
    return kept


def keep_picture(weights: str | os.PathLike[str], picture: Path, caption: str, shows_scans: bool) -> dict[str, Any]:
    """Copy a run's picture beside its weights, under their name.

    Args:
        weights: the file of weights.
        picture: a PNG file; if it is missing, there will be no picture beside the weights.
        caption: what it shows.
        shows_scans: whether somebody's head can be seen on it.

    Returns:
        What the weights' record says of it, under ``picture``; empty without one.
    """
    beside = Path(weights).with_suffix(".png")
    if not picture.is_file():
        beside.unlink(missing_ok=True)
        return {}
    copy_file(picture, beside)
    return {"picture": {"sha256": sha256_file(beside), "caption": caption, "shows_scans": shows_scans}}


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, lambda number, _: pending.append(number)) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        for number in pending:
            signal.raise_signal(number)


def find_encoder(path: str | os.PathLike[str], suffix: str = "", required: bool = True) -> Path:
    """The file of an exported encoder.

    Args:
        path: the file itself; or a bundle's folder or its ``models``, where ``encoder.safetensors`` is looked for first
            and ``model.pt``, as a packed bundle has it, second.
        suffix: of the name before the dot, such as ``_phantom_tiny``.
        required: whether a folder must have one; otherwise the name that pretraining would give it is returned.

    Raises:
        InputError: if the folder has neither. A path that is no folder is returned as it is, and checked when it is
            read.
    """
    path = Path(path)
    if path.is_file() or (path.suffix and not path.is_dir()):
        return path
    names = [name.format(suffix) for name in ENCODERS]
    for file in (folder / name for folder in (path / "models", path) for name in names):
        if file.is_file():
            return file
    if not required:
        return (path if path.name == "models" else path / "models") / names[0]
    raise InputError(
        f"{path}: no encoder in it ({' or '.join(names)}); run the pretraining first (python -m monai.bundle run "
        "--config_file bundles/pretrain/configs/train.json), download the bundle, or give another path; the quick "
        "start's encoder is found with its overlay, tiny"
    )


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a checkpoint that holds nothing but tensors.

    Neither can run code, and neither can hold more than its file does. If a JSON with a hash is beside the file, the
    hash is verified first; weights of a bundle must have one.

    Raises:
        InputError: if the file is missing, damaged, changed, or would need code to be read; if a weight is NaN or
            infinite; or if it is in a bundle's ``models`` without its JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights; run the pretraining first, download a bundle, or give another path")
    expected = read_record(path).get("sha256")
    if expected and expected != sha256_file(path):
        raise InputError(f"{path}: its SHA-256 is not that of {path.stem}.json; it was changed or cut: fetch it again")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_archive(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged weights ({error}); fetch them again") from error
    except DamagedArchiveError as error:
        raise InputError(
            f"{path}: not a file of plain weights: {error}. It is refused: fetch it again, or convert it to "
            "safetensors where it was made"
        ) from error
    for key in ("state_dict", "model", "network"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no state dict of tensors")
    wrong = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} of its {len(state)} weights hold NaN or infinite numbers ({wrong[0]} first): the "
            "training diverged; take the weights of another run or epoch"
        )
    # Without its JSON, a bundle's file could have been changed unseen.
    folder = path.absolute().parent
    if not expected and folder.name == "models" and (folder.parent / "configs" / "metadata.json").is_file():
        raise InputError(
            f"{path}: weights of a bundle, but no {path.stem}.json with their hash is beside them; fetch the "
            "whole bundle again"
        )
    return state


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON beside a file of weights (the same name with the suffix ``.json``); empty when there is none.

    Raises:
        InputError: if it is no JSON, or not an object.
    """
    record = Path(path).with_suffix(".json")
    content = read_json(record) if record.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{record}: not the record of {Path(path).name}; restore it from a copy")
    return content


def trained_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that weights were trained with, by id; empty where their record has none.

    An encoder's ``spacing`` is that of its global crops, which may be coarser than the volumes that they are taken from
    (``crops_96.json``); then ``volume_size`` is theirs too, since it has never seen the volumes themselves.
    """
    settings = dict((record.get("provenance") or {}).get("settings") or {})
    size, extent, spacing = (settings.get(name) for name in ("global_size", "global_extent_mm", "spacing"))
    if size and extent and spacing:
        seen = [side / count for side, count in zip(extent, size, strict=True)]
        if not is_spacing(seen, spacing):
            settings |= {"spacing": seen[0] if len({*seen}) == 1 else seen, "volume_size": size}
    return settings


def is_spacing(spacing: float | Sequence[float], other: float | Sequence[float]) -> bool:
    """Whether two spacings are the same, mm, each one number or three."""
    try:
        return bool(np.allclose(spacing, other, rtol=0, atol=1e-3))
    except (TypeError, ValueError):  # a text, or two numbers
        return False


def load_encoder(path: str | os.PathLike[str], spacing: Sequence[float] = ()) -> VoltaViT:
    """The network of an exported encoder, ready for inference: ``encode``, ``summarise``, ``attention_on_voxels``.

    Args:
        path: the ``.safetensors`` or ``.pt`` file, with its JSON beside it; or a bundle's folder, see
            ``find_encoder``.
        spacing: of the volumes that it will be given, mm; empty accepts any.

    Returns:
        The network, in evaluation mode, on the CPU. It takes volumes ``[B, 1, D, H, W]`` in [0, 1], RAS, whose sides
        its patch divides.

    Raises:
        InputError: if either is missing, damaged or changed, is no encoder, was trained at another spacing, or the
            JSON's sizes are not the weights'.
    """
    path = find_encoder(path)
    weights = read_weights(path)
    record = path.with_suffix(".json")
    content = read_json(record)
    config = content.get("network")
    trained = trained_settings(content)
    if len(spacing) and "spacing" in trained and not is_spacing(spacing, trained["spacing"]):
        raise InputError(
            f"{path}: an encoder that was trained at {trained['spacing']} mm, for volumes of {list(spacing)} mm; "
            f"prepare them with --spacing {trained['spacing']} (shape {trained.get('volume_size')}), or give another "
            "encoder"
        )
    if not isinstance(config, dict):
        raise InputError(f"{record}: has no network configuration; export the encoder again")
    if "class" in config:
        raise InputError(f"{path}: a trained {config['class']}, not an encoder; give the pretraining bundle's")
    try:
        inspect.signature(VoltaViT).bind(**config, decoder=False)
        _compare_sizes(config, weights, path)  # before memory is taken for a network of these sizes
        network = VoltaViT(**config, decoder=False)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{record}: not an encoder's configuration ({error}); export the encoder again") from error
    _fill(network, fit_cross_attention(weights, network), "", config, str(path))
    return network.eval()


def _compare_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a configuration of another network than the weights'."""
    width = weights["norm.bias"].numel() if "norm.bias" in weights else 0
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if rows := _other_sizes(config, {"hidden_size": width, "num_layers": len(blocks)}):
        raise InputError.many(
            f"{path.with_suffix('.json')} is of another network than {path.name} (name, JSON, weights)",
            rows,
            "Fetch both again, or export the encoder again.",
        )


def load_pretrained(
    module: nn.Module, path: str | os.PathLike[str], prefix: str = "", grid: tuple[int, ...] | None = None
) -> LoadReport:
    """Copy pretrained weights into a network, with the position embedding resampled to its token grid.

    Args:
        module: a ``VoltaViT``, a classifier, MONAI's ``ViTAutoEnc`` or ``UNETR``.
        path: exported encoder: a file, or a bundle's folder (see ``find_encoder``).
        prefix: where the encoder sits in ``module``: ``"vit."`` in a UNETR; ``""`` when it is the module itself.
        grid: token grid of the module's position embedding; found from ``img_size`` and ``patch_size`` by default.

    Returns:
        The report; it is also logged.

    Raises:
        InputError: if no weight matches, one has another shape, the encoder's number of blocks or heads is another, or
            a weight of the encoder is missing. Only a decoder and unused cross-attention may stay as they are.
    """
    path = find_encoder(path)
    weights = read_weights(path)
    config = read_record(path).get("network") or {}
    report = _fill(module, weights, prefix, config, str(path), grid)
    logger.info("%s", report)
    return report


def _fill(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    prefix: str,
    config: Mapping[str, Any],
    source: str,
    grid: tuple[int, ...] | None = None,
) -> LoadReport:
    own = module.state_dict()
    source_grid = tuple(size // patch for size, patch in zip(config.get("img_size", ()), config.get("patch_size", ())))
    report = LoadReport(source)
    new: dict[str, Tensor] = {}
    wrong = []
    owner_name = type(module).__name__
    for name, value in weights.items():
        key = prefix + name
        if key not in own:
            report.unused.append(name)
            continue
        fits = own[key].shape == value.shape
        if name == POSITION and own[key].shape[-1] == value.shape[-1]:
            # Compare grids, not sizes: 9x12x12 and 12x12x9 have as many tokens.
            start = source_grid or (() if fits else _cube(value.shape[1], source))
            target = grid or _module_grid(module, prefix) or (start if fits else _cube(own[key].shape[1], owner_name))
            if start and start != target:
                new[key] = resample_position_embedding(value, start, target)
                report.resampled.append(f"{key} {'x'.join(map(str, start))} -> {'x'.join(map(str, target))}")
                continue
        if fits:
            new[key] = value
            report.loaded.append(key)
        else:
            wrong.append((key, str(tuple(value.shape)), str(tuple(own[key].shape))))
    if wrong:
        raise InputError.many(
            f"{source}: weights of another size (name, file, network)",
            wrong,
            "Build the network with the sizes of the JSON beside the weights.",
        )
    report.missing = [key for key in own if key not in new]
    if not new:
        raise InputError(
            f"{source}: none of its {len(weights)} weights has a place in {owner_name} under the prefix "
            f"{prefix!r}; is it an encoder of this project, and the prefix right ('vit.' for UNETR)?"
        )
    _check_whole(module.get_submodule(prefix.rstrip(".")), config, {key.removeprefix(prefix) for key in new}, source)
    module.load_state_dict(new, strict=False)
    return report


def _check_whole(encoder: nn.Module, config: Mapping[str, Any], given: set[str], source: str) -> None:
    """Check that an encoder computes what the pretrained one does: every weight is given, and the heads are as many.

    Another number of heads changes what is computed, but the shape of no weight.

    Raises:
        InputError: otherwise.
    """
    blocks, summariser = getattr(encoder, "blocks", ()), getattr(encoder, "summariser", None)
    own = {
        "num_layers": len(blocks) or None,
        "num_heads": getattr(getattr(next(iter(blocks), None), "attn", None), "num_heads", None),
        "summary_heads": getattr(summariser, "num_heads", None),
    }
    if rows := _other_sizes(config, own):
        raise InputError.many(
            f"{source}: an encoder of another configuration (name, file, network)",
            rows,
            "Build the network as the JSON beside the weights says, or give another encoder.",
        )
    needed = {name for name in encoder.state_dict() if name.startswith(ENCODER)} - {*fit_cross_attention({}, encoder)}
    if lacking := sorted(needed - given):
        raise InputError.many(
            f"{source}: not a whole encoder: it lacks {len(lacking)} weights of the network's",
            [(name,) for name in lacking],
            "Build the network with the sizes of the JSON beside the weights, or export the encoder again.",
            limit=8,
        )


def _other_sizes(config: Mapping[str, Any], own: Mapping[str, int | None]) -> list[tuple[str, str, str]]:
    """Rows (name, there, here) of sizes that differ; one that either side does not have is left out."""
    return [
        (name, str(config[name]), str(size))
        for name, size in own.items()
        if size is not None and name in config and config[name] != size
    ]


def _module_grid(module: nn.Module, prefix: str) -> tuple[int, ...]:
    """Token grid of the encoder in a module; ``()`` where the module does not say."""
    for candidate in (module.get_submodule(prefix.rstrip(".")), module):
        size, patch = getattr(candidate, "img_size", None), getattr(candidate, "patch_size", None)
        if size is not None and patch is not None and len(size) == len(patch):
            return tuple(int(s) // int(p) for s, p in zip(size, patch))
        tokens = getattr(candidate, "feat_size", None)  # UNETR
        if tokens is not None:
            return tuple(int(count) for count in tokens)
    return ()


def _cube(count: int, what: str) -> tuple[int, ...]:
    side = round(count ** (1 / 3))
    if side**3 != count:
        raise InputError(f"{what}: the token grid of {count} position embeddings is not known; give it")
    return (side,) * 3
