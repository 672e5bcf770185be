# SPDX-License-Identifier: Apache-2.0
"""The model card of a packed bundle: a card's marked blocks give way to what is true of the packed weights.

A bundle's card speaks of the repository: of what can be trained, of the paper's sizes, of commands from its root.
Blocks between ``<!-- pack: NAME -->`` and ``<!-- end -->`` are where a folder that somebody downloads differs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.errors import InputError
from volta_components.files import read_json

BLOCK = re.compile(r"<!-- pack: (\w+) -->\n(.*?)<!-- end -->\n?", re.DOTALL)


HEADING = "## These weights"


# What a card must not say of weights that were trained on patients.
DENIAL = re.compile(r"no\s+weights\s+trained\s+on\s+clinical\s+data", re.IGNORECASE)


Lines = Iterator[str]


@dataclass(frozen=True)
class Card:
    """What the blocks of one packed bundle's card are made of.

    Attributes:
        folder: the packed bundle, with its configs and weights.
        bundle: name of the bundle's folder in the repository.
        overlays: names of the overlays that are merged into the configs.
        metadata: the packed ``metadata.json``.
        record: of the weights.
        more: further numbers: ``metrics.json`` of an evaluation, or ``probes.json``; otherwise None.
    """

    folder: Path
    bundle: str
    overlays: Sequence[str]
    metadata: Mapping[str, Any]
    record: Mapping[str, Any]
    more: Any = None

    @property
    def trained_on(self) -> str:
        """How many volumes of how many subjects of which cohort."""
        provenance = self.record["provenance"]
        cohort = provenance.get("cohort") or "a cohort that is not named"
        subjects = len(provenance.get("patient_ids", []))
        return f"{provenance.get('volumes', '?')} volumes of {subjects or '?'} subjects ({cohort})"

    def fill(self) -> None:
        """Write the card and the licence of the data.

        Raises:
            InputError: if they still deny what the record says.
        """
        path = self.folder / "docs" / "README.md"
        card = path.read_text(encoding="utf-8") if path.is_file() else f"# {self.metadata['name']}\n"
        blocks: dict[str, Callable[[str], Lines]] = {
            "weights": lambda _: self.weights(),
            "run": self.run,
            "network": self.network,
            "size": lambda _: self.size(),
            "recipe": lambda _: self.recipe(),
            "results": lambda _: self.results(),
            "limits": self.limits,
        }
        found = {match[1] for match in BLOCK.finditer(card)}
        if unknown := sorted(found - blocks.keys()):
            raise InputError(
                f"docs/README.md: nothing to put into block {', '.join(unknown)}; known: {', '.join(blocks)}"
            )
        filled = BLOCK.sub(lambda match: "\n".join(blocks[match[1]](match[2])).strip("\n") + "\n", card)
        filled = filled.replace(f"bundles/{self.bundle}/", "")
        if self.is_encoder:
            size = ",".join(map(str, self.inference["global_size"]))
            filled = re.sub(r'--input_shape "\[1,1,[\d,]+\]"', f'--input_shape "[1,1,{size}]"', filled)
        # Of a card without marks: what its reader must know all the same.
        own = [*(() if "weights" in found else (*self.weights(), "")), *self.provenance()]
        own += [] if "results" in found else ["", *self.results()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{filled.rstrip()}\n\n{HEADING}\n\n" + "\n".join(own).rstrip() + "\n", encoding="utf-8")
        licence = self.folder / "docs" / "data_license.txt"
        if licence.is_file():
            first, _, rest = licence.read_text(encoding="utf-8").partition("\n")
            licence.write_text(f"{first}\n\n" + "\n".join(self.licence()) + f"\n{rest}", encoding="utf-8")
        for text in (path, licence):
            if text.is_file() and not is_phantom(self.record) and DENIAL.search(text.read_text(encoding="utf-8")):
                raise InputError(
                    f"docs/{text.name}: says that no weights trained on clinical data are there, but these are trained "
                    f"on {self.trained_on}; mend it, or put the sentence into the block <!-- pack: weights -->"
                )

    @property
    def inference(self) -> dict[str, Any]:
        """The packed inference config."""
        content: dict[str, Any] = read_json(self.folder / "configs" / "inference.json")
        return content

    @property
    def is_encoder(self) -> bool:
        """Whether the bundle gives features, not a task's answer."""
        return next(iter(self.metadata["network_data_format"]["outputs"].values()))["format"] == "features"

    # --- blocks ------------------------------------------------------------------------------------------------------

    def weights(self) -> Lines:
        """What the weights are, in two sentences."""
        if is_phantom(self.record):
            yield f"**These weights are trained on phantoms (synthetic heads): {self.trained_on}.** They show that the"
            yield "pipeline works, and nothing about patients."
        else:
            yield f"**These weights are trained on {self.trained_on}.** Where they come from and how they were"
            yield "scored is below."

    def run(self, original: str) -> Lines:
        """Commands from inside the bundle's folder, and the overlays that are in it."""
        init = self.record.get("tags", {}).get("init", "volta")
        shape = ",".join(map(str, self.inference["volume_size"]))
        yield "From this folder, with the package `volta_components` installed. DATA is a data set, prepared with"
        yield f"`volta3d prepare --spacing {self.inference['spacing']:g} --shape {shape}`. Score these weights on it:"
        yield ""
        yield "```"
        if self.is_encoder:
            yield "python -m monai.bundle run --config_file configs/evaluate.json --dataset_dir DATA"
        else:
            yield "python -m monai.bundle run --config_file \"['configs/train.json','configs/evaluate.json']\" \\"
            yield "    --fold '$None' --dataset_dir DATA"
        yield "```"
        yield ""
        yield "Train others in the same way, which are written to `retrained` so that these stay:"
        yield ""
        yield "```"
        encoder = "" if self.is_encoder or init != "volta" else " --encoder_path ENCODER"
        yield "python -m monai.bundle run --config_file configs/train.json --ckpt_dir retrained \\"
        yield f"    --dataset_dir DATA{encoder}"
        yield "```"
        if encoder:
            yield ""
            yield "ENCODER is the file of a pretrained encoder: `models/model.pt` of a pretraining bundle."
        yield ""
        yield self.merged()
        yield "Of the overlays in `configs`, name one after `train.json`; each changes one thing:"
        yield ""
        configs = {path.name for path in (self.folder / "configs").glob("*.json")}
        for line in original.splitlines():
            name = re.match(r"\| `([\w.]+\.json)` \|", line)
            if line.startswith("|") and (name is None or name[1] in configs):
                yield line

    def merged(self) -> str:
        """Which overlays are in the configs."""
        if not self.overlays:
            return "No overlay is merged into these configs."
        names = ", ".join(f"`{name}`" for name in self.overlays)
        return f"Merged into these configs, as the weights need them: {names}."

    def network(self, original: str) -> Lines:
        """The card's own words where they are of the packed network's class."""
        name = self.record.get("network", {}).get("class", "")
        if not name or f"`{name}`" in original:
            yield original
        else:
            yield f"`{name}`, a baseline of the benchmark: `network_def` in `configs/inference.json`."

    def size(self) -> Lines:
        """Sizes of the packed network, from the weights' record and the packed configs."""
        network, inference = self.record.get("network", {}), self.inference
        config = network.get("config", {}) if "class" in network else network
        image, pred = (
            next(iter(self.metadata["network_data_format"][side].values())) for side in ("inputs", "outputs")
        )
        yield "| | |"
        yield "|---|---|"
        sizes = ", ".join(f"`{name}` {value}" for name, value in config.items() if isinstance(value, int))
        yield f"| network | {network.get('class', 'VoltaViT')}{': ' if sizes else ''}{sizes} |"
        yield f"| parameters | {self.record['parameters']:,} |"
        yield f"| prepared volumes | {_sides(inference['volume_size'])} at {inference['spacing']:g} mm |"
        yield f"| input | {_sides(image['spatial_shape'])} voxels of {voxel_mm(inference)} mm, one channel |"
        if "input_extent_mm" in inference:
            yield f"| window | {_sides(inference['input_extent_mm'])} mm |"
        yield f"| output | {pred['num_channels']} {'features' if self.is_encoder else 'classes'} |"

    def recipe(self) -> Lines:
        """What the recipe has to do with these weights."""
        yield "The recipe of the repository's `configs/train.json`, without overlays. What these weights were trained"
        yield "with is in the table of settings at the end; where the two differ, the table holds."
        yield self.merged()

    def results(self) -> Lines:
        """Numbers of the training run, and of later evaluations."""
        metrics, intervals = self.record.get("metrics", {}), self.record.get("intervals", {})
        if metrics:
            scored = self.record.get("subjects", {}).get("scored")
            yield f"Scored on the held-out fold{f' ({scored} scans)' if scored else ''}, by the training run itself:"
            yield ""
            yield from _metric_table(metrics, intervals)
            if any(name.startswith("optimistic_") for name in metrics):
                yield ""
                yield "`optimistic_*` numbers were chosen on the very scans that they score."
        if isinstance(self.more, Mapping):
            yield ""
            leak = "" if self.more.get("leak") == "none" else "; **patients whom it was trained on may be among them**"
            yield f"Scored again, {self.more.get('scored', '?')} scans{leak}:"
            yield ""
            yield from _metric_table(*_with_intervals(self.more.get("metrics", {})))
        elif isinstance(self.more, list):
            yield ""
            honest = all(row.get("leak") == "none" for row in self.more)
            leak = "" if honest else "; **patients whom it was pretrained on may be among them**"
            yield f"Probes of the frozen encoder, out of fold{leak}:"
            yield ""
            yield "| label | encoder | embedding | probe | subjects | AUROC | 95 % interval |"
            yield "|---|---|---|---|---|---|---|"
            for row in self.more:
                yield (
                    f"| {row['label']} | {row['encoder']} | {row['embedding']} | {row['probe']} | {row['subjects']} | "
                    f"{row['auroc']:.3f} | {row['auroc_low']:.3f} to {row['auroc_high']:.3f} |"
                )
        if not metrics and self.more is None:
            yield "Not scored: `volta3d pack --metrics FILE` puts numbers here."
        elif is_phantom(self.record):
            yield ""
            yield "Of phantoms only."

    def limits(self, original: str) -> Lines:
        """The card's own limits are those of the task's data set."""
        if is_phantom(self.record):
            yield "Trained on phantoms: of no use for scans of people but to try the software. Not a medical device."
        else:
            yield f"These weights were trained on {self.trained_on}, whose limits hold besides. What follows is of"
            yield "the task's own data set."
            yield ""
            yield original

    def licence(self) -> Lines:
        """The paragraph on the weights in the licence of the data."""
        if is_phantom(self.record):
            yield f"The weights in this bundle are trained on phantoms: {self.trained_on}."
        else:
            yield f"The weights in this bundle are trained on {self.trained_on}."
            yield "The terms of that data may apply to them."

    def provenance(self) -> Lines:
        """Where the weights come from, as tables."""
        record, origin = self.record, self.record["provenance"]
        settings = dict(origin["settings"])
        version = self.metadata["version"]
        yield f"`{self.folder.name}` {version}, made by `volta3d pack` from the bundle `{self.bundle}`."
        yield ""
        yield "| | |"
        yield "|---|---|"
        yield f"| trained on | {self.trained_on} |"
        if counts := record.get("subjects", {}):
            yield f"| split | {', '.join(f'{count} {part}' for part, count in counts.items())} |"
        yield f"| datalist hash | `{origin['datalist_hash']}` |"
        yield f"| overlays | {', '.join(f'`{name}`' for name in self.overlays) or 'none'} |"
        yield f"| code | volta_components {origin['code_version']} |"
        versions = ", ".join(
            f"{name} {origin[key]}"
            for name, key in (("torch", "torch_version"), ("MONAI", "monai_version"), ("Python", "python_version"))
            if origin.get(key)
        )
        yield f"| trained with | {versions or '-'} |"
        yield f"| seed | {settings.get('seed', '-')} |"
        yield f"| epochs | {record.get('epoch') or origin.get('epochs') or settings.get('epochs', '-')} |"
        if tags := record.get("tags", {}):
            yield f"| init, fold, fraction | {tags.get('init')}, {tags.get('fold')}, {tags.get('fraction')} |"
            yield f"| encoder | `{tags.get('encoder_sha256') or 'none (from scratch)'}` |"
            if (keys := (record.get("pretraining") or {}).get("patient_ids")) is not None:
                yield f"| pretrained on | {len(keys)} subjects |"
            leak = "no" if tags.get("leak") == "none" else "yes, or not known"
            yield f"| pretrained on any scored patient | {leak} |"
        if started := record.get("started_from"):
            yield f"| started from | `{started.get('sha256', '?')}` |"
        yield f"| parameters | {record['parameters']:,} |"
        yield ""
        yield "Settings, and what the packed `configs/train.json` has in their place where it differs:"
        yield ""
        yield "| id | trained with | `train.json` |"
        yield "|---|---|---|"
        others = other_settings(self.folder, record)
        for name, value in settings.items():
            yield f"| `{name}` | {_code(value)} | {_code(others[name]) if name in others else ''} |"
        yield ""
        yield "The same and hashed ids of the subjects are in `models/model.json`, so that a later user can make sure"
        yield "to score nobody whom the weights were trained on (SHA-256 of the id; who knows an id can look it up)."
        yield ""
        yield f"Intended use: {self.metadata.get('intended_use', '-')}"


def other_settings(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training that a packed ``train.json`` has otherwise, as it has them.

    Told from what needs no data: plain ids, and losses and intensity changes, which settings describe.

    Args:
        folder: the packed bundle.
        record: of the weights.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "train.json"))
    config = parser.get()
    own = config.get("settings", {})
    found = {}
    for name, value in record["provenance"]["settings"].items():
        packed = config.get(name, value)
        if "describe(" in str(own.get(name)):
            packed = json.loads(json.dumps(parser.get_parsed_content(f"settings#{name}")))
        is_plain = not isinstance(packed, str) or not packed.startswith(("$", "@"))
        if is_plain and packed != value:
            found[name] = packed
    return found


def is_phantom(record: Mapping[str, Any]) -> bool:
    """Whether weights were trained on phantoms, by their record."""
    tags, cohort = record.get("tags") or {}, str(record.get("provenance", {}).get("cohort", ""))
    return tags["phantom"] == "true" if "phantom" in tags else "phantom" in cohort.lower()


def voxel_mm(inference: Mapping[str, Any]) -> str:
    """Sides of a voxel of the network's input, by an inference config: one number where all are the same."""
    spacing = float(inference["spacing"])
    extent = inference.get("input_extent_mm")
    voxels = [spacing] if extent is None else [mm / size for mm, size in zip(extent, inference["image_size"])]
    return _sides([f"{side:g}" for side in (voxels[:1] if len({*voxels}) == 1 else voxels)])


def _code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _sides(sides: Sequence[Any]) -> str:
    return " x ".join(map(str, sides))


def _with_intervals(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Numbers of an evaluation, ``NAME_low`` and ``NAME_high`` taken together with ``NAME``."""
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    intervals = {
        name: (metrics[f"{name}_low"], metrics[f"{name}_high"])
        for name in metrics
        if f"{name}_low" in metrics and f"{name}_high" in metrics
    }
    return {name: value for name, value in metrics.items() if name not in ends}, intervals


def _metric_table(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> Lines:
    yield "| metric | value | 95 % interval |"
    yield "|---|---|---|"
    for name, value in metrics.items():
        ends = intervals.get(name)
        shown = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends and all(map(math.isfinite, ends)) else ""
        yield f"| {name} | {value:.4g} | {shown} |"
