# SPDX-License-Identifier: Apache-2.0
"""Ids that a command gives a config. MONAI takes any: a misspelt one changes nothing, and 'false' counts as true."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from volta_components.errors import InputError
from volta_components.training.record import HARMLESS, callers, calling_config, flatten_settings
from volta_components.training.values import given_as_none, wrong_values

logger = logging.getLogger(__name__)

# What MONAI reads or adds, whether or not a file has it.
_TRACKING: Any = DEFAULT_MLFLOW_SETTINGS["configs"]
OF_MONAI = {ConfigParser.meta_key, "initialize", "run", "finalize", *_TRACKING}
SWITCHES = ("true", "false", "yes", "no")


def check_ids() -> None:
    """Refuse what a command gave the config in which this is called as an expression, and which cannot be used.

    That is an id that no file of the config has and nothing refers to, a text instead of a boolean, an ``init`` without
    its overlay, an overlay that a later one undoes, and a value of a wrong kind or out of range (``KINDS``).
    ``monai.bundle run`` names the files. A ``ConfigWorkflow`` made in Python does not keep their names: then every
    config beside the first one counts, and neither ``init`` nor the order of overlays is looked at.

    Raises:
        InputError: naming all of them.
    """
    config = calling_config("check_ids").get()
    files, are_named = _config_files()
    undone = undone_parts(files) if are_named else []
    values = wrong_values(config) + given_as_none(config)
    if rows := wrong_ids(config, files, are_named) + undone + values:
        raise InputError.many("the config cannot take what it was given", rows, "Nothing was read or trained.")


def wrong_ids(config: Mapping[str, Any], files: Sequence[Path], are_named: bool) -> list[tuple[str, str]]:
    """Rows (id, what is wrong with it and its remedy); see ``check_ids``."""
    own: dict[str, Any] = {}
    parts: set[str] = set()
    for path in files:
        for name, value in ConfigParser.load_config_file(path).items():
            words = re.split("#|::", name.lstrip("+"))
            own[words[0]] = value
            parts |= {f"{words[0]}#{part}" for part in (*words[1:2], *(value if isinstance(value, dict) else ()))}
    rows = []
    if files:
        place = ", ".join(path.name for path in files) if are_named else str(files[0].parent)
        known = own.keys() | parts | OF_MONAI | {*re.findall(r"@(\w+(?:#\w+)?)", str(config))}
        names = {*config, *(f"{group}#{part}" for group in config for part in _components(config[group]))}
        for name in sorted(names - known):
            group = name[: name.find("#") + 1]  # empty for an id of its own
            beside = [part.removeprefix(group) for part in (parts if group else own) if part.startswith(group)]
            close = difflib.get_close_matches(name.removeprefix(group), beside, n=1)
            hint = f"; did you mean --{group}{close[0]}?" if close else ""
            rows.append((f"--{name}", f"no such id in {place}{hint}"))
    given = {name: value for name, value in config.items() if name != ConfigParser.meta_key}
    for name, value in flatten_settings(given).items():
        if not isinstance(value, str) or value.startswith(("$", "@", "%")):
            continue
        if value.lower() in SWITCHES or isinstance(own.get(name), bool):
            rows.append((f"--{name.replace('.', '#')}", f"{value!r} is a text; write True or False"))
    init = config.get("init")
    if are_named and init != own.get("init", init):
        rows.append(("--init", f"it has the init {own['init']!r}; add configs/{init}.json to --config_file instead"))
    return rows


def undone_parts(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Rows (path, remedy) of what an overlay sets in a block that a later one replaces as a whole.

    A later value of the same id may be meant, as that of a smaller size: the log only names it.
    """
    overlays = [(path.name, _settings(path)) for path in files[1:]]
    rows = []
    for place, (name, content) in enumerate(overlays):
        for later, others in overlays[place + 1 :]:
            for key, value in content.items():
                if others.get(key, value) != value:
                    logger.warning("%s: %s has another value than %s, and is the later one", key, later, name)
                if block := next((other for other in others if key.startswith(f"{other}#")), None):
                    rows.append((f"{key} in {name}", f"{later} replaces {block}; name {later} before {name}"))
    return rows


def _settings(path: Path) -> dict[str, Any]:
    """What a file sets and can change a result; what it adds to (``+``) stays."""
    content = {name.replace("::", "#"): value for name, value in ConfigParser.load_config_file(path).items()}
    harmless = {"_desc_", *(name for names in HARMLESS.values() for name in names)}
    return {name: value for name, value in content.items() if name not in harmless and name[0] != "+"}


def _components(value: Any) -> list[str]:
    """The names in a group of components, such as ``train``; what MONAI builds itself may be given any argument."""
    is_group = isinstance(value, Mapping) and "_target_" not in value
    return (
        list(value)
        if is_group and any(isinstance(part, Mapping) and "_target_" in part for part in value.values())
        else []
    )


def _config_files() -> tuple[list[Path], bool]:
    """Files of the config whose ``initialize`` runs, and whether they are known by name; see ``check_ids``."""
    found: list[Path] = []
    for frame in callers():
        if frame.f_code.co_name == "create_workflow" and (given := frame.f_locals.get("config_file")):
            return [Path(given)] if isinstance(given, (str, Path)) else [Path(path) for path in given], True
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            found = sorted(workflow.config_root_path.glob("*.json"))
    return found, False
