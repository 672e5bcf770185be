# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle's results: scores of a fold, masks, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from volta_components.data.items import item_name
from volta_components.data.nifti import write_label_map, write_picture_volume
from volta_components.data.volumes import read_header, read_volume
from volta_components.distributed import process_rank
from volta_components.downstream.leaks import check_model
from volta_components.downstream.metrics import score_intervals, score_mask, summarise_scores
from volta_components.downstream.pictures import write_overlay
from volta_components.downstream.results import PICTURE, PICTURES, FoldResults, ItemRows, Results, with_limits
from volta_components.downstream.splits import Item, counted
from volta_components.files import write_csv
from volta_components.training.cost import training_cost
from volta_components.training.keep_best import KeepBest

SHOWN = ("image", "label")


class FloatWindowInferer(SlidingWindowInferer):
    """``SlidingWindowInferer`` that weights and adds up the windows' logits in float32, in mixed precision as well.

    MONAI's multiplies each window by its weights in the network's own type: rounded to bfloat16, the logits of two
    classes are often equal, and the background wins.

    Args:
        mirrored: average logits with those of the mirror image, whose left and right (classes 1 and 2) are exchanged.
        arguments: see ``SlidingWindowInferer``.
    """

    def __init__(self, *arguments: Any, mirrored: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.mirrored = mirrored

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Logits of whole volumes ``[B, C, D, H, W]``; see ``SlidingWindowInferer``."""

        def in_float32(*arguments: Any, **keywords: Any) -> Tensor:
            return network(*arguments, **keywords).float()

        logits: Any = super().__call__(inputs, in_float32, *args, **kwargs)
        if not self.mirrored:
            return logits
        other: Any = super().__call__(inputs.flip(2), in_float32, *args, **kwargs)
        return (logits + other.flip(2)[:, [0, 2, 1]]) / 2


class MaskTable(ItemRows):
    """Scores what an evaluator predicts, scan by scan, over all processes; writes masks where asked to.

    It only does so in ``score``, so that the evaluations during training, for which Dice suffices, stay cheap.
    """

    active = False
    folder: Path | None = None

    def _iteration_completed(self, engine: Any) -> None:
        if self.active:
            super()._iteration_completed(engine)

    def batch_rows(self, output: Mapping[str, Any], items: Sequence[Item]) -> Iterator[dict[str, float]]:
        """See ``score_mask``."""
        masks = output["pred"].argmax(dim=1).to(torch.uint8).cpu().numpy()
        truths = output["label"][:, 0].to(torch.uint8).cpu().numpy()
        for item, mask, truth in zip(items, masks, truths, strict=True):
            header = read_header(item["image"])
            if self.folder is not None:
                write_label_map(self.folder / f"{item_name(item)}.nii.gz", mask, header.affine)
            yield score_mask(mask, truth, header.spacing)

    def score(self, evaluator: Any, folder: Path | None = None) -> list[dict[str, float]]:
        """Run an evaluator that this table is attached to; a row for each item, in their order (see ``score_mask``).

        Masks are written to the folder, if there is one, as ``<subject_id>_<session>.nii.gz``.
        """
        self.active, self.folder = True, folder
        try:
            evaluator.run()
        finally:
            self.active = False
        return self.rows


@dataclass(kw_only=True, eq=False)
class SegmentationResults(FoldResults):
    """Scores the fold with the best epoch's weights, and writes scores, masks, numbers and model.

    The epoch is the one with the highest Dice on the inner validation part; beside it (``optimistic_*``) stands the one
    with the highest Dice on the scored fold itself, which is what the paper did and what flatters the result.

    Attributes:
        scoring: evaluator of the scored fold. It gets a ``MaskTable``.
        best: the best epoch by inner validation; without validation, the last epoch counts.
        optimistic: the best epoch by the scored fold.
        penalty: HD95 in mm that an empty mask counts as in ``hd95_with_penalty``.
        show_all_below: label maps are kept beside the masks, so that a report can show and score on another machine;
            volumes too: of all scans if fewer than this are scored, otherwise of the worst, median and best by Dice.
            ``paths.csv`` names those of all scans, from the folder that the command was run in.
    """

    best: KeepBest | None
    optimistic: KeepBest | None
    penalty: float
    show_all_below: int = 20

    def __post_init__(self) -> None:
        self.table = MaskTable(self.parts.scored)
        self.table.attach(self.scoring)

    def __call__(self, engine: Engine) -> Results:
        """Results of a run that is complete."""
        cost = training_cost(engine)
        chosen = self._choose(engine)
        rows = self._score()
        metrics = {**summarise_scores(rows, self.penalty), "epoch": float(chosen["epoch"])}
        optimistic_rows = rows
        if self.optimistic is not None and self.optimistic.epoch not in (0, chosen["epoch"]):
            self.optimistic.restore()
            optimistic_rows = self.table.score(self.scoring)
            self._choose(engine)
        if self.optimistic is not None and self.optimistic.epoch:
            numbers = {**summarise_scores(optimistic_rows, self.penalty), "epoch": float(self.optimistic.epoch)}
            metrics |= {f"optimistic_{name}": value for name, value in numbers.items()}
        record = {**chosen, "hd95_penalty_mm": self.penalty, "subjects": self.subjects, "cost": cost}
        intervals = self._intervals(rows)
        self._draw(rows)
        caption = (
            f"Of {len(rows)} scored scans the worst, the median and the best: truth at the left, mask at the right."
        )
        self.keep({**record, "metrics": metrics, "intervals": intervals}, caption)
        return self.finished(with_limits(metrics, intervals), "predictions", record)

    def _choose(self, engine: Engine) -> dict[str, Any]:
        """Put the weights in place that the run ends with."""
        if self.best is not None and self.best.restore():
            return {"epoch": self.best.epoch, "epoch_from": "inner validation"}
        return {"epoch": engine.state.epoch, "epoch_from": "last"}

    def _intervals(self, rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
        return score_intervals(rows, [str(item["patient_id"]) for item in self.table.items])

    def save_model(self, engine: Engine, record: Mapping[str, Any]) -> None:
        """Write the model without scoring it, as an annotation server needs; ``record`` wins over the config's."""
        self.keep({**self._choose(engine), **record})

    def evaluate(
        self, record: Mapping[str, Any], allow_leak: bool = False, accept_look_alikes: bool = False
    ) -> dict[str, float]:
        """Score a trained model, given the JSON beside it; write ``predictions`` and ``metrics.json``.

        Raises:
            InputError: see ``check_model``.
        """
        leak = check_model(record, self.parts.scored, allow_leak, accept_look_alikes)
        rows = self._score()
        metrics = with_limits(summarise_scores(rows, self.penalty), self._intervals(rows))
        distance = f"{metrics['hd95']:.2f} mm" if "hd95" in metrics else "none (every mask failed)"
        summary = (
            f"Dice {metrics['mean_dice']:.3f} (left {metrics['dice_left']:.3f}, right {metrics['dice_right']:.3f}), "
            f"HD95 {distance}, {int(metrics['hd95_failures'])} of {2 * len(rows)} sides without a mask, "
            f"{counted(self.table.items)}; {self.folder / 'predictions' / 'scores.csv'}"
        )
        self.write_metrics(metrics, record, leak, summary, hd95_penalty_mm=self.penalty)
        return metrics

    def _draw(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Worst, median and best scan of those whose volumes are kept."""
        if process_rank():
            return
        folder, dices = self.folder / "predictions", [row["dice"] for row in rows]
        cases = {}
        for place in sorted(shown_scans(dices, 0), key=lambda place: dices[place]):
            name = item_name(self.table.items[place])
            files = [folder / kind / f"{name}.nii.gz" for kind in ("images", "labels", "masks")]
            cases[f"{name}\nDice {dices[place]:.2f}"] = (files[0], files[1], files[2])
        write_overlay(self.folder / PICTURES / PICTURE, cases)

    def _score(self) -> list[dict[str, float]]:
        """Score the fold and write ``predictions``."""
        folder = self.folder / "predictions"
        rows = self.table.score(self.scoring, folder / "masks")
        self.write_scores(folder / "scores.csv", list(rows[0]), self.table.items, (row.values() for row in rows))
        if process_rank():
            return rows
        paths = (
            [item["subject_id"], item.get("session"), *(_place(Path(item[key])) for key in SHOWN)]
            for item in self.table.items
        )
        write_csv(folder / "paths.csv", ["subject_id", "session", *SHOWN], paths)
        shown = shown_scans([row["dice"] for row in rows], self.show_all_below)
        for place, item in enumerate(self.table.items):
            name = f"{item_name(item)}.nii.gz"
            truth = read_volume(item["label"])
            write_label_map(folder / "labels" / name, truth.voxels, truth.affine)
            if place in shown:
                write_picture_volume(folder / "images" / name, read_volume(item["image"]))
        return rows


def _place(path: Path) -> str:
    """A file's path from the working folder; outside of it only the last two parts, so that no folder is passed on."""
    full, here = path.absolute(), Path.cwd()
    return (full.relative_to(here) if full.is_relative_to(here) else Path(*full.parts[-2:])).as_posix()


def shown_scans(dices: Sequence[float], show_all_below: int) -> set[int]:
    """Places of the scans that are worth looking at: all of a few, otherwise the worst, the median and the best."""
    order = sorted(range(len(dices)), key=lambda place: dices[place])
    if len(order) < show_all_below:
        return set(order)
    return {order[0], order[(len(order) - 1) // 2], order[-1]}
