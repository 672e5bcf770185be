# SPDX-License-Identifier: Apache-2.0
"""Stops a pretraining whose teacher has collapsed."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine

from volta_components.method.trainer import ReadOut

_LOGGER = logging.getLogger(__name__)
_NOTHING = {
    "global": "global branch: the student predicts nothing of the teacher's targets that another volume would not",
    "patch": "patch branch: tokens know where they lie, and nothing of this volume",
}


class CollapseError(RuntimeError):
    """A branch of the self-distillation has died."""


@dataclass(eq=False)
class CollapseMonitor:
    """Stops a run whose teacher has collapsed, and says which branch died.

    It watches three things, as running means:

    - the teacher's entropy in both branches, as a share of ``ln K``. Near 1 the output is uniform, near 0 it is always
      the same prototype;
    - what the student predicts of the targets that an earlier volume would not. At 0, the views of a volume agree on
      nothing: the teacher sharpens noise, which its entropy does not show. In the patch branch, tokens then know where
      they lie and not what is there; the run continues, with a warning;
    - the effective rank of the last summaries (the exponential of the entropy of their covariance's eigenvalues). Near
      1, every volume has the same embedding.

    It goes through ``engine.state.numbers`` and ``engine.state.summaries``, mini-batch by mini-batch, when the trainer
    has read them from the device, and adds ``effective_rank`` to the former.

    Attributes:
        low: entropies under this share of ``ln K`` count as a collapse to a point.
        high: entropies over this share count as a uniform collapse.
        min_predicted: smallest share of ``ln K`` that the student must predict; less counts as targets of noise.
        min_rank: effective ranks under this count as a collapse of the embeddings.
        patience: mini-batches that a collapse must last to stop the run.
        grace: mini-batches at the start that never count.
        smoothing: share of the old running mean kept at a mini-batch.
        queue_size: summaries over which the rank is taken.
        rank_interval: mini-batches between two computations of the rank.
    """

    REMEDIES = (
        "Try more local crops or larger ones (num_local, local_side_mm), gentler geometry (rotation_degrees, "
        "translation_mm, global_zoom), another centre_momentum or target_entropy, fewer prototypes (head_out_dim), a "
        "larger batch, or an overlay against collapse: configs/sinkhorn.json or configs/koleo.json."
    )

    low: float = 0.02
    high: float = 0.995
    min_predicted: float = 0.001
    min_rank: float = 1.05
    patience: int = 4000
    grace: int = 2000
    smoothing: float = 0.95
    queue_size: int = 256
    rank_interval: int = 16

    def __post_init__(self) -> None:
        self.means: dict[str, float] = {}
        self.bad: dict[str, int] = defaultdict(int)
        self.queue: deque[torch.Tensor] = deque(maxlen=self.queue_size)

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch, before the handlers that record or save it, wherever this one is listed."""
        engine.add_event_handler(ReadOut.NUMBERS_READ, self._numbers_read)

    def state_dict(self) -> dict[str, Any]:
        """Running means, counters and the queue."""
        queue = torch.stack(list(self.queue)) if self.queue else torch.empty(0)
        return {"means": dict(self.means), "bad": dict(self.bad), "queue": queue}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.means = dict(state["means"])
        self.bad = defaultdict(int, state["bad"])
        self.queue.clear()
        self.queue.extend(state["queue"].unbind(0) if len(state["queue"]) else ())

    def _numbers_read(self, engine: Any) -> None:
        first = engine.state.iteration - len(engine.state.numbers) + 1
        for place, (output, rows) in enumerate(zip(engine.state.numbers, engine.state.summaries, strict=True)):
            self.queue.extend(rows.unbind(0))
            self._check(first + place, output)

    def _check(self, iteration: int, output: dict[str, float]) -> None:
        checks = []
        for branch in ("global", "patch"):
            mean = self._smoothed(branch, output[f"{branch}_teacher_entropy"])
            predicted = self._smoothed(f"{branch}_predicted", output[f"{branch}_predicted"])
            checks += [
                (f"{branch} branch: the teacher's output is uniform", mean > self.high, f"entropy {mean:.3f} of ln K"),
                (f"{branch} branch: the teacher's output is a point", mean < self.low, f"entropy {mean:.3f} of ln K"),
                (_NOTHING[branch], predicted < self.min_predicted, f"predicted {predicted:.4f} of ln K"),
            ]
        if iteration % self.rank_interval == 0 and len(self.queue) >= 16:
            self.means["rank"] = effective_rank(torch.stack(list(self.queue)))
        if "rank" in self.means:
            rank = self.means["rank"]
            output["effective_rank"] = rank
            checks.append(("summaries: every volume has the same", rank < self.min_rank, f"effective rank {rank:.2f}"))
        patience = max(1, self.patience)  # what is not bad never ends a run
        for name, is_bad, figure in checks:
            self.bad[name] = self.bad[name] + 1 if is_bad and iteration > self.grace else 0
            if name == _NOTHING["patch"]:
                if self.bad[name] == patience:
                    _LOGGER.warning("%s (%s); configs/token_centre.json is a remedy", name, figure)
            elif self.bad[name] >= patience:
                raise CollapseError(
                    f"collapsed for {self.bad[name]} mini-batches, at mini-batch {iteration}: {name} ({figure}). "
                    + self.REMEDIES
                )

    def _smoothed(self, name: str, value: float) -> float:
        self.means[name] = self.means.get(name, value) * self.smoothing + value * (1 - self.smoothing)
        return self.means[name]


def effective_rank(rows: torch.Tensor) -> float:
    """Exponential of the entropy of the covariance's normalised eigenvalues, of rows ``[n, D]``.

    It is between 1 (all rows are equal) and ``min(n - 1, D)``.

    Source: Roy and Vetterli, 2007, on eigenvalues of the covariance.
    """
    values = torch.linalg.svdvals((rows - rows.mean(dim=0)).double()).square()
    total = values.sum()
    if total <= 1e-12 * rows.double().square().sum():
        return 1.0
    return float(torch.exp(torch.special.entr(values / total).sum()))
