# SPDX-License-Identifier: Apache-2.0
"""The networks of VolTA-3D: encoder with summariser and decoder, and student and teacher for training."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from monai.networks.layers import DropPath
from monai.networks.nets import ViTAutoEnc
from torch import Tensor, nn
from torch.nn import functional

from volta_components.errors import InputError
from volta_components.method.air import packed_block
from volta_components.method.monai_versions import settle_cross_attention
from volta_components.method.projection import ProjectionHead, TokenLogits
from volta_components.method.summariser import ClsSummariser, check_heads

# Twenty times ViT-giant; 160 GB in float32.
MOST_WEIGHTS = 40e9


class VoltaViT(ViTAutoEnc):
    """MONAI's ``ViTAutoEnc`` with a CLS-style summariser, for inputs of any size that the patch size divides.

    The stock class runs at one input size only, returns a tuple, and has no summary token; this one keeps all of its
    state-dict keys (so that encoders move to ``ViTAutoEnc``, ``UNETR.vit`` and back) and adds ``summariser.*``.
    Attention is computed by ``scaled_dot_product_attention``, which saves the attention map of every layer. TorchScript
    can script it (``torch.jit.script``); the scripted network takes inputs of any size as well.

    Args:
        in_channels: image channels.
        img_size: size ``(D, H, W)`` in voxels for which position embeddings are learned.
        patch_size: voxels a patch along each axis; each must be a square number (4, 9, 16) for the decoder.
        hidden_size: token size.
        mlp_dim: hidden size of each block's MLP.
        num_layers: transformer blocks.
        num_heads: attention heads of each block.
        summary_heads: attention heads of the summariser; 8 in the paper.
        decoder: keep the convolutional decoder; encoders for downstream tasks and the teacher need none.

    Raises:
        InputError: if the patch does not divide the image, the heads do not share ``hidden_size``, or the network would
            be too large for any machine (see ``check_sizes``).
    """

    def __init__(
        self,
        in_channels: int = 1,
        img_size: Sequence[int] = (144, 192, 192),
        patch_size: Sequence[int] = (16, 16, 16),
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        summary_heads: int = 8,
        decoder: bool = True,
    ) -> None:
        check_divides(img_size, patch_size)
        check_sizes(img_size, patch_size, hidden_size, mlp_dim, num_layers, in_channels)
        check_heads(hidden_size, num_heads)
        if any(math.isqrt(side) ** 2 != side for side in patch_size):
            raise InputError(f"patch_size {tuple(patch_size)}: ViTAutoEnc's decoder needs square numbers (4, 9, 16)")
        sizes: dict[str, Any] = {
            "in_channels": in_channels,
            "img_size": list(img_size),
            "patch_size": list(patch_size),
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
        }
        super().__init__(**sizes, proj_type="conv")
        self.config = {**sizes, "summary_heads": summary_heads}
        self.grid = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        self.summariser = ClsSummariser(hidden_size, summary_heads, mlp_dim)
        if not decoder:
            self.drop_decoder()
        for block in self.blocks:
            block.attn.use_flash_attention = True  # type: ignore[union-attr]
        settle_cross_attention(self)

    def compile_blocks(self) -> None:
        """Compile the transformer blocks, once for each size of input; names and numbers of weights do not change."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def drop_paths(self, rate: float) -> None:
        """Stochastic depth (Huang et al., 2016): in training, a block's branches are left out for some images.

        Where MONAI's blocks have dropout; weights keep their names.

        Args:
            rate: of the last block, in [0, 1]; it rises evenly from 0 at the first one.
        """
        for block, share in zip(self.blocks, torch.linspace(0, rate, len(self.blocks)).tolist(), strict=True):
            block.attn.drop_output, block.mlp.drop2 = DropPath(share), DropPath(share)  # type: ignore[union-attr]

    def drop_decoder(self) -> None:
        """Remove the decoder, if there is one; ``decode`` cannot be called any more."""
        for name in ("conv3d_transpose", "conv3d_transpose_1"):
            self._modules.pop(name, None)

    def token_grid(self, image: Tensor) -> tuple[int, int, int]:
        """Tokens along each axis for an image ``[B, C, D, H, W]``."""
        if not torch.jit.is_scripting():
            check_divides(image.shape[2:], self.patch_size)
        patch = self.patch_size
        return image.size(2) // patch[0], image.size(3) // patch[1], image.size(4) // patch[2]

    def _embed(self, image: Tensor) -> Tensor:
        grid = self.token_grid(image)
        # The strided convolution as one matrix product: the same numbers, and several times faster on CPUs.
        convolution = self.patch_embedding.patch_embeddings
        patches = image.unflatten(4, [grid[2], -1]).unflatten(3, [grid[1], -1]).unflatten(2, [grid[0], -1])
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        weight = convolution.weight.flatten(1)  # type: ignore[operator]
        tokens = functional.linear(patches, weight, convolution.bias)  # type: ignore[arg-type]
        position: Tensor = self.patch_embedding.position_embeddings
        if torch.jit.is_scripting():
            # Without gradient, interpolation gives the same as the product with a matrix does.
            volume = position.transpose(1, 2).unflatten(2, [self.grid[0], self.grid[1], self.grid[2]])
            size = [grid[0], grid[1], grid[2]]
            volume = functional.interpolate(volume, size=size, mode="trilinear", align_corners=False)
            position = volume.flatten(2).transpose(1, 2)
        else:
            position = resample_position_embedding(position, self.grid, grid)
        return self.patch_embedding.dropout(tokens + position)

    def encode(self, image: Tensor, places: Tensor | None = None) -> Tensor:
        """Final normalised patch tokens ``[B, N, D]`` of an image ``[B, C, D, H, W]``.

        With ``places`` ``[n]`` of the grid, only the patches there take part, and have tokens ``[B, n, D]``.
        """
        tokens = self._embed(image)
        if places is not None:
            tokens = tokens[:, places]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def summaries_of_some(self, image: Tensor, kept: Tensor) -> Tensor:
        """Summaries ``[B, D]`` of images, of each of which some patches take part: ``[B, N]``, true, on the host."""
        lengths = kept.sum(dim=1).tolist()
        places = kept.flatten().nonzero()[:, 0]
        places = places.pin_memory() if image.is_cuda else places
        tokens = self._embed(image).flatten(0, 1)[places.to(image.device, non_blocking=True)]
        for block in self.blocks:
            tokens = packed_block(block, tokens, lengths)  # type: ignore[arg-type]
        return torch.cat([self.summarise(own[None]) for own in self.norm(tokens).split(lengths)])

    def voxels_of(self, places: Tensor, size: Sequence[int]) -> Tensor:
        """Whether a voxel of an image of a size lies in a patch at one of some places of the grid, ``[D, H, W]``."""
        grid = [side // patch for side, patch in zip(size, self.patch_size, strict=True)]
        volume = torch.zeros(math.prod(grid), dtype=torch.bool, device=places.device)
        volume = volume.index_fill(0, places, True).view(grid)
        for axis, patch in enumerate(self.patch_size):
            volume = volume.repeat_interleave(patch, dim=axis)
        return volume

    def decode(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Reconstruct an image ``[B, C, D, H, W]`` from tokens ``[B, N, D]`` on a token grid.

        Both transposed convolutions are matrix products, as no two of their outputs overlap: the same numbers, and a
        GPU has no fast kernel for the gradient of the last one's weight.
        """
        first, second = self.conv3d_transpose, self.conv3d_transpose_1
        sides = [math.isqrt(patch) for patch in self.patch_size]
        count = math.prod(sides)
        weight = first.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)
        hidden = functional.linear(tokens, weight, first.bias.repeat(count)).unflatten(2, (count, -1))
        weight = second.weight.flatten(1).T
        volume = functional.linear(hidden, weight, second.bias.repeat_interleave(count))
        volume = volume.unflatten(3, (-1, *sides)).unflatten(2, sides).unflatten(1, tuple(grid))
        # The grid's axes, the first convolution's, channels, the second one's.
        volume = volume.permute(0, 7, 1, 4, 8, 2, 5, 9, 3, 6, 10)
        return volume.reshape(*volume.shape[:2], *[side * patch for side, patch in zip(grid, self.patch_size)])

    def summarise(self, tokens: Tensor) -> Tensor:
        """Summary ``[B, D]`` of patch tokens ``[B, N, D]``."""
        return self.summariser(tokens)

    def attention_on_voxels(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Where the summary looks, on the voxels of the image that the tokens are of: ``[B, 1, D, H, W]``, mean 1."""
        grid = self.token_grid(image)
        weights = self.summariser.attention(tokens).unflatten(1, grid)[:, None] * math.prod(grid)
        return functional.interpolate(weights.float(), size=image.shape[2:], mode="trilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embedding ``[B, D]`` of an image ``[B, C, D, H, W]``: one tensor, as MONAI's bundle tools expect."""
        return self.summarise(self.encode(x))


def resample_position_embedding(embedding: Tensor, grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Resample a position embedding ``[1, prod(grid), D]`` to another token grid (trilinear, ``align_corners=False``).

    Raises:
        InputError: if it is not of its grid.
    """
    if embedding.shape[1] != math.prod(grid):
        raise InputError(
            f"position embedding of {embedding.shape[1]} tokens does not fit a grid of {'x'.join(map(str, grid))}; "
            "give the grid (image size / patch size) it was trained on"
        )
    if tuple(grid) == tuple(new_grid):
        return embedding
    weights = _resampling_weights(tuple(grid), tuple(new_grid), embedding.device)
    with torch.autocast(embedding.device.type, enabled=False):
        return (weights @ embedding.float()).to(embedding.dtype)


@functools.lru_cache(maxsize=16)
def _resampling_weights(grid: tuple[int, ...], new_grid: tuple[int, ...], device: torch.device) -> Tensor:
    """How much each new token takes of each old one, ``[N_new, N_old]``: each old token's unit volume, resampled.

    A product with a fixed matrix has a gradient that is the same in every run; that of ``interpolate`` is not on CUDA.
    """
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(math.prod(grid)).view(-1, 1, *grid)
        resampled = functional.interpolate(units, size=new_grid, mode="trilinear", align_corners=False)
        return resampled.flatten(1).T.contiguous().to(device)


def check_divides(size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Refuse a size that the patch does not divide."""
    if isinstance(patch_size, int):
        raise InputError(f"patch_size {patch_size}: give three numbers, such as [16,16,16]")
    if len(size) != len(patch_size) or any(side % patch or side < patch for side, patch in zip(size, patch_size)):
        raise InputError(
            f"image size {tuple(int(side) for side in size)} cannot be cut into patches of {tuple(patch_size)}; "
            "choose a size that is a multiple of the patch along each axis"
        )


def check_sizes(
    img_size: Sequence[int],
    patch_size: Sequence[int],
    hidden_size: int,
    mlp_dim: int,
    num_layers: int,
    in_channels: int = 1,
) -> None:
    """Refuse a ViT that no machine could hold, before memory is taken for it.

    Args:
        img_size: voxels along each axis.
        patch_size: voxels of a patch along each axis.
        hidden_size: token size.
        mlp_dim: hidden size of each block's MLP.
        num_layers: transformer blocks.
        in_channels: image channels.

    Raises:
        InputError: if a number is not a positive whole one, or the weights would be more than ``MOST_WEIGHTS``.
    """
    sizes = {"hidden_size": hidden_size, "mlp_dim": mlp_dim, "num_layers": num_layers, "in_channels": in_channels}
    wrong = [f"{name} {size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: not positive whole numbers; correct the config or the encoder's JSON")
    voxels = in_channels * math.prod(patch_size)
    tokens = math.prod(img_size) // math.prod(patch_size)
    weights = num_layers * hidden_size * (4 * hidden_size + 2 * mlp_dim) + hidden_size * (tokens + voxels)
    if weights > MOST_WEIGHTS:
        numbers = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"{numbers}, img_size {tuple(img_size)}: a network of {weights:.0e} weights; correct the config or the "
            "encoder's JSON"
        )


class GlobalOutput(NamedTuple):
    """A network's outputs for global crops.

    Attributes:
        summary: ``[V, D]``, the CLS-style token.
        logits: ``[V, K]`` of the summary.
        patch_logits: ``[V, N, K]`` of every patch token, not multiplied out.
    """

    summary: Tensor
    logits: Tensor
    patch_logits: TokenLogits


class StudentOutput(NamedTuple):
    """The student's outputs for masked global crops.

    Attributes:
        globals_: ``V = 2B``.
        reconstruction: ``[2B, 1, D, H, W]``.
    """

    globals_: GlobalOutput
    reconstruction: Tensor


class VoltaStudent(nn.Module):
    """Network and projection head.

    Global and local crops pass one after the other, each with its own backward pass, so that only one of them has to
    be remembered. Distributed data-parallel training sends gradients through ``forward`` alone; it is the last of the
    two, and uses every parameter. The plain network (``network``), with its single output, is what bundles share.
    """

    def __init__(self, network: VoltaViT, head: ProjectionHead) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def globals_(self, image: Tensor, places: Tensor | None = None) -> tuple[GlobalOutput, Tensor]:
        """Outputs of global crops ``[V, 1, D, H, W]``, and their tokens ``[V, N, D]``, or of some places only."""
        tokens = self.network.encode(image, places)
        summary = self.network.summarise(tokens)
        logits = self.head.patches(tokens)._replace(places=places, total=math.prod(self.network.token_grid(image)))
        return GlobalOutput(summary, self.head(summary), logits), tokens

    def local_logits(self, crops: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits ``[L * B, K]`` of summaries of local crops ``[L * B, 1, d, h, w]``, or of some tokens of each."""
        return self.head(self.network(crops) if kept is None else self.network.summaries_of_some(crops, kept))

    def forward(self, global_crops: Tensor, places: Tensor | None = None) -> StudentOutput:
        """Pass over masked global crops ``[2B, 1, D, H, W]``; what is restored at places left out means nothing."""
        output, tokens = self.globals_(global_crops, places)
        grid = self.network.token_grid(global_crops)
        if places is not None:
            empty = tokens.new_zeros(len(tokens), math.prod(grid), tokens.shape[2])
            tokens = empty.index_copy(1, places, tokens)
        return StudentOutput(output, self.network.decode(tokens, grid))


class VoltaTeacher(VoltaStudent):
    """Gives targets for the student's outputs; has no gradients and follows the student by ``TeacherEMAHandler``."""

    def __init__(self, network: VoltaViT, head: ProjectionHead) -> None:
        super().__init__(network, head)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(  # type: ignore[override]
        self, global_crops: Tensor, places: Tensor | None = None
    ) -> GlobalOutput:
        """Outputs of unmasked global crops ``[2B, 1, D, H, W]``, of all tokens or those at some places."""
        return self.globals_(global_crops, places)[0]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for the optimiser: with weight decay, and without. ``decayed`` says so, as a decay may begin at 0.

    Biases, norms, the position embedding, the CLS-style token and frozen parameters are not decayed (``method.md``,
    section 6; as DINO).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith(("position_embeddings", "cls_token"))
        (plain if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "decayed": True},
        {"params": plain, "weight_decay": 0.0, "decayed": False},
    ]


def make_teacher(student: VoltaStudent) -> VoltaTeacher:
    """A teacher that starts as an exact copy of the student, without decoder, where the student is."""
    network = copy.deepcopy(student.network)
    network.drop_decoder()
    return VoltaTeacher(network, copy.deepcopy(student.head))
