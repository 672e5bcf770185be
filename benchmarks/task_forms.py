# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle's inference and fine-tuning beside MONAI's tutorials, for ``step.py`` to time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms as t
from monai.bundle import ConfigParser
from monai.data import CacheDataset
from monai.data import DataLoader as MonaiLoader
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.losses import DiceCELoss
from nilearn.datasets import load_mni152_template
from step_forms import Size, volume_of
from torch import Tensor, nn

from volta_components.data.load import LoadScand
from volta_components.downstream.amp import AmpInferer
from volta_components.downstream.networks import VoltaUNETR
from volta_components.downstream.segmentation import FloatWindowInferer
from volta_components.downstream.start import freeze_for, load_model
from volta_components.method.networks import parameter_groups
from volta_components.training.cache import KeyedCacheDataset
from volta_components.training.sampling import KeyedDataLoader

BUNDLE = Path(__file__).resolve().parent.parent / "bundles/harp_hippocampus"
KEYS = ["image", "label"]


def sizes_of(size: Size) -> dict[str, Any]:
    """Sizes of the UNETR, which has at least four blocks."""
    blocks = {"num_layers": max(4, size.layers), "num_heads": size.heads}
    return {"hidden_size": size.hidden, "mlp_dim": 4 * size.hidden, **blocks}


def config_of(**changes: Any) -> ConfigParser:
    """The bundle's ``train.json`` with changes."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs/train.json"))
    parser.update({"device": "$torch.device('cpu')", **changes})
    return parser


def engine_autocast(device: torch.device, amp: bool) -> torch.autocast:
    """What MONAI's trainers and evaluators open around a bundle's inferer: CUDA's autocast, and nothing on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp and device.type == "cuda")


class Starter:
    """The starter model's inference on the MNI template: a real head, and a mask of both hippocampi."""

    def __init__(self, device: torch.device) -> None:
        config = config_of()
        config.read_config([str(BUNDLE / f"configs/{name}.json") for name in ("inference", "starter")])
        network = config.get_parsed_content("network_def")
        load_model(network, BUNDLE / "models/model_starter.pt")
        self.network, self.device = network.to(device).eval(), device
        self.window = {"roi_size": config["image_size"], "overlap": config["window_overlap"], "mode": "gaussian"}
        self.window |= {"sw_batch_size": config["window_batch_size"]}
        with tempfile.TemporaryDirectory() as folder:
            load_mni152_template(resolution=1).to_filename(Path(folder) / "scan.nii")
            load = LoadScand("image", spacing=config["spacing"], shape=config["volume_size"], track_meta=False)
            self.image: Tensor = load({"image": f"{folder}/scan.nii"})["image"][None].to(device)

    @torch.no_grad()
    def stock(self) -> Tensor:
        """MONAI's sliding window in float32."""
        inferer = SlidingWindowInferer(**self.window)
        logits = inferer(self.image, self.network)
        other = inferer(self.image.flip(2), self.network).flip(2)[:, [0, 2, 1]]
        return (logits + other).argmax(dim=1)

    @torch.no_grad()
    def ours(self) -> Tensor:
        """The bundle's inferer, with ``--amp True``."""
        inferer = AmpInferer(FloatWindowInferer(**self.window, mirrored=True), amp=True)
        with engine_autocast(self.device, amp=True):
            return inferer(self.image, self.network).argmax(dim=1)

    def dice(self) -> float:
        """Of both masks, hippocampi of both sides together."""
        mine, theirs = self.ours() > 0, self.stock() > 0
        return float(2 * (mine & theirs).sum() / (mine.sum() + theirs.sum()))


def unetr_inference(size: Size, device: torch.device, stock: bool) -> Callable[[], None]:
    """A UNETR over a volume of 5/3 of its window: MONAI's inferer in float32, or the bundle's in bfloat16."""
    side = size.local
    network = VoltaUNETR(img_size=(side,) * 3, **sizes_of(size)).to(device).eval()
    image = torch.rand(1, 1, *(side * 5 // 3,) * 3, device=device)
    kind = SlidingWindowInferer if stock else FloatWindowInferer
    inferer = AmpInferer(kind((side,) * 3, 4, 0.5, mode="gaussian"), amp=not stock)

    @torch.no_grad()
    def step() -> None:
        with engine_autocast(device, amp=not stock):
            inferer(image, network)

    return step


def labelled_volumes(size: Size, folder: Path) -> list[dict[str, str]]:
    """Two volumes with two labels each."""
    label = np.zeros(size.image, dtype=np.uint8)
    for value, place in ((1, 0.4), (2, 0.6)):
        corner = [int(side * place) for side in size.image]
        label[corner[0] : corner[0] + 6, corner[1] : corner[1] + 8, corner[2] : corner[2] + 6] = value
    items = []
    for i in range(2):
        paths = {key: str(folder / f"{key}{i}.nii") for key in KEYS}
        nib.Nifti1Image(volume_of(size)[0, 0].numpy(), np.eye(4)).to_filename(paths["image"])
        nib.Nifti1Image(label, np.eye(4)).to_filename(paths["label"])
        items.append(paths)
    return items


def fine_tuning(size: Size, device: torch.device, folder: Path, stock: bool, amp: bool = True) -> Callable[[], None]:
    """An epoch of two volumes, two crops each, from the cache.

    Stock is MONAI's UNETR tutorial (``unetr_btcv_segmentation_3d``): its random transforms, the whole network trained,
    float32. This project's is ``train.json``: its random transforms, the first half of the blocks frozen.
    """
    side, items = size.local, labelled_volumes(size, folder)
    load = [t.LoadImaged(KEYS, ensure_channel_first=True), t.EnsureTyped(KEYS, track_meta=False)]
    network: nn.Module = VoltaUNETR(img_size=(side,) * 3, **sizes_of(size)).to(device)
    if stock:
        random = [
            t.RandCropByPosNegLabeld(KEYS, "label", (side,) * 3, pos=1, neg=1, num_samples=2),
            *[t.RandFlipd(KEYS, prob=0.1, spatial_axis=axis) for axis in range(3)],
            t.RandRotate90d(KEYS, prob=0.1, max_k=3),
            t.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        ]
        cached = CacheDataset(items, t.Compose([*load, *random]), num_workers=0, progress=False)
        loader: Any = MonaiLoader(cached, batch_size=2, shuffle=True)
        loss: Any = DiceCELoss(to_onehot_y=True, softmax=True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-5)
    else:
        config = config_of(image_size=[side] * 3, **sizes_of(size))
        random = config.get_parsed_content("train#random_transforms")
        loader = KeyedDataLoader(KeyedCacheDataset(items, t.Compose([*load, *random])), 2, shuffle=True)
        loss = config.get_parsed_content("loss")
        freeze_for(network, "volta", size.layers // 2)
        optimizer = torch.optim.AdamW(parameter_groups(network, 1e-5), lr=1e-4)

    mixed = amp and not stock
    inferer = AmpInferer(SimpleInferer(), mixed)

    def step() -> None:
        for batch in loader:
            optimizer.zero_grad()
            with engine_autocast(device, mixed):
                found = loss(inferer(batch["image"].to(device), network), batch["label"].to(device))
            found.backward()
            optimizer.step()
            found.item()

    return step
