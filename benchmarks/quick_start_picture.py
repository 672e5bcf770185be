# SPDX-License-Identifier: Apache-2.0
"""The README's picture, from what ``make demo`` left: a head, its masked view, its reconstruction, its hippocampi.

The head is one that no model was trained on: of the fold that the hippocampus bundle's quick start scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from scipy import ndimage

from volta_components.data.labels import SIDE_COLOURS
from volta_components.files import atomic_path, read_json
from volta_components.method.masking import VISIBLE, GroupMask
from volta_components.method.networks import VoltaViT

ENLARGE = 6


def main() -> None:
    """Draw it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("docs/quick_start.png"))
    options.add_argument("--seed", type=int, default=3, help="of the mask")
    options.add_argument("--init", default="unet_scratch", help="whose hippocampi are drawn")
    given = options.parse_args()

    run = next(iter(sorted(Path("runs/demo/harp_hippocampus").glob(f"{given.init}_fold0_*"))))
    picture = next(iter(sorted((run / "predictions" / "images").iterdir())))
    image = np.asarray(nib.load(picture).dataobj, np.float32)  # type: ignore[attr-defined]
    masks = np.asarray(nib.load(run / "predictions" / "masks" / picture.name).dataobj)  # type: ignore[attr-defined]

    config = ConfigParser()
    configs = Path("bundles/pretrain/configs")
    config.read_config([str(configs / name) for name in ("train.json", "koleo.json", "tiny.json")])
    mask = GroupMask(*(config[f"mask_{name}"] for name in ("coverage", "min_side", "max_side", "noise_share", "cell")))
    record = read_json("bundles/pretrain/models/encoder_phantom_tiny.json")
    network = VoltaViT(**record["network"]).eval()
    state = torch.load("bundles/pretrain/runs/phantom_tiny/checkpoint.pt", weights_only=True)["student"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})

    volume = torch.from_numpy(image)[None, None]
    labels = mask.enlarge(torch.from_numpy(mask.draw(image.shape, np.random.default_rng(given.seed))), image.shape)
    labels = labels.expand_as(volume)
    masked = mask.fill(volume, labels, torch.randn(volume.shape, generator=torch.Generator().manual_seed(given.seed)))
    with torch.inference_mode():
        restored = network.decode(network.encode(masked), network.token_grid(volume))
    panels = {
        "a synthetic head": image,
        "half of it masked": masked[0, 0].numpy(),
        "reconstructed\nby the pretrained network": torch.where(labels != VISIBLE, restored, volume)[0, 0].numpy(),
        "left and right hippocampus\nby a U-Net": image,
    }

    # The coronal slice with the most hippocampus; empty space below the head is left out.
    cut = int(np.argmax((masks > 0).sum(axis=(0, 2))))
    bottom = max(0, int(np.flatnonzero((image[:, cut] > 0.05).any(axis=0))[0]) - 2)
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(11, 2.7), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels))
    for axis, (title, array) in zip(axes, panels.items(), strict=True):
        axis.imshow(array[:, cut].T, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        axis.set_ylim(bottom, image.shape[2] - 0.5)
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    for value, colour in SIDE_COLOURS.items():
        side = (masks[:, cut] == value).astype(np.float32)
        fine = ndimage.zoom(side, ENLARGE, order=1, grid_mode=True, mode="nearest")
        places = [(np.arange(length * ENLARGE) + 0.5) / ENLARGE - 0.5 for length in side.shape]
        axes[-1].contour(places[0], places[1], fine.T, levels=[0.5], colors=[colour], linewidths=2)
    with atomic_path(given.output) as temporary:
        figure.savefig(temporary, dpi=100)
    print(given.output)


if __name__ == "__main__":
    main()
