# SPDX-License-Identifier: Apache-2.0
"""What a run was made from: settings, code version, data."""

from __future__ import annotations

import functools
import inspect
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import monai
import torch
from monai.bundle import ConfigParser

from volta_components._version import __version__
from volta_components.data.identity import are_phantoms
from volta_components.distributed import process_count
from volta_components.errors import InputError
from volta_components.files import sha256_json
from volta_components.training.people import facts_of

# Ids that may differ when a run is resumed, each group with the reason. Every other id of a config is compared.
# A checkpoint may hold one of them from before it was listed here: it is not compared either.
HARMLESS: dict[str, tuple[str, ...]] = {
    "Names and places. What lies there counts: the hash of the datalist, of the encoder and, of a scan, its file.": (
        *("bundle_root", "run_name", "experiment_name", "output_dir", "ckpt_dir", "model_path", "suffix"),
        *("dataset_dir", "datalist_path", "anatomies", "encoder_path", "encoder", "source"),
    ),
    "Where and how fast it is computed. The same samples are drawn, in the same order.": (
        *("device", "num_workers", "cache", "compile_blocks", "views_together"),
        "train#trainer#cuda_graph",
    ),
    "What is looked at, and how often.": (
        *("check_volumes", "deep_check", "checkpoint_minutes", "picture_interval", "log_interval"),
        *("show_all_below", "collapse_grace_epochs", "collapse_patience_epochs"),
    ),
    "Checks that end a run or let it pass. Whether patients have leaked is a tag of the run.": (
        *("allow_leak", "accept_look_alikes", "checks"),
    ),
    "What follows from other ids, and is written beside the results.": ("tags", "record", "settings"),
    "What comes before and after the training, and MONAI's own metadata.": ("initialize", "finalize", "_meta_"),
    "What MONAI adds for its tracking.": ("tracking_uri", "save_execute_config", "is_not_rank0"),
}
_HARMLESS_NAMES = {name.replace("#", ".") for names in HARMLESS.values() for name in names}  # dotted as in settings

# Handlers that only watch: with or without them, the weights are the same.
WATCHING = ("StatsHandler", "ProgressBar", "MLFlowHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler")

# Blocks that say how a run is carried out. Their numbers are ids at the top of a config.
WORKFLOW = ("imports", "datalist", "train", "validate", "score", "results", "run")


def run_settings(**facts: Any) -> dict[str, Any]:
    """Return what the run of a config is: everything that its result depends on. For an expression in the config.

    These are all ids of the merged config, except for the ``HARMLESS`` ones. Nothing has to be listed in the config, so
    nothing can be forgotten.

    Args:
        facts: what the text of the config does not say, such as the datalist's hash; and values of expressions, by id.

    Returns:
        Values by id; the number of ``processes``; and under ``config`` the rest: references, expressions, and how the
        run is carried out.
    """
    settings = settings_of(calling_config("run_settings").get())
    rest = {name: value for name, value in settings.pop("config").items() if name not in facts}
    return {**settings, "processes": process_count(), **plain_settings(facts), "config": rest}


def calling_config(caller: str) -> ConfigParser:
    """The config with the expression that is being evaluated, which calls the function ``caller``.

    MONAI gives expressions no access to the config that they stand in, so the parser is looked for among the callers.
    """
    parser = find_calling_config()
    if parser is None:
        raise RuntimeError(f"{caller} must be called by an expression in a config")
    return parser


def find_calling_config() -> ConfigParser | None:
    """As ``calling_config``; None where no expression is being evaluated."""
    parsers = (frame.f_locals.get("self") for frame in callers())
    return next((parser for parser in parsers if isinstance(parser, ConfigParser)), None)


def callers() -> Iterator[FrameType]:
    """Frames of the functions that are running, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a merged config says of a run, without following its expressions; see ``run_settings``."""
    values: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in config.items():
        if name in _HARMLESS_NAMES or name == "_desc_":
            continue
        for _ in config:  # a reference to an id counts as the value of that id
            if not isinstance(value, str) or value[1:] not in config or value[0] != "@":
                break
            value = config[value[1:]]
        for path, leaf in flatten_settings({name: _without_watchers(value)}).items():
            if path in _HARMLESS_NAMES:
                continue
            is_text = isinstance(leaf, str) and leaf.startswith(("@", "$", "%"))
            (rest if is_text or name in WORKFLOW else values)[path] = leaf
    return {**values, "config": rest}


def _without_watchers(block: Any) -> Any:
    """A block without comments and watching handlers; data is named by its hash."""
    if isinstance(block, Mapping):
        named = {"class" if key == "_target_" else key: value for key, value in block.items() if key != "_desc_"}
        if "class" in named:
            named["class"] = _class_name(str(named["class"]))
        return {key: _without_watchers(value) for key, value in named.items()}
    if not isinstance(block, list):
        return block
    items = [_without_watchers(item) for item in block]
    if not any(isinstance(item, Mapping) for item in items):
        return items
    if any(isinstance(item, Mapping) and "class" not in item for item in items):
        return sha256_json(items)
    kept = [item for item in items if not isinstance(item, Mapping) or item["class"].rpartition(".")[2] not in WATCHING]
    return {str(place): item for place, item in enumerate(kept)}


def _class_name(target: str) -> str:
    """A class of this package without its module, which may move; any other one in full."""
    return target.rpartition(".")[2] if target.startswith("volta_components.") else target


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for people, such as MLflow's parameters: of ``config``, only the first digits of its hash."""
    plain: dict[str, Any] = flatten_settings(plain_settings({k: v for k, v in settings.items() if k != "config"}))
    return plain | ({"config": sha256_json(settings["config"])[:12]} if "config" in settings else {})


def other_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (name, there, here) of the settings that differ."""
    there, here = flatten_settings(there), flatten_settings(here)
    absent = object()  # which is not the same as null
    names = sorted(n for n in there.keys() | here.keys() if there.get(n, absent) != here.get(n, absent))
    rows = [(name.removeprefix("config."), str(there.get(name)), str(here.get(name))) for name in names]
    return [row for row in rows if row[0] not in _HARMLESS_NAMES]


def check_settings(there: Mapping[str, Any], here: Mapping[str, Any], reason: str, remains: str) -> None:
    """Refuse to resume a run with other settings.

    Args:
        there: those of the run.
        here: those of the command.
        reason: what is said of them, and where; a list of name, there and here follows.
        remains: what to remove of the run to start again.

    Raises:
        InputError: listing the settings that differ.
    """
    if rows := other_settings(there, here):
        names = "--run_name NAME; --suffix _NAME, if its weights shall have a name of their own too"
        remedy = f"Choose another run_name ({names}), or remove {remains} to start again."
        raise InputError.many(reason, rows, remedy)


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, so that only the differing lines of a block are shown."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= (
            flatten_settings(value, f"{prefix}{name}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{name}": value}
        )
    return result


def plain_settings(value: Any) -> Any:
    """Settings as types that a ``weights_only`` checkpoint can hold, and JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain_settings(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_settings(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@functools.cache
def code_version() -> str:
    """Version of this package, with the commit where it runs from a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


def provenance(
    settings: Mapping[str, Any], datalist_hash: str, items: Iterable[Mapping[str, Any]], cohort: str = ""
) -> dict[str, Any]:
    """How a result was obtained, which patients it must not be scored on, and whether all of them are phantoms."""
    items = list(items)
    return {
        "settings": shown_settings(settings),
        "cohort": cohort,
        "phantom": are_phantoms(items, cohort),
        "volumes": len(items),
        "datalist_hash": datalist_hash,
        **facts_of(items),
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "monai_version": monai.__version__,
        "python_version": platform.python_version(),
    }
