# SPDX-License-Identifier: Apache-2.0
"""The report's section on the pretraining: curves, reconstructions and probes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from volta_components.errors import InputError
from volta_components.files import copy_file, read_json
from volta_components.inference.probes import interval_patients
from volta_components.report.figures import STYLE, Picture, write
from volta_components.report.statistics import Estimate
from volta_components.report.store import Store
from volta_components.report.tables import Table, cell, number

PANELS = {
    "losses": {"train/loss": "all", "train/loss_global": "global", "train/loss_patch": "patch"},
    "reconstruction error": {
        "train/loss_reconstruction": "training",
        "val/reconstruction": "held out",
        "val/mean_view": "mean volume",
    },
    "teacher's entropy, of ln K": {"train/global_teacher_entropy": "global", "train/patch_teacher_entropy": "patch"},
    "predicted, of ln K": {"train/global_predicted": "global", "train/patch_predicted": "patch"},
}
COLOURS = ("#0072b2", "#d55e00", "#009e73")
LAST = {
    "val/reconstruction": "held-out reconstruction error",
    "val/mean_view": "the same of the mean volume",
    "val/share_better": "share of volumes that are better than the mean volume",
    "train/effective_rank": "effective rank of the summaries",
}

PROBES = {"knn": "k-NN"}
MEASURES = {"auroc": "AUROC", "share": "share found", "r2": "R²"}


@dataclass
class Pretraining:
    """What is known of a pretraining.

    Attributes:
        name: of the run, or "".
        facts: name and value.
        pictures: figures.
        tables: of probes.
    """

    name: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def describe_pretraining(
    store: Store, folders: Sequence[Path], figures: Path, encoders: Collection[str]
) -> Pretraining | None:
    """Find the pretraining and draw it; None if there is none.

    Of several, it is the one that made the tasks' encoder, or else the newest finished one, or else the newest.

    Args:
        store: the tasks' store, which may hold the pretraining as well.
        folders: of the run (``mlruns.db``) and of its evaluation (``probes.json``).
        figures: folder of the report's figures.
        encoders: hashes of the encoders that the tasks started from.

    Raises:
        InputError: if a folder has neither.
    """
    result = Pretraining()
    stores = [store]
    for folder in folders:
        database, probes = folder / "mlruns.db", folder / "probes.json"
        if not database.is_file() and not probes.is_file():
            raise InputError(
                f"--pretraining {folder}: neither mlruns.db nor probes.json; give the folders of a pretraining's run "
                "and of its evaluation"
            )
        if database.is_file():
            stores.insert(0, Store(f"sqlite:///{database.resolve()}"))
        if probes.is_file():
            result.tables.append(_probe_table(read_json(probes)))
            if (picture := folder / "embeddings.png").is_file():
                caption = "Embeddings of the frozen encoder, two principal components."
                result.pictures.append(_copied(picture, figures, "pretraining_embeddings", "Embeddings", caption))
    for place in stores:
        found = [item for item in place.search("tags.bundle = 'pretrain'") if item.data.metrics]
        hashes = {item.info.run_id: _encoders_of(place, item) for item in found}
        wanted = {*encoders}
        if found:
            # The search's order is newest first, and max takes the first of equals.
            run = max(found, key=lambda item: (bool(hashes[item.info.run_id] & wanted), _has_finished(item)))
            _describe_run(result, place, run, figures)
            if wanted:
                is_theirs = bool(hashes[run.info.run_id] & wanted)
                said = ", ".join(sorted(value[:12] for value in wanted))
                result.facts["encoder"] = "the tasks'" if is_theirs else f"not the tasks', which started from {said}"
            break
    return result if result.name or result.tables else None


def _has_finished(run: Any) -> bool:
    return bool(run.info.status == "FINISHED")


def _encoders_of(store: Store, run: Any) -> set[str]:
    """Hashes of the encoders that a pretraining has exported, from the records that it logged."""
    folder = store.artifact(run.info.run_id, "encoder")
    return {read_json(path).get("sha256", "") for path in folder.glob("*.json")} if folder else set()


def _describe_run(result: Pretraining, store: Store, run: Any, figures: Path) -> None:
    result.name = str(run.info.run_name)
    tags, metrics = run.data.tags, run.data.metrics
    end = run.info.end_time or run.info.start_time
    hours = metrics.get("cost/hours", (end - run.info.start_time) / 3.6e6)
    memory = metrics.get("cost/peak_memory_gib")
    known = {
        "status": "finished" if _has_finished(run) else "failed" if run.info.status == "FAILED" else "not finished",
        "epochs": run.data.params.get("epochs"),
        "hours of training": number(hours, 2),
        "memory at the peak": "" if memory is None else f"{memory:.1f} GiB",
        **{label: number(metrics[name], 4) for name, label in LAST.items() if name in metrics},
        "hardware": tags.get("hardware"),
        "code": tags.get("code_version"),
        "command": tags.get("command"),
    }
    result.facts = {name: value for name, value in known.items() if value}
    curves = {
        title: {label: store.history(run.info.run_id, name) for name, label in lines.items() if name in metrics}
        for title, lines in PANELS.items()
    }
    curves = {title: lines for title, lines in curves.items() if lines}
    if curves:
        result.pictures.insert(0, _curves(curves, figures))
    pictures = store.artifact(run.info.run_id, "pictures")
    last = sorted(pictures.glob("*.png"))[-1:] if pictures else []
    for path in last:
        caption = f"After epoch {int(path.stem.rpartition('_')[2])}: one volume, what the student saw and restored."
        result.pictures.append(_copied(path, figures, "pretraining_reconstruction", "Reconstruction", caption))


def _curves(curves: Mapping[str, Mapping[str, list[tuple[int, float]]]], figures: Path) -> Picture:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(curves), 2.7))
        for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
                marker = "o" if len(points) < 15 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2, marker=marker, ms=3)
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="best")
    caption = (
        "Means of each epoch. Entropy: 1 is uniform, 0 a single prototype, 0.3 to 0.97 is healthy. Predicted: what the "
        "student tells of the teacher's targets; 0 when views agree on nothing."
    )
    return write(figure, figures, "pretraining_curves", "Curves", caption)


def _copied(source: Path, figures: Path, name: str, title: str, caption: str) -> Picture:
    copy_file(source, figures / f"{name}.png")
    with Image.open(source) as picture:
        inches = min(10.4, picture.width / 110)
    return Picture(figures / f"{name}.png", None, title, caption, inches)


def _probe_table(found: Sequence[dict[str, Any]]) -> Table:
    """What each probe finds in the encoder, in random weights and in plain voxels."""
    encoders = list(dict.fromkeys(row["encoder"] for row in found))
    names = {"volta": "VolTA-3D", "random": "random weights"}
    table = Table(
        name="pretraining_probes",
        title="What the frozen encoder knows",
        groups=[("", 4), ("value", len(encoders)), ("", 2)],
        columns=[
            *("question", "embedding", "probe", "measure"),
            *(names.get(name, name) for name in encoders),
            *("chance", "patients"),
        ],
        note="Probes of the frozen encoder, out of fold, with 95 % CI over patients; beside it, the same network with "
        "random weights, and plain voxels. The cohort should be hard to tell.",
    )
    texts = []
    for each in found:
        shown = Estimate(each["value"], low=each["low"], high=each["high"]).checked(interval_patients(each))
        table.numbers.append({**each, "low": shown.low, "high": shown.high})
        texts.append(cell(shown))
    named = table.frame.assign(text=texts)
    for keys, group in named.groupby(["label", "embedding", "probe", "measure"], sort=False):
        label, embedding, probe, measure = map(str, keys)
        row = [label, embedding, PROBES.get(probe, probe), MEASURES[measure]]
        row += [next(iter(group.loc[group["encoder"] == encoder, "text"]), "–") for encoder in encoders]
        table.add([*row, number(group["chance"].iloc[0]), str(group["patients"].max())])
    return table
