# SPDX-License-Identifier: Apache-2.0
"""Networks against MONAI's stock classes, PyTorch's own attention and SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from method_helpers import HIDDEN, IMAGE, PATCH, PROTOTYPES, TOKENS, flat, tiny_network, tiny_student
from monai.networks.nets import UNETR, ViTAutoEnc
from scipy import ndimage
from torch import nn

from volta_components.errors import InputError
from volta_components.method.losses import CentredTargets, GlobalAlignmentLoss, PatchAlignmentLoss, ReconstructionLoss
from volta_components.method.networks import (
    VoltaViT,
    make_teacher,
    parameter_groups,
    resample_position_embedding,
)
from volta_components.method.projection import ProjectionHead


def stock(network: VoltaViT) -> ViTAutoEnc:
    """MONAI's class with the network's weights."""
    config = network.config
    twin = ViTAutoEnc(
        in_channels=1,
        img_size=tuple(config["img_size"]),
        patch_size=tuple(config["patch_size"]),
        hidden_size=config["hidden_size"],
        mlp_dim=config["mlp_dim"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        proj_type="conv",
    )
    missing, unexpected = twin.load_state_dict(network.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("summariser.") for name in unexpected)
    return twin.eval()


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def block_parameters(hidden: int, mlp: int) -> int:
    """A transformer block: attention (no bias on q, k, v), MLP, two norms."""
    return 3 * hidden**2 + hidden**2 + hidden + 2 * hidden * mlp + mlp + hidden + 4 * hidden


@pytest.mark.slow
def test_the_papers_size_moves_to_monai(capsys: pytest.CaptureFixture[str]) -> None:
    network = VoltaViT()
    hidden, mlp, patch, tokens = 768, 3072, 16**3, 9 * 12 * 12
    expected = {
        "patch_embedding": hidden * patch + hidden + tokens * hidden,
        "blocks": 12 * (block_parameters(hidden, mlp) + 2 * hidden),  # and MONAI's unused norm_cross_attn
        "norm": 2 * hidden,
        "summariser": hidden + block_parameters(hidden, mlp),
        "conv3d_transpose": hidden * 16 * 4**3 + 16,
        "conv3d_transpose_1": 16 * 4**3 + 1,
    }
    counts = {name: count_parameters(part) for name, part in network.named_children()}
    assert counts == expected
    head = ProjectionHead()
    layers = 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert count_parameters(head) == layers + 2 * (8192 * 256 + 8192)

    state = network.state_dict()
    encoder = {name for name in state if not name.startswith(("summariser.", "conv3d_transpose"))}
    decoder = {name for name in state if name.startswith("conv3d_transpose")}
    with torch.device("meta"):  # key for key and shape for shape, without memory
        unetr = UNETR(1, 3, (144, 192, 192), proj_type="conv").vit.state_dict()
        auto = ViTAutoEnc(1, (144, 192, 192), (16, 16, 16), proj_type="conv").state_dict()
    assert set(unetr) == encoder
    assert set(auto) == encoder | decoder
    assert all(state[name].shape == value.shape for name, value in (unetr | auto).items())
    with capsys.disabled():
        print(f"\nViT-B at 144x192x192: {sum(counts.values()):,} parameters: {counts}, head {count_parameters(head):,}")
        print(f"state-dict keys: UNETR.vit {len(unetr)}, ViTAutoEnc {len(auto)}, VoltaViT {len(state)}")


def test_weights_load_into_unetr_and_stock_class() -> None:
    network = tiny_network(
        img_size=(32, 48, 48), patch_size=(16, 16, 16), hidden_size=24, mlp_dim=32, num_layers=12, num_heads=2
    ).eval()
    unetr = UNETR(1, 3, (32, 48, 48), hidden_size=24, mlp_dim=32, num_heads=2, feature_size=4, proj_type="conv").eval()
    missing, unexpected = unetr.vit.load_state_dict(network.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith(("summariser.", "conv3d_transpose")) for name in unexpected)
    image = torch.rand(1, 1, 32, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(unetr.vit(image)[0], network.encode(image), atol=1e-5, rtol=1e-4)


def test_encode_and_decode_equal_the_stock_class() -> None:
    network = tiny_network().eval()
    with torch.no_grad():
        network.patch_embedding.position_embeddings.normal_()
        image = torch.rand(2, 1, *IMAGE)
        twin = stock(network)
        restored, hidden = twin(image)
        tokens = network.encode(image)
        assert tokens.shape == (2, TOKENS, HIDDEN)
        torch.testing.assert_close(tokens, twin.norm(hidden[-1]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network.decode(tokens, (2, 3, 3)), restored, atol=1e-5, rtol=1e-4)
        assert network(image).shape == (2, HIDDEN)
        torch.testing.assert_close(network(image), network.summarise(tokens))


def test_other_sizes_use_the_resampled_position_embedding() -> None:
    network = tiny_network().eval()
    other = tiny_network(img_size=(12, 8, 16)).eval()
    with torch.no_grad():
        network.patch_embedding.position_embeddings.normal_()
        state = network.state_dict()
        state["patch_embedding.position_embeddings"] = resample_position_embedding(
            network.patch_embedding.position_embeddings, (2, 3, 3), (3, 2, 4)
        )
        other.load_state_dict(state)
        image = torch.rand(1, 1, 12, 8, 16)
        torch.testing.assert_close(network.encode(image), other.encode(image), atol=1e-5, rtol=1e-4)
        assert network.decode(network.encode(image), network.token_grid(image)).shape == image.shape


@pytest.mark.parametrize(
    ("grid", "new"),
    [((9, 12, 12), (6, 6, 6)), ((3, 3, 3), (9, 12, 12)), ((2, 3, 4), (4, 3, 2)), ((2, 2, 2), (1, 5, 2))],
)
def test_position_embedding_equals_scipy(rng: np.random.Generator, grid: Sequence[int], new: Sequence[int]) -> None:
    embedding = rng.normal(size=(*grid, 5))
    tensor = torch.tensor(embedding.reshape(1, -1, 5), dtype=torch.float32)
    actual = resample_position_embedding(tensor, grid, new).numpy().reshape(*new, 5)
    for channel in range(5):
        # Cell centres, edges held: linear interpolation with align_corners=False.
        indices = [np.clip((np.arange(n) + 0.5) * g / n - 0.5, 0, g - 1) for g, n in zip(grid, new)]
        expected = ndimage.map_coordinates(embedding[..., channel], np.meshgrid(*indices, indexing="ij"), order=1)
        np.testing.assert_allclose(actual[..., channel], expected, atol=1e-5)


def test_position_embedding_is_untouched_on_equal_grids() -> None:
    embedding = torch.randn(1, 18, 5)
    assert resample_position_embedding(embedding, (2, 3, 3), [2, 3, 3]) is embedding
    half = resample_position_embedding(embedding.bfloat16(), (2, 3, 3), (4, 3, 3))
    assert half.dtype == torch.bfloat16
    with pytest.raises(InputError, match="18 tokens does not fit a grid of 3x3x3"):
        resample_position_embedding(embedding, (3, 3, 3), (2, 2, 2))


def test_attention_sums_to_one_and_its_map_has_the_images_size() -> None:
    network = tiny_network().eval()
    image = torch.rand(2, 1, 16, 8, 12)
    with torch.no_grad():
        tokens = network.encode(image)
        weights = network.summariser.attention(tokens)
        assert weights.shape == (2, 4 * 2 * 3)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
        assert (weights >= 0).all()
        volume = network.attention_on_voxels(tokens, image)
    assert volume.shape == image.shape
    torch.testing.assert_close(volume.mean(dim=(1, 2, 3, 4)), torch.ones(2))
    # Where the map reaches its peak, the token there is the one that is looked at most.
    for item in range(2):
        peak = np.unravel_index(int(volume[item, 0].argmax()), volume.shape[2:])
        token = np.ravel_multi_index([p // q for p, q in zip(peak, PATCH)], (4, 2, 3))
        assert weights[item, token] == weights[item].max()


def test_every_trainable_parameter_gets_a_gradient_from_the_losses() -> None:
    """Distributed training waits for the gradient of each of them."""
    student = tiny_student()
    teacher = make_teacher(student)
    crops, local = torch.rand(2, 1, *IMAGE), torch.rand(3, 1, 8, 8, 8)
    out, taught = student(crops), teacher(crops)
    logits = torch.cat([out.globals_.logits, student.local_logits(local)])[:, None]
    loss = (
        GlobalAlignmentLoss(CentredTargets(PROTOTYPES))(logits, taught.logits[:, None], 0.04)
        + PatchAlignmentLoss(CentredTargets(PROTOTYPES))(out.globals_.patch_logits, taught.patch_logits, 0.04)
        + 100 * ReconstructionLoss()(out.reconstruction, crops, torch.rand_like(crops) < 0.5)
    )
    loss.backward()
    trainable = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trainable.items() if gradient is None or not gradient.any()] == []
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert {name.split(".")[-2] for name in frozen} == {"norm_cross_attn", "weight"}
    assert all(p.grad is None for p in teacher.parameters())


def test_a_new_teacher_is_the_student() -> None:
    student = tiny_student()
    teacher = make_teacher(student)
    mine, theirs = flat(teacher), flat(student)
    assert theirs.keys() - mine.keys() == {name for name in theirs if name.startswith("network.conv3d_transpose")}
    assert all(np.array_equal(value, theirs[name]) for name, value in mine.items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {id(p) for p in teacher.parameters()}.isdisjoint({id(p) for p in student.parameters()})


def test_the_teacher_is_made_where_the_student_is() -> None:
    student = tiny_student().to("meta")
    assert {p.device.type for p in make_teacher(student).parameters()} == {"meta"}


def test_student_output() -> None:
    student = tiny_student().eval()
    crops, local = torch.rand(4, 1, *IMAGE), torch.rand(3, 1, 8, 4, 8)
    with torch.no_grad():
        out = student(crops)
        assert out.globals_.summary.shape == (4, HIDDEN)
        assert out.globals_.logits.shape == (4, PROTOTYPES)
        assert out.globals_.patch_logits.rows().shape == (4 * TOKENS, PROTOTYPES)
        assert student.local_logits(local).shape == (3, PROTOTYPES)
        assert out.reconstruction.shape == crops.shape
        taught = make_teacher(student)(crops)
    for mine, theirs in zip(out.globals_, taught):
        torch.testing.assert_close(mine, theirs)


def test_which_parameters_are_decayed() -> None:
    student = tiny_student()
    groups = parameter_groups(student, 0.04)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.04, 0.0]
    assert "network.patch_embedding.position_embeddings" in plain
    assert "network.summariser.cls_token" in plain
    for name in decayed | plain:
        leaf = name.split(".")[-1]
        is_matrix = leaf in ("weight", "original1") and "norm" not in name
        assert (name in decayed) == is_matrix, name
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert not frozen & (decayed | plain)
    assert decayed | plain | frozen == set(names.values())


def test_errors_name_size_and_remedy() -> None:
    with pytest.raises(InputError, match=r"\(10, 12, 12\).*patches of \(4, 4, 4\).*multiple"):
        tiny_network(img_size=(10, 12, 12))
    with pytest.raises(InputError, match=r"\(8, 8, 8\).*square numbers \(4, 9, 16\)"):
        tiny_network(img_size=(16, 16, 16), patch_size=(8, 8, 8))
    with pytest.raises(InputError, match=r"\(8, 12, 13\)"):
        tiny_network().encode(torch.rand(1, 1, 8, 12, 13))
    with pytest.raises(InputError, match="hidden_size 32 is not divisible by summary_heads 5"):
        tiny_network(summary_heads=5)


def test_sizes_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InputError, match="hidden_size 64 is not divisible by num_heads 5"):
        VoltaViT(img_size=(32, 32, 32), hidden_size=64, mlp_dim=64, num_layers=1, num_heads=5)
    with pytest.raises(InputError, match="patch_size 5: give three numbers"):
        VoltaViT(img_size=(32, 32, 32), patch_size=5)  # type: ignore[arg-type]


def test_dropped_paths() -> None:
    """At rate 1 the last of two blocks is left out, the first never; while scoring, and by name, nothing changes."""
    network, image = tiny_network(), torch.rand(3, 1, *IMAGE)
    names, whole = list(network.state_dict()), network.eval().encode(image)
    first = network.norm(network.blocks[0](network._embed(image)))
    network.drop_paths(1.0)
    torch.testing.assert_close(network.train().encode(image), first)
    torch.testing.assert_close(network.eval().encode(image), whole)
    assert list(network.state_dict()) == names
    # Of many images, half keep each branch of the last block, and those are twice as strong.
    network.drop_paths(0.5)
    tokens = torch.rand(1, 5, HIDDEN).expand(400, -1, -1)
    block = network.train().blocks[1]
    added = block.attn.drop_output(tokens).flatten(1)  # type: ignore[union-attr]
    is_kept = added.any(dim=1)
    assert 160 < int(is_kept.sum()) < 240
    torch.testing.assert_close(added[is_kept], 2 * tokens.flatten(1)[is_kept])


def test_decoder_can_be_left_out() -> None:
    small, whole = tiny_network(decoder=False), tiny_network()
    assert set(whole.state_dict()) - set(small.state_dict()) == {
        f"conv3d_transpose{part}.{leaf}" for part in ("", "_1") for leaf in ("weight", "bias")
    }
    assert small.config == whole.config
    assert math.prod(small.grid) == TOKENS
