# SPDX-License-Identifier: Apache-2.0
"""Train the small hippocampus model on endless heads; see the hippocampus bundle's card.

    python benchmarks/hippocampus_model.py --anatomies DIR --output DIR --hours 1.5 --export bundles/harp_hippocampus

A run that was interrupted resumes from its last checkpoint; one that has spent its hours only exports.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

from volta_components.downstream.start import save_model
from volta_components.files import atomic_path, sha256_json
from volta_components.training.endless import EndlessHeads, anatomies_datalist
from volta_components.training.record import provenance

CHANNELS, STRIDES, RES_UNITS = (16, 32, 64, 128), (2, 2, 2), 1
SPACING = 1.5
WINDOW = (112, 112, 112)
RENDERED = (72, 64, 56)
CROP = (56, 48, 40)
BATCH = 2
CROPS_OF_A_HEAD = 6
KEPT = 96
SCORED = ("05", "10", "15", "20")
LEFT_OUT = (*SCORED, "07")  # 07: its left hippocampus has 1.4 ml and its right one 4.8 ml


def build_network() -> UNet:
    """A small U-Net."""
    return UNet(3, 1, 3, CHANNELS, STRIDES, num_res_units=RES_UNITS)


def dice(mask: torch.Tensor, truth: torch.Tensor, side: int) -> float:
    """Dice coefficient of one side."""
    found, there = mask == side, truth == side
    return float(2 * (found & there).sum() / (found.sum() + there.sum() + 1e-9))


@torch.no_grad()
def evaluate(network: UNet, items: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean Dice over both sides of the items, and mean volume of the masks over that of the truth."""
    network.eval()
    scores, volumes = [], []
    for item in items:
        with torch.autocast("cpu", torch.bfloat16):
            logits = sliding_window_inference(item["image"][None], CROP, 4, network, overlap=0.25, mode="gaussian")
        mask = logits[0].float().argmax(dim=0)
        for side in (1, 2):
            scores.append(dice(mask, item["label"][0], side))
            volumes.append(float((mask == side).sum() / (item["label"] == side).sum().clamp(min=1)))
    network.train()
    return float(np.mean(scores)), float(np.mean(volumes))


class Replay:
    """The last heads that were rendered; each gives a few random crops, mirrored (with sides exchanged) half the time.

    A head takes as long to render as two training steps take, and a crop of it is new every time.

    Args:
        heads: where they come from, with ``shares``.
        step: the training step to begin with; heads are a function of it.
    """

    def __init__(self, heads: EndlessHeads, step: int) -> None:
        self.heads = heads
        self.items: list[dict[str, Any]] = []
        self.index = step * BATCH // CROPS_OF_A_HEAD

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``[B, 1, ...]`` and targets ``[B, 3, ...]`` of a step."""
        wanted = (step + 1) * BATCH // CROPS_OF_A_HEAD + 12
        while self.index < wanted:
            self.items = [*self.items[-KEPT + 1 :], self.heads[(1, self.index)]]
            self.index += 1
        rng = np.random.default_rng([7, step])
        images, targets = [], []
        for place in rng.choice(len(self.items), BATCH, replace=False):
            item = self.items[place]
            start = [int(rng.integers(big - small + 1)) for big, small in zip(RENDERED, CROP, strict=True)]
            part = (slice(None), *(slice(a, a + n) for a, n in zip(start, CROP, strict=True)))
            image, shares = item["image"][part], item["shares"][part]
            if rng.random() < 0.5:
                image, shares = image.flip(1), shares.flip(1).flip(0)
            image = image ** float(np.exp(rng.normal(0, 0.15))) + 0.01 * float(rng.random()) * torch.randn(image.shape)
            images.append(image.clamp(0, 1))
            targets.append(torch.cat([1 - shares.sum(dim=0, keepdim=True).clamp(max=1), shares]))
        return torch.stack(images), torch.stack(targets)


def main() -> None:
    """Train, evaluate now and then, and write checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anatomies", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.5)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--restart", type=float, default=0.0, help="hour at which the cosine of the rate begins again")
    parser.add_argument("--export", type=Path, help="bundle that the averaged weights are written into")
    parser.add_argument("--prefix", default="anatomy-")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = {place: [arguments.prefix + name for name in place] for place in (LEFT_OUT, SCORED)}
    everything = anatomies_datalist(arguments.anatomies, WINDOW, SPACING).items
    training = [item for item in everything if item["subject_id"] not in names[LEFT_OUT]]
    heads = EndlessHeads(
        training,
        length=10_000_000,
        shape=RENDERED,
        window=WINDOW,
        spacing=SPACING,
        hippocampus_share=0.8,
        jitter=16.0,
        shares=True,
        seed=1,
    )
    print(f"{len(training)} anatomies: {', '.join(heads.paths)}", flush=True)
    # Fresh heads of its own anatomies: the held-out ones are looked at once, by hippocampus_scores.py.
    fresh = EndlessHeads(
        training,
        length=100,
        shape=(96, 80, 80),
        window=WINDOW,
        spacing=SPACING,
        hippocampus_share=1.0,
        jitter=8.0,
        variation=1.0,
        mirrored_share=0.0,
        seed=99,
    )
    watched = [fresh[(0, index)] for index in range(8)]
    network = build_network()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(network.parameters(), arguments.learning_rate, weight_decay=1e-4)
    # Squares make the targets' own shares the best prediction; without them masks came out a fifth too large.
    loss_function = DiceCELoss(include_background=False, softmax=True, batch=True, squared_pred=True)
    step, spent = 0, 0.0
    path = arguments.output / "checkpoint.pt"
    if path.is_file():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    replay = Replay(heads, step)
    budget = arguments.hours * 3600
    last_saved, recent = time.monotonic(), []
    while spent < budget:
        began = time.monotonic()
        phase = (spent / 3600 - arguments.restart) / (arguments.hours - arguments.restart)
        rate = arguments.learning_rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * phase))
        for group in optimizer.param_groups:
            group["lr"] = rate + 1e-6
        images, targets = replay.batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
        loss = loss_function(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(network)
        step += 1
        recent.append(float(loss.detach()))
        spent += time.monotonic() - began
        if step % 50 == 0:
            print(f"step {step}  {spent / 60:.1f} min  loss {np.mean(recent[-50:]):.3f}  rate {rate:.2g}", flush=True)
        if step % 500 == 0 or spent >= budget:
            rows = evaluate(average.module, watched)
            print(f"step {step}  Dice {rows[0]:.3f}, mask / true volume {rows[1]:.2f}", flush=True)
        if time.monotonic() - last_saved > 180 or spent >= budget:
            with atomic_path(path) as temporary:
                torch.save(
                    {
                        "network": network.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                        "spent": spent,
                    },
                    temporary,
                )
            last_saved = time.monotonic()
    if arguments.export is not None:
        export(arguments.export, average.module, training, step, arguments, spent)


def export(
    bundle: Path,
    network: UNet,
    training: list[dict[str, Any]],
    step: int,
    arguments: argparse.Namespace,
    seconds: float,
) -> None:
    """Write the model and its record into a bundle, as a training of its own would."""
    settings = {
        "init": "starter",
        "spacing": SPACING,
        "volume_size": list(WINDOW),
        "image_size": list(CROP),
        "unet_channels": list(CHANNELS),
        "unet_strides": list(STRIDES),
        "unet_res_units": RES_UNITS,
        "steps": step,
        "batch_size": BATCH,
        "crops_of_a_head": CROPS_OF_A_HEAD,
        "peak_learning_rate": arguments.learning_rate,
        "cosine_restarted_at_hour": arguments.restart,
        "minutes": round(seconds / 60),
    }
    anatomies = anatomies_hash(training)
    record = {
        "bundle": "harp_hippocampus",
        "class_names": ["background", "left hippocampus", "right hippocampus"],
        "tags": {"init": "starter", "phantom": "true"},
        "pretraining": None,
        "provenance": provenance(settings, anatomies, training, "phantom_anatomies"),
        "epoch": None,
        "epoch_from": "last",
        "metrics": {},
    }
    path = bundle / "models" / "model_starter.pt"
    save_model(path, network, record)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MB")


def anatomies_hash(items: list[dict[str, Any]]) -> str:
    """SHA-256 of who the anatomies are."""
    return sha256_json([{key: item[key] for key in ("subject_id", "patient_id")} for item in items])


if __name__ == "__main__":
    main()
