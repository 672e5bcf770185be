# SPDX-License-Identifier: Apache-2.0
"""Pictures and checks of the reconstruction during pretraining."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from torch.utils.data import default_collate

from volta_components.distributed import process_rank
from volta_components.files import atomic_path, write_json
from volta_components.method.masking import VISIBLE
from volta_components.method.networks import VoltaViT
from volta_components.method.views import ViewGenerator
from volta_components.training.tracking import find_mlflow_handler


def restore(network: VoltaViT, image: torch.Tensor) -> torch.Tensor:
    """The whole network's reconstruction ``[B, 1, D, H, W]`` of a masked image of the same shape; no gradient."""
    with eval_mode(network):  # in training, stochastic depth leaves out blocks
        return network.decode(network.encode(image), network.token_grid(image))


@dataclass(eq=False)
class ReconstructionPicture:
    """Every few epochs, a picture of original, masked and reconstructed slices of one volume.

    It is the data set's first volume. Its crops and its mask are the same every time, so that pictures can be compared.

    Attributes:
        folder: where PNG files are written.
        dataset: items with ``image``, ``[1, D, H, W]`` in [0, 1].
        network: the student's network, with its decoder.
        views: makes the crops and the mask.
        interval: epochs between two pictures.
    """

    folder: str | os.PathLike[str]
    dataset: Any
    network: VoltaViT
    views: ViewGenerator
    interval: int = 10

    def attach(self, engine: Engine) -> None:
        """Draw after the first epoch, every ``interval`` epochs, and after the last."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Any) -> None:
        epoch = engine.state.epoch
        if process_rank() or not (epoch == 1 or epoch == engine.state.max_epochs or epoch % self.interval == 0):
            return
        path = Path(self.folder) / f"reconstruction_{epoch:04d}.png"
        self.draw(engine, path)
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None:
            mlflow_handler.client.log_artifact(mlflow_handler.cur_run.info.run_id, str(path), "pictures")

    @torch.no_grad()
    def draw(self, engine: Any, path: Path) -> None:
        """Write the picture of the network as it is now, computed in single precision."""
        from matplotlib.figure import Figure

        volume = torch.as_tensor(self.dataset[0]["image"]).to(engine.state.device)[None]
        views = self.views(volume, default_collate([self.views.draw(volume.shape[2:], (0, 0))]))
        restored = restore(self.network, views.student[0])
        images = {
            "original": views.image[0],
            "teacher's view": views.teacher[0],
            "student's view": views.student[0],
            "reconstruction": restored,
            "masked parts restored": torch.where(views.masked[0], restored, views.image[0]),
        }
        figure = Figure(figsize=(3 * len(images), 6.5), layout="constrained")
        axes = figure.subplots(2, len(images))
        for column, (title, image) in enumerate(images.items()):
            array = image[0, 0].cpu().numpy()
            axial, coronal = array[:, :, array.shape[2] // 2], array[:, array.shape[1] // 2]
            for row, plane in enumerate((axial, coronal)):
                axes[row, column].imshow(plane.T, origin="lower", cmap="gray", vmin=0, vmax=1)
                axes[row, column].set_axis_off()
            axes[0, column].set_title(title)
        figure.suptitle(f"epoch {engine.state.epoch}")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=80)


@dataclass(eq=False)
class ReconstructionCheck:
    """Masked reconstruction error on held-out volumes, beside that of predicting the mean training volume.

    The middle of each held-out volume is seen as a global crop shows it, without any other change, and masked the same
    way every time. The errors in single precision, ``validation_reconstruction`` and ``validation_mean_view``, and the
    share of volumes where the first is lower, ``validation_share_better``, go to ``engine.state.metrics`` of every
    ``interval``-th epoch and, at the end, to a JSON.

    Attributes:
        path: the JSON file.
        validation: held-out items, with ``image`` ``[1, D, H, W]`` in [0, 1]; none of them is trained on.
        training: items whose mean volume is the naive prediction.
        network: the student's network, with its decoder.
        views: whose global crops and masks these are.
        interval: epochs between two checks.
        limit: volumes of each that are used at most.
    """

    path: str | os.PathLike[str]
    validation: Any
    training: Any
    network: VoltaViT
    views: ViewGenerator
    interval: int = 10
    limit: int = 64

    @functools.cached_property
    def mean(self) -> torch.Tensor:
        """The mean training volume, ``[1, D, H, W]``."""
        count = min(self.limit, len(self.training))
        return torch.stack([torch.as_tensor(self.training[i]["image"]) for i in range(count)]).mean(dim=0)

    def attach(self, engine: Engine) -> None:
        """Check every ``interval`` epochs and after the last."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_started(self, engine: Any) -> None:
        # They would be logged again in every epoch until the next check.
        engine.state.metrics = {k: v for k, v in engine.state.metrics.items() if not k.startswith("validation_")}

    def _epoch_completed(self, engine: Any) -> None:
        epoch, last = engine.state.epoch, engine.state.max_epochs
        if epoch % self.interval and epoch != last:
            return
        errors = self.errors(engine.state.device)
        engine.state.metrics |= {f"validation_{name}": value for name, value in errors.items()}
        if epoch == last:
            write_json(self.path, {"epoch": epoch, **errors, "volumes": min(self.limit, len(self.validation))})

    @torch.no_grad()
    def errors(self, device: torch.device) -> dict[str, float]:
        """Mean squared errors over masked voxels, averaged over volumes, and the share that is restored better."""
        crop, mask = self.views.global_geometry, self.views.mask
        mean = crop.middle_of(self.mean.to(device)[None])
        errors: dict[str, list[float]] = {"reconstruction": [], "mean_view": []}
        for index in range(min(self.limit, len(self.validation))):
            image = crop.middle_of(torch.as_tensor(self.validation[index]["image"]).to(device)[None])
            size = image.shape[2:]
            cells = torch.from_numpy(mask.draw(size, np.random.default_rng(index))).to(device)
            labels = mask.enlarge(cells, size).expand_as(image)
            noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(index)).to(device)
            restored = restore(self.network, mask.fill(image, labels, noise))
            hidden = labels != VISIBLE
            errors["reconstruction"].append(float((restored - image)[hidden].square().mean()))
            errors["mean_view"].append(float((mean - image)[hidden].square().mean()))
        better = np.less(errors["reconstruction"], errors["mean_view"])
        return {name: float(np.mean(values)) for name, values in (errors | {"share_better": better}).items()}
