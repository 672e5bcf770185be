# SPDX-License-Identifier: Apache-2.0
"""The model card of a packed bundle: a card's marked blocks give way to what is true of the packed weights.

A bundle's card speaks of the repository: what can be trained, the paper's sizes, commands from its root. Blocks between
``<!-- pack: NAME -->`` and ``<!-- end -->`` are where a folder that somebody downloads differs; the block of that name
in ``templates/card.md.jinja`` replaces them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file
from volta_components.templates import template_environment

BLOCK = re.compile(r"<!-- pack: (\w+) -->\n(.*?)<!-- end -->\n?", re.DOTALL)
# Blocks that replace a marked one; the others of the template have places of their own.
MARKED = ("weights", "run", "network", "size", "recipe", "results", "hardware", "limits")
HEADING = "## These weights"
PICTURE = "weights.png"  # in docs: what the training's last picture shows
# What card, licence and metadata must not say of weights that were trained on patients. Packed bundles of phantoms say
# all but the first, and may be trained further.
DENIAL = re.compile(
    r"no\s+weights\s+trained\s+on\s+clinical\s+data|weights\s+(in\s+this\s+bundle\s+)?are\s+trained\s+on\s+phantoms"
    r"|trained\s+on\s+synthetic\s+heads",
    re.IGNORECASE,
)


def fill_card(folder: Path, bundle: str, overlays: Sequence[str], later: Any) -> None:
    """Write the card of the packed bundle in ``folder``, whose other files are there, and the licence of the data.

    ``overlays`` are merged into the configs; ``later`` has further numbers, ``metrics.json`` of an evaluation or
    ``probes.json``.

    Raises:
        InputError: if the card has a block that nobody fills, or card or licence still deny what the record says.
    """
    facts = _facts(folder, bundle, overlays, later)
    environment = template_environment("volta_components.sharing")
    environment.filters |= {"interval": _interval, "code": _code, "packed_rows": _packed_rows(folder)}
    parts = environment.get_template("card.md.jinja").make_module(facts)

    def part(name: str, original: str = "") -> str:
        return str(getattr(parts, name)(original.strip("\n"))).strip("\n")

    def replacement(match: re.Match[str]) -> str:
        name, original = match[1], match[2]
        # The card's own words hold where they are of the packed network's class.
        keep = name == "network" and (not facts["network_class"] or f"`{facts['network_class']}`" in original)
        return (original.strip("\n") if keep else part(name, original)) + "\n"

    path = folder / "docs" / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else f"# {facts['metadata']['name']}\n"
    found = {match[1] for match in BLOCK.finditer(card)}
    if unknown := sorted(found - {*MARKED}):
        raise InputError(f"docs/README.md: nothing to put into block {', '.join(unknown)}; known: {', '.join(MARKED)}")
    filled = BLOCK.sub(replacement, card).replace(f"bundles/{bundle}/", "")
    if facts["is_encoder"]:
        size = ",".join(map(str, facts["inference"]["global_size"]))
        filled = re.sub(r'--input_shape "\[1,1,[\d,]+\]"', f'--input_shape "[1,1,{size}]"', filled)
    # Of a card without marks: what its reader must know all the same.
    own = [name for name in ("weights", "provenance", "results") if name == "provenance" or name not in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([filled.rstrip(), HEADING, *map(part, own)]) + "\n", encoding="utf-8")
    licence = folder / "docs" / "data_license.txt"
    if licence.is_file():
        first, _, rest = licence.read_text(encoding="utf-8").partition("\n")
        licence.write_text(f"{first}\n\n{part('licence')}\n{rest}", encoding="utf-8")
    for text in (path, licence, folder / "configs" / "metadata.json"):
        if facts["phantom"] or not text.is_file():
            continue
        if denial := DENIAL.search(text.read_text(encoding="utf-8")):
            raise InputError(
                f"{text.relative_to(folder)}: says {' '.join(denial[0].split())!r}, but these are trained on "
                f"{facts['trained_on']}; correct it, or put the sentence into the block <!-- pack: weights -->. Of a "
                "packed bundle that was trained further, pack the bundle that it was made from: --bundle ORIGINAL "
                "--model FILE"
            )


def copy_picture(weights: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Copy the picture beside the weights, if it is theirs, for the card; one that shows people stays in the lab."""
    picture, about = weights.with_suffix(".png"), record.get("picture") or {}
    if not picture.is_file() or about.get("sha256") != sha256_file(picture):
        return
    if about["shows_scans"] and not is_phantom(record):
        print(f"{picture}: left out, because it shows scans of people")
    else:
        (folder / "docs").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "docs" / PICTURE)


def _facts(folder: Path, bundle: str, overlays: Sequence[str], later: Any) -> dict[str, Any]:
    """What the blocks are made of."""
    metadata, record = read_json(folder / "configs" / "metadata.json"), read_json(folder / "models" / "model.json")
    versions = dict.fromkeys(("torch_version", "monai_version", "python_version"), "?")
    origin: dict[str, Any] = {**versions, "epochs": None, "sealed_with": None, **record["provenance"]}
    network = record.get("network", {})
    # The record of an encoder has its sizes without a class.
    sizes = network.get("config", {}) if "class" in network else network
    inference = read_json(folder / "configs" / "inference.json")
    formats = metadata["network_data_format"]
    image, pred = (next(iter(formats[side].values())) for side in ("inputs", "outputs"))
    metrics, tags = record.get("metrics", {}), record.get("tags", {})
    is_encoder = pred["format"] == "features"
    pretrained_on = (record.get("pretraining") or {}).get("patient_ids")
    subjects = len(origin.get("patient_ids", [])) or "?"
    return {
        "name": folder.name,
        "bundle": bundle,
        "overlays": list(overlays),
        "metadata": metadata,
        "inference": {"input_extent_mm": None, **inference},
        "record": {"intervals": {}, "subjects": {}, "epoch": None, "started_from": None, **record}
        | {"metrics": metrics, "tags": tags},
        "origin": origin,
        "trained_on": f"{origin.get('volumes', '?')} volumes of {subjects} subjects "
        f"({origin.get('cohort') or 'a cohort that is not named'})",
        "phantom": is_phantom(record),
        "is_encoder": is_encoder,
        "needs_encoder": not is_encoder and tags.get("init", "volta") == "volta",
        "network_class": network.get("class", ""),
        "sizes": ", ".join(f"`{name}` {value}" for name, value in sizes.items() if isinstance(value, int)),
        "image": image,
        "pred": pred,
        "voxel_mm": voxel_mm(inference),
        "optimistic": any(name.startswith("optimistic_") for name in metrics),
        "later": _with_intervals(later) if isinstance(later, Mapping) else None,
        "probes": _believable(later) if isinstance(later, list) else None,
        "pretrained_on": None if pretrained_on is None else len(pretrained_on),
        "others": other_settings(folder, record),
        "cost": record.get("cost") or {},
        "picture": PICTURE if (folder / "docs" / PICTURE).is_file() else "",
    }


def check_numbers(path: str | os.PathLike[str], numbers: Any, weights: Path, hashes: set[str]) -> None:
    """Make sure that numbers for a card say that they are of its weights, whose file has one of the hashes.

    Raises:
        InputError: naming the file of the numbers.
    """
    rows = numbers if isinstance(numbers, list) and numbers else [numbers]
    scored = {str(row.get("model_sha256") or "") if isinstance(row, Mapping) else "" for row in rows}
    if "" in scored:
        raise InputError(f"{path}: no model_sha256; give metrics.json or probes.json, as evaluate.json writes it now")
    if others := sorted(scored - hashes):
        raise InputError(f"{path}: numbers of another model ({others[0][:8]}...) than {weights}; score this one again")


def _packed_rows(folder: Path) -> Callable[[str], str]:
    """A filter of a card's table of overlays: only the rows of those that are in the packed folder."""

    def keep(original: str) -> str:
        names = [(line, re.match(r"\| `([\w.]+\.json)` \|", line)) for line in original.splitlines()]
        rows = [line for line, name in names if name is None or (folder / "configs" / name[1]).is_file()]
        return "\n".join(line for line in rows if line.startswith("|"))

    return keep


def other_settings(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training that a packed ``train.json`` has otherwise, as it has them; expressions need the data."""
    # Here, since it imports torch: help and mistakes should not wait for it.
    from volta_components.training.record import settings_of

    packed = settings_of(read_json(folder / "configs" / "train.json"))
    expressions = packed.pop("config")
    blocks = {name.partition(".")[0] for name in (*packed, *expressions) if "." in name}
    found: dict[str, Any] = {}
    for name, value in record["provenance"]["settings"].items():
        parts = name.split(".")
        # Of a part of a block that is not there, such as an optional loss, what holds it has a value, or nothing has.
        places = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        known = next((place for place in places if place in packed), "")
        is_comparable = known or (parts[0] in blocks and name not in expressions)
        if is_comparable and packed.get(known) != value:
            found[name] = packed.get(known)
    return found


def is_phantom(record: Mapping[str, Any]) -> bool:
    """Whether weights were trained and pretrained on phantoms alone; if their record does not say so, they were not."""
    pretraining, tags = record.get("pretraining") or {}, record.get("tags") or {}
    is_pretrained = pretraining.get("encoder_sha256") or tags.get("encoder_sha256")
    parts = [record.get("provenance") or {}, *([pretraining] if is_pretrained else [])]
    return all(part.get("phantom") is True for part in parts)


def voxel_mm(inference: Mapping[str, Any]) -> str:
    """Sides of a voxel of the network's input, by an inference config: one number where all are the same."""
    spacing, extent = inference["spacing"], inference.get("input_extent_mm")
    voxels = [float(side) for side in (spacing if isinstance(spacing, list) else [spacing])]
    if extent is not None:
        voxels = [mm / size for mm, size in zip(extent, inference["image_size"])]
    return " x ".join(f"{side:g}" for side in (voxels[:1] if len({*voxels}) == 1 else voxels))


def _code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if all(map(math.isfinite, ends)) else ""


def _believable(probes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``probes.json`` without the intervals that rest on too few patients."""
    # Here, since they import torch.
    from volta_components.downstream.metrics import is_believable
    from volta_components.inference.probes import interval_patients

    none = {"low": math.nan, "high": math.nan}
    return [
        {**row, **({} if is_believable(row["low"], row["high"], interval_patients(row)) else none)} for row in probes
    ]


def _with_intervals(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's ``metrics.json``, ``NAME_low`` and ``NAME_high`` taken together as the interval of ``NAME``."""
    metrics: dict[str, float] = dict(evaluation.get("metrics", {}))
    named = [name for name in metrics if f"{name}_low" in metrics and f"{name}_high" in metrics]
    intervals = {name: (metrics.pop(f"{name}_low"), metrics.pop(f"{name}_high")) for name in named}
    return {"leak": "not known", "scored": "?", **evaluation, "metrics": metrics, "intervals": intervals}
