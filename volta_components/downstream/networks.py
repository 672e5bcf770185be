# SPDX-License-Identifier: Apache-2.0
"""Classifiers of whole volumes: VolTA-3D's encoder with a linear head, and a Swin transformer to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import UNETR
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.networks.nets.vit import ViT
from torch import Tensor, nn
from torch.nn import functional

from volta_components.errors import InputError
from volta_components.method.monai_versions import settle_cross_attention
from volta_components.method.networks import VoltaViT, check_sizes
from volta_components.method.summariser import check_heads

POOLS = ("summary", "mean")
MOST_FEATURES = 4096  # channels of a convolutional stage; a config that asks for more is mistaken


class Float32Linear(nn.Linear):
    """A linear layer in float32, in mixed precision as well: in bfloat16, many subjects would share a score."""

    def forward(self, input: Tensor) -> Tensor:
        """``[B, in_features]`` to ``[B, out_features]``."""
        if torch.jit.is_scripting():  # TorchScript has no autocast whose device is found at run time
            return functional.linear(input.float(), self.weight, self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight, self.bias)


class VoltaClassifier(nn.Module):
    """The ViT encoder of VolTA-3D with a linear head on its summary token; one tensor out.

    Keys are ``encoder.*`` (those of ``VoltaViT`` without decoder, so that an exported encoder loads under the prefix
    ``encoder.``) and ``head.*``.

    Args:
        num_classes: size of the output.
        img_size: size ``(D, H, W)`` in voxels for which position embeddings are learned.
        pool: what the head sees: ``summary``, the CLS-style token, or ``mean``, the mean of the patch tokens.
        encoder: its other sizes, see ``VoltaViT``.

    Shapes:
        ``[B, in_channels, D, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        InputError: if the patch size does not divide the image size, or there is no such pool.
    """

    def __init__(
        self,
        num_classes: int = 2,
        img_size: Sequence[int] = (96, 96, 96),
        pool: str = "summary",
        **encoder: Any,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise InputError(f"pool {pool!r}: choose {' or '.join(POOLS)}")
        self.encoder = VoltaViT(img_size=img_size, decoder=False, **encoder)
        self.head = Float32Linear(self.encoder.config["hidden_size"], num_classes)
        self.pool = pool
        if pool == "mean":
            # Without gradient it must not be waited for by DDP.
            self.encoder.summariser.requires_grad_(False)
        self.config: dict[str, Any] = {**self.encoder.config, "num_classes": num_classes, "pool": pool}

    def features(self, image: Tensor) -> Tensor:
        """What the head sees: ``[B, hidden_size]``."""
        tokens = self.encoder.encode(image)
        return self.encoder.summarise(tokens) if self.pool == "summary" else tokens.mean(dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of an image ``[B, in_channels, D, H, W]``."""
        return self.head(self.features(image))


class SwinClassifier(nn.Module):
    """MONAI's ``SwinTransformer`` (the encoder of Swin UNETR), mean-pooled, with a linear head; one tensor out.

    Args:
        in_channels: image channels.
        num_classes: size of the output.
        embed_dim: channels after the patch embedding; each of the four stages doubles them.
        window_size: voxels of an attention window along each axis, on the grid of patches.
        patch_size: voxels of a patch along each axis.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.

    Shapes:
        ``[B, in_channels, D, H, W]``, each side a multiple of ``16 * patch_size``, to logits ``[B, num_classes]``.

    Raises:
        InputError: if the numbers of stages, or channels and heads, do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        embed_dim: int = 48,
        window_size: Sequence[int] = (7, 7, 7),
        patch_size: Sequence[int] = (2, 2, 2),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
    ) -> None:
        super().__init__()
        if not 0 < embed_dim <= MOST_FEATURES or sum(depths) > MOST_FEATURES:
            raise InputError(f"embed_dim {embed_dim}, depths {list(depths)}: at most {MOST_FEATURES:,}")
        if len(depths) != 4 or len(num_heads) != 4:
            raise InputError(f"depths {list(depths)} and num_heads {list(num_heads)}: MONAI's Swin has four stages")
        wrong = [heads for stage, heads in enumerate(num_heads) if (embed_dim * 2**stage) % heads]
        if wrong:
            raise InputError(f"num_heads {wrong} do not divide the channels of their stages (embed_dim {embed_dim})")
        sizes: dict[str, Any] = {
            "embed_dim": embed_dim,
            "window_size": list(window_size),
            "patch_size": list(patch_size),
            "depths": list(depths),
            "num_heads": list(num_heads),
        }
        self.encoder = SwinTransformer(in_channels, **sizes)
        self.head = Float32Linear(16 * embed_dim, num_classes)
        self.config = {"in_channels": in_channels, "num_classes": num_classes, **sizes}

    def features(self, image: Tensor) -> Tensor:
        """What the head sees: the mean of the last stage's normalised map, ``[B, 16 * embed_dim]``."""
        return self.encoder(image)[-1].mean(dim=(2, 3, 4))

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of an image ``[B, in_channels, D, H, W]``."""
        return self.head(self.features(image))


class VoltaUNETR(UNETR):
    """MONAI's ``UNETR`` with a number of transformer blocks that can be chosen.

    ``UNETR`` has 12 blocks and takes its skip connections after blocks 4, 7 and 10, whatever the depth of the encoder.
    Here the skips are at a quarter, a half and three quarters of the depth, which is the same at 12. With 12
    blocks, state dict and output are MONAI's own. Its ``vit`` takes an exported encoder's weights as they are.

    Args:
        in_channels: image channels.
        out_channels: classes: background, left, right.
        img_size: size ``(D, H, W)`` in voxels of the crops; a multiple of the patch, which is 16.
        feature_size: channels at full resolution.
        hidden_size: token size.
        mlp_dim: hidden size of each block's MLP.
        num_layers: transformer blocks, at least 4.
        num_heads: attention heads of each block.
        norm_name: normalisation of the convolutions.

    Shapes:
        ``[B, in_channels, D, H, W]`` to logits ``[B, out_channels, D, H, W]``.

    Raises:
        InputError: if the patch does not divide ``img_size``, the heads do not share ``hidden_size``, or there are
            fewer than 4 blocks.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        img_size: Sequence[int] = (96, 96, 96),
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        norm_name: str = "instance",
    ) -> None:
        if any(side < 16 or side % 16 for side in img_size):
            raise InputError(f"image size {tuple(img_size)}: UNETR's patch is 16; give multiples of it")
        if num_layers < 4:
            raise InputError(f"num_layers {num_layers}: UNETR needs 4 blocks or more for its skip connections")
        check_sizes(img_size, (16, 16, 16), hidden_size, mlp_dim, num_layers, in_channels)
        if not 0 < feature_size <= MOST_FEATURES:
            raise InputError(f"feature_size {feature_size}: a number from 1 to {MOST_FEATURES:,}")
        check_heads(hidden_size, num_heads)
        vit: dict[str, Any] = {
            "in_channels": in_channels,
            "img_size": list(img_size),
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
        }
        rest: dict[str, Any] = {"out_channels": out_channels, "feature_size": feature_size, "norm_name": norm_name}
        super().__init__(**vit, **rest, proj_type="conv", res_block=True)
        if num_layers != self.num_layers:
            self.num_layers = num_layers
            self.vit = ViT(**vit, patch_size=self.patch_size, num_layers=num_layers, proj_type="conv")
        self.skips = tuple(num_layers * quarter // 4 for quarter in (1, 2, 3))
        self.config = {**vit, **rest, "num_layers": num_layers}
        settle_cross_attention(self)

    def forward(self, x_in: Tensor) -> Tensor:
        """Logits of an image."""
        tokens, hidden = self.vit(x_in)
        full = self.encoder1(x_in)
        half = self.encoder2(self.proj_feat(hidden[self.skips[0]]))
        quarter = self.encoder3(self.proj_feat(hidden[self.skips[1]]))
        eighth = self.encoder4(self.proj_feat(hidden[self.skips[2]]))
        features = self.decoder5(self.proj_feat(tokens), eighth)
        features = self.decoder4(features, quarter)
        features = self.decoder3(features, half)
        return self.out(self.decoder2(features, full))
