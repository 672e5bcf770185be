# SPDX-License-Identifier: Apache-2.0
"""What supervision makes of the network of ``learning.py``: trained by being told which two scans are one head.

Heads as in the other rows, for ``LONGER`` times as many epochs, with more new heads in each: the contrastive loss of
SimCLR (MONAI's), between the summaries of each head's two scans and those of the other heads of a mini-batch. Nothing
is masked or cropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.losses import ContrastiveLoss
from monai.utils import set_determinism
from torch import nn
from tqdm import tqdm

import volta_components.bundle as volta
from volta_components.method.weights import save_encoder
from volta_components.training.sampling import KeyedDataLoader

LONGER = 4
TEMPERATURE = 0.1


def train_bound(configs: Sequence[str], ids: Mapping[str, Any]) -> list[dict[str, float]]:
    """Train and write the encoder at ``encoder_path``.

    Args:
        configs: of a pretraining on two scanners.
        ids: of it; ``epochs`` is multiplied by ``LONGER``.

    Returns:
        The loss of each epoch.
    """
    config = ConfigParser()
    config.read_config(list(configs))
    config.update({**ids, "train#dataset#transform": None})
    set_determinism(config["seed"])
    device = config.get_parsed_content("device")
    network = config.get_parsed_content("network_def").to(device)
    network.drop_decoder()
    side = config["hidden_size"]
    head = nn.Sequential(nn.Linear(side, 2 * side), nn.GELU(), nn.Linear(2 * side, side)).to(device)
    dataset = config.get_parsed_content("train#dataset")
    loader = KeyedDataLoader(dataset, config["batch_size"], shuffle=True, num_workers=config["num_workers"])
    loss_function = ContrastiveLoss(TEMPERATURE)
    trained = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, config["learning_rate"], weight_decay=0.04)
    steps = LONGER * config["epochs"] * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["learning_rate"], total_steps=steps, pct_start=0.1)
    curve = []
    for epoch in tqdm(range(LONGER * config["epochs"]), desc="bound"):
        loader.sampler.set_position(epoch + 1)
        total = 0.0
        for batch in loader:
            scans = torch.cat([batch["image"], batch["image_2"]]).to(device)
            first, second = head(network.summarise(network.encode(scans))).chunk(2)
            loss = loss_function(first, second)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 3.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        curve.append({"loss": total / len(loader)})
    facts = volta.provenance(
        config.get_parsed_content("settings"),
        config.get_parsed_content("datalist").hash,
        config.get_parsed_content("parts")[0],
        config.get_parsed_content("datalist").name,
    )
    save_encoder(Path(config["encoder_path"]), network.eval(), facts)
    return curve
