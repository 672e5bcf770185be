# SPDX-License-Identifier: Apache-2.0
"""The networks of VolTA-3D: encoder with summariser and decoder, projection head, and the student for training."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.networks.blocks.mlp import MLPBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets import ViTAutoEnc
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from volta_components.errors import InputError


def resample_position_embedding(embedding: Tensor, grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Resample a learned position embedding from one token grid to another (trilinear, ``align_corners=False``).

    Args:
        embedding: ``[1, N, D]`` with ``N = prod(grid)``.
        grid: token counts along each axis that the embedding was learned for.
        new_grid: token counts along each axis that are wanted.

    Returns:
        ``[1, prod(new_grid), D]``; the input itself when both grids are equal.

    Raises:
        InputError: if ``N`` is not ``prod(grid)``.
    """
    if embedding.shape[1] != math.prod(grid):
        raise InputError(
            f"position embedding of {embedding.shape[1]} tokens does not fit a grid of {'x'.join(map(str, grid))}; "
            "give the grid (image size / patch size) it was trained on"
        )
    if tuple(grid) == tuple(new_grid):
        return embedding
    volume = embedding.transpose(1, 2).reshape(1, -1, *grid)
    # float32: the CPU kernel has no bfloat16, and the cost is that of a few thousand tokens.
    volume = functional.interpolate(volume.float(), size=tuple(new_grid), mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(embedding.dtype)


def _unused_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Cross-attention of MONAI's transformer blocks that are without it, and its norm, by name."""
    for name, block in network.named_modules():
        if isinstance(block, TransformerBlock) and not block.with_cross_attention:
            for child in ("cross_attn", "norm_cross_attn"):
                if hasattr(block, child):
                    yield f"{name}.{child}" if name else child, getattr(block, child)


def freeze_cross_attention(network: nn.Module) -> None:
    """Freeze the cross-attention that MONAI's blocks register and never use, for whose gradient DDP would wait."""
    for _, module in _unused_modules(network):
        module.requires_grad_(False)


def fit_cross_attention(state: Mapping[str, Any], network: nn.Module, prefix: str = "") -> dict[str, Any]:
    """A state dict that another version of MONAI wrote, with the cross-attention weights that this version registers.

    MONAI's ``TransformerBlock`` has weights of cross-attention even where it never uses them: 1.5 whole attention
    blocks, 1.6 only their norm. Those that the network has no place for are left out, and those that the state dict
    lacks are the network's own; nothing that a network computes depends on either. Every other key stays.

    Args:
        state: the state dict.
        network: the network it is for, or a part of it.
        prefix: of that part's keys in the state dict.
    """
    unused = tuple(f"{prefix}{name}." for name, _ in _unused_modules(network))
    own = {name: value for name, value in network.state_dict(prefix=prefix).items() if name.startswith(unused)}
    fitted = {name: value for name, value in state.items() if name in own or not name.startswith(unused)}
    return {**own, **fitted}


def _fit_before_loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    fitted = fit_cross_attention(state, module, prefix)
    state.clear()
    state.update(fitted)


def settle_cross_attention(network: nn.Module) -> None:
    """Keep cross-attention that is never used out of training, and out of what a state dict must have.

    From then on ``load_state_dict``, strict or not, takes state dicts of MONAI 1.5 and 1.6 alike; see
    ``fit_cross_attention``.

    Args:
        network: with MONAI's transformer blocks in it.
    """
    freeze_cross_attention(network)
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            block.register_load_state_dict_pre_hook(_fit_before_loading)


class ClsSummariser(nn.Module):
    """CLS-style summariser (paper, section II-B): a learned token that attends to all patch tokens.

    A trainable ``[1, 1, D]`` token is expanded to the batch and prepended to the patch tokens; one transformer block
    (LayerNorm, multi-head self-attention, residual, LayerNorm, GELU MLP, residual) follows. Only the summary's own row
    of the block is computed, since the block's patch outputs are discarded: the same number for ``1/N`` of the cost.
    MONAI's ``TransformerBlock`` computes every row, hence a module of our own around its ``SABlock`` and ``MLPBlock``.

    Args:
        hidden_size: token size ``D``.
        num_heads: attention heads; 8 in the paper.
        mlp_dim: hidden size of the MLP.

    Raises:
        InputError: if ``hidden_size`` is not divisible by ``num_heads``.
    """

    def __init__(self, hidden_size: int = 768, num_heads: int = 8, mlp_dim: int = 3072) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads, "summary_heads")
        self.num_heads = num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = SABlock(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = MLPBlock(hidden_size, mlp_dim)

    def _query_key_value(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        sequence = self.norm1(torch.cat([cls_token, tokens], dim=1))
        weight = self.attn.qkv.weight
        assert isinstance(weight, Tensor)
        size = cls_token.shape[-1]
        query = functional.linear(sequence[:, :1], weight[:size])
        key, value = functional.linear(sequence, weight[size:]).chunk(2, dim=-1)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        return cls_token, heads(query), heads(key), heads(value)

    def forward(self, tokens: Tensor) -> Tensor:
        """Summarise patch tokens ``[B, N, D]`` into ``[B, D]``."""
        cls_token, query, key, value = self._query_key_value(tokens)
        attended = functional.scaled_dot_product_attention(query, key, value)
        summary = cls_token + self.attn.out_proj(attended.transpose(1, 2).flatten(2))
        summary = summary + self.mlp(self.norm2(summary))
        return summary[:, 0]

    def attention(self, tokens: Tensor) -> Tensor:
        """Attention of the summary to each patch token, averaged over heads.

        Args:
            tokens: ``[B, N, D]``.

        Returns:
            ``[B, N]``, non-negative; the share that the summary gives to itself is left out and the rest sums to 1.
        """
        _, query, key, _ = self._query_key_value(tokens)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        weights = weights.mean(dim=1)[:, 0, 1:]
        return weights / weights.sum(dim=-1, keepdim=True)


class VoltaViT(ViTAutoEnc):
    """MONAI's ``ViTAutoEnc`` with a CLS-style summariser, for inputs of any size that the patch size divides.

    The stock class runs at one input size only, returns a tuple, and has no summary token; this one keeps all of its
    state-dict keys (so that encoders move to ``ViTAutoEnc``, ``UNETR.vit`` and back) and adds ``summariser.*``.
    Attention is computed by ``scaled_dot_product_attention``, which saves the attention map of every layer.

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
        InputError: if the patch does not divide the image, or the heads do not share ``hidden_size``.
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
        _check_divides(img_size, patch_size)
        check_heads(hidden_size, num_heads)
        if any(math.isqrt(side) ** 2 != side for side in patch_size):
            raise InputError(f"patch_size {tuple(patch_size)}: ViTAutoEnc's decoder needs square numbers (4, 9, 16)")
        super().__init__(
            in_channels=in_channels,
            img_size=tuple(img_size),
            patch_size=tuple(patch_size),
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            proj_type="conv",
        )
        self.config = {
            "in_channels": in_channels,
            "img_size": list(img_size),
            "patch_size": list(patch_size),
            "hidden_size": hidden_size,
            "mlp_dim": mlp_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "summary_heads": summary_heads,
        }
        self.grid = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        self.summariser = ClsSummariser(hidden_size, summary_heads, mlp_dim)
        if not decoder:
            del self.conv3d_transpose, self.conv3d_transpose_1
        for block in self.blocks:
            block.attn.use_flash_attention = True  # type: ignore[union-attr]
        settle_cross_attention(self)

    def token_grid(self, image: Tensor) -> tuple[int, int, int]:
        """Tokens along each axis for an image ``[B, C, D, H, W]``."""
        size = image.shape[2:]
        _check_divides(size, self.patch_size)
        depth, height, width = (int(side) // patch for side, patch in zip(size, self.patch_size))
        return depth, height, width

    def _embed(self, image: Tensor) -> Tensor:
        grid = self.token_grid(image)
        # The strided convolution as one matrix product: the same numbers, and several times faster on CPUs.
        convolution = self.patch_embedding.patch_embeddings
        assert isinstance(convolution, nn.Conv3d)
        patches = image.unflatten(4, (grid[2], -1)).unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        tokens = functional.linear(patches, convolution.weight.flatten(1), convolution.bias)
        position = resample_position_embedding(self.patch_embedding.position_embeddings, self.grid, grid)
        return self.patch_embedding.dropout(tokens + position)

    def encode(self, image: Tensor) -> Tensor:
        """Final normalised patch tokens ``[B, N, D]`` of an image ``[B, C, D, H, W]``."""
        tokens = self._embed(image)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def decode(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Reconstruct an image ``[B, C, D, H, W]`` from tokens ``[B, N, D]`` on a token grid."""
        volume = tokens.transpose(1, 2).unflatten(2, tuple(grid))
        return self.conv3d_transpose_1(self.conv3d_transpose(volume))

    def summarise(self, tokens: Tensor) -> Tensor:
        """Summary ``[B, D]`` of patch tokens ``[B, N, D]``."""
        return self.summariser(tokens)

    def summary_attention(self, tokens: Tensor) -> Tensor:
        """Where the summary looks: ``[B, N]``, summing to 1."""
        return self.summariser.attention(tokens)

    def attention_on_voxels(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Where the summary looks, on the voxels of the image that the tokens are of: ``[B, 1, D, H, W]``, mean 1."""
        grid = self.token_grid(image)
        weights = self.summary_attention(tokens).unflatten(1, grid)[:, None] * math.prod(grid)
        return functional.interpolate(weights.float(), size=image.shape[2:], mode="trilinear", align_corners=False)

    def attention_map(self, image: Tensor) -> Tensor:
        """Where the summary looks in an image ``[B, C, D, H, W]``, on its voxels: ``[B, 1, D, H, W]``, mean 1."""
        return self.attention_on_voxels(self.encode(image), image)

    def forward(self, x: Tensor) -> Tensor:
        """Embedding ``[B, D]`` of an image ``[B, C, D, H, W]``: one tensor, as MONAI's bundle tools expect."""
        return self.summarise(self.encode(x))


def check_heads(hidden_size: int, num_heads: int, name: str = "num_heads") -> None:
    """Refuse a token size that the attention heads cannot share.

    Args:
        hidden_size: token size.
        num_heads: attention heads.
        name: what a config calls their number.

    Raises:
        InputError: if ``num_heads`` does not divide ``hidden_size``.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise InputError(f"hidden_size {hidden_size} is not divisible by {name} {num_heads}")


def _check_divides(size: Sequence[int], patch_size: Sequence[int]) -> None:
    if isinstance(patch_size, int):
        raise InputError(f"patch_size {patch_size}: three numbers are wanted, such as [16,16,16]")
    if len(size) != len(patch_size) or any(side % patch or side < patch for side, patch in zip(size, patch_size)):
        raise InputError(
            f"image size {tuple(int(side) for side in size)} cannot be cut into patches of {tuple(patch_size)}; "
            "choose a size that is a multiple of the patch along each axis"
        )


class ProjectionHead(nn.Module):
    """Projection branch (paper, section II-B): MLP, L2 normalisation, weight-normalised linear layer.

    The MLP is shared by the summary and the patch tokens; each has its own last layer. The gain of the weight
    normalisation is frozen at 1, so that logits are cosines in [-1, 1].

    Args:
        in_dim: token size.
        hidden_dim: width of the MLP's hidden layers.
        bottleneck_dim: size of the normalised vector.
        out_dim: prototypes, ``K``.
        num_layers: linear layers in the MLP.

    Source: head sizes as DINO (Caron et al., 2021, appendix C), the second last layer as MC-SSL (Atito et al., 2021).
    """

    def __init__(
        self,
        in_dim: int = 768,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 8192,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        sizes = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, next_size), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = self._last_layer(bottleneck_dim, out_dim)
        self.patch_last_layer = self._last_layer(bottleneck_dim, out_dim)
        self.out_dim = out_dim

    @staticmethod
    def _last_layer(bottleneck_dim: int, out_dim: int) -> nn.Module:
        layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        gain = layer.parametrizations.weight.original0
        nn.init.ones_(gain)
        gain.requires_grad_(False)
        return layer

    def project(self, tokens: Tensor) -> Tensor:
        """Unit vectors ``[..., bottleneck_dim]`` of tokens ``[..., D]``."""
        # float32: the norm of a bfloat16 vector is good to two digits only.
        return functional.normalize(self.mlp(tokens).float(), dim=-1, eps=1e-6)

    def forward(self, summary: Tensor) -> Tensor:
        """Logits ``[B, K]`` of summaries ``[B, D]``."""
        return self._logits(self.last_layer, summary)

    def patches(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, N, K]`` of patch tokens ``[B, N, D]``."""
        return self._logits(self.patch_last_layer, tokens)

    def _logits(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        unit = self.project(tokens)
        # float32 in mixed precision as well: the teacher's logits differ between subjects by less than bfloat16 rounds.
        with torch.autocast(unit.device.type, enabled=False):
            return layer(unit)


class GlobalOutput(NamedTuple):
    """What a network gives for global crops.

    Attributes:
        summary: ``[V, D]``, the CLS-style token.
        logits: ``[V, K]`` of the summary.
        patch_logits: ``[V, N, K]`` of every patch token.
    """

    summary: Tensor
    logits: Tensor
    patch_logits: Tensor


class StudentOutput(NamedTuple):
    """What the student gives in one pass.

    Attributes:
        globals_: of the masked global crops, ``V = 2B``.
        local_logits: ``[L * B, K]``; empty (0 rows) without local crops.
        reconstruction: ``[2B, 1, D, H, W]``.
    """

    globals_: GlobalOutput
    local_logits: Tensor
    reconstruction: Tensor


class VoltaStudent(nn.Module):
    """Network and projection head, with one ``forward`` that gives all that the losses need.

    Distributed data-parallel training sends gradients only through what ``forward`` of the wrapped module returns;
    the plain network (``network``), with its single output, is what bundles share.

    Args:
        network: encoder, summariser and (for the student) decoder.
        head: projection head.
    """

    def __init__(self, network: VoltaViT, head: ProjectionHead) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def globals_(self, image: Tensor) -> tuple[GlobalOutput, Tensor]:
        """Outputs of global crops ``[V, 1, D, H, W]``, and their tokens ``[V, N, D]``."""
        tokens = self.network.encode(image)
        summary = self.network.summarise(tokens)
        return GlobalOutput(summary, self.head(summary), self.head.patches(tokens)), tokens

    def forward(self, global_crops: Tensor, local_crops: Tensor) -> StudentOutput:
        """Pass over masked global crops ``[2B, 1, D, H, W]`` and clean local crops ``[L * B, 1, d, h, w]``."""
        output, tokens = self.globals_(global_crops)
        reconstruction = self.network.decode(tokens, self.network.token_grid(global_crops))
        local_logits = self.head(self.network(local_crops)) if len(local_crops) else output.logits[:0]
        return StudentOutput(output, local_logits, reconstruction)


class VoltaTeacher(VoltaStudent):
    """Exponential moving average of a student (paper, section II-B, knowledge distillation); has no gradients.

    Ignite's ``EMAHandler`` follows one module of one engine event and keeps its own counters; here the teacher is
    a module that is saved with the run and whose momentum is a function of the mini-batch.

    Args:
        network: as the student's, without decoder.
        head: as the student's.
    """

    def __init__(self, network: VoltaViT, head: ProjectionHead) -> None:
        super().__init__(network, head)
        self.requires_grad_(False)

    def copy_from(self, student: VoltaStudent) -> None:
        """Start as an exact copy of the student."""
        self.update(student, momentum=0.0)

    @torch.no_grad()
    def update(self, student: VoltaStudent, momentum: float) -> None:
        """``teacher = momentum * teacher + (1 - momentum) * student``, for every parameter.

        Args:
            student: the student, without any distributed wrapper.
            momentum: in [0, 1].
        """
        source = dict(student.named_parameters())
        mine = dict(self.named_parameters())
        names = list(mine)
        torch._foreach_lerp_([mine[n] for n in names], [source[n].detach() for n in names], 1.0 - momentum)

    @torch.no_grad()
    def forward(self, global_crops: Tensor) -> GlobalOutput:  # type: ignore[override]
        """Outputs of unmasked global crops ``[2B, 1, D, H, W]``."""
        return self.globals_(global_crops)[0]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for the optimiser: with weight decay, and without.

    Biases, norms, the position embedding, the CLS-style token and frozen parameters are not decayed (``method.md``,
    section 6; as DINO).

    Args:
        module: the module whose trainable parameters are grouped.
        weight_decay: decay of the first group.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith(("position_embeddings", "cls_token"))
        (plain if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def count_parameters(module: nn.Module) -> int:
    """Number of values in a module's parameters, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_teacher(student: VoltaStudent) -> VoltaTeacher:
    """A teacher with the student's architecture and weights, without decoder, where the student is."""
    network = VoltaViT(**student.network.config, decoder=False)  # type: ignore[arg-type]
    device = next(student.parameters()).device
    teacher = VoltaTeacher(network, copy.deepcopy(student.head)).to(device)
    teacher.copy_from(student)
    return teacher
