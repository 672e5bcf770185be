# SPDX-License-Identifier: Apache-2.0
"""Losses against NumPy implementations of the equations, written independently of the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import token_logits
from scipy.special import log_softmax, softmax
from torch.utils._python_dispatch import TorchDispatchMode

from volta_components.errors import InputError
from volta_components.method import cross_entropy
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.losses import (
    CentredTargets,
    DiCoMLoss,
    GlobalAlignmentLoss,
    PatchAlignmentLoss,
    ReconstructionLoss,
    SinkhornTargets,
)
from volta_components.method.networks import GlobalOutput, StudentOutput
from volta_components.method.projection import TokenLogits
from volta_components.method.statistics import entropy_share


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def tokens_of(array: np.ndarray) -> TokenLogits:
    return token_logits(as_tensor(array))


def numpy_global(student: np.ndarray, targets: np.ndarray, tau: float) -> float:
    """Eq. 2-3, term by term."""
    terms = []
    for i in range(len(targets)):
        for j in range(len(student)):
            if i != j:
                cross_entropy = [
                    -(targets[i, b] * log_softmax(student[j, b] / tau)).sum() for b in range(student.shape[1])
                ]
                terms.append(np.mean(cross_entropy))
    assert len(terms) == 2 * (len(student) - 1)
    return float(np.mean(terms))


def numerical_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize(("views", "batch"), [(2, 1), (5, 3), (10, 1), (3, 4)])
def test_global_loss_and_centre_over_steps(rng: np.random.Generator, views: int, batch: int) -> None:
    prototypes, momentum, tau = 7, 0.9, 0.1
    loss = GlobalAlignmentLoss(CentredTargets(prototypes, momentum), tau)
    centre = np.zeros(prototypes)
    for step in range(5):
        student = rng.uniform(-1, 1, (views, batch, prototypes))
        teacher = rng.uniform(-1, 1, (2, batch, prototypes)) + 0.3
        temperature = 0.04 + 0.01 * step
        expected = numpy_global(student, softmax((teacher - centre) / temperature, axis=-1), tau)
        assert loss(as_tensor(student), as_tensor(teacher), temperature).item() == pytest.approx(expected, rel=1e-5)
        mean = teacher.mean(axis=(0, 1))
        centre = mean if step == 0 else momentum * centre + (1 - momentum) * mean
        np.testing.assert_allclose(loss.targets.centre.numpy(), centre, atol=1e-6)


@pytest.mark.parametrize(("batch", "tokens"), [(2, 1), (2, 18), (6, 5)])
def test_patch_loss_and_centre_over_steps(rng: np.random.Generator, batch: int, tokens: int) -> None:
    prototypes, momentum, tau = 6, 0.95, 0.1
    loss = PatchAlignmentLoss(CentredTargets(prototypes, momentum), tau)
    centre = np.zeros(prototypes)
    for step in range(5):
        student, teacher = rng.uniform(-1, 1, (2, batch, tokens, prototypes))
        target = softmax((teacher - centre) / 0.05, axis=-1)
        expected = np.mean(
            [-(target[b, n] @ log_softmax(student[b, n] / tau)) for b in range(batch) for n in range(tokens)]
        )
        assert loss(tokens_of(student), tokens_of(teacher), 0.05).item() == pytest.approx(expected, rel=1e-5)
        mean = teacher.reshape(-1, prototypes).mean(axis=0)
        centre = mean if step == 0 else momentum * centre + (1 - momentum) * mean
        np.testing.assert_allclose(loss.targets.centre.numpy(), centre, atol=1e-6)


def test_local_crops_are_the_part_of_the_global_loss_that_depends_on_them(rng: np.random.Generator) -> None:
    """Their gradients are those of the whole, and both parts together give its value; nothing moves."""
    for make in (lambda: CentredTargets(6, 0.9, 0.5), lambda: SinkhornTargets(6, 4)):
        loss = GlobalAlignmentLoss(make())
        for _ in range(3):
            student, teacher = as_tensor(rng.normal(size=(5, 2, 6))), as_tensor(rng.normal(size=(2, 2, 6)))
            local = student[2:].clone().requires_grad_()
            before = {name: value.clone() for name, value in loss.state_dict().items()}
            part = loss.local_crops(local, teacher, 0.05)
            part.backward()
            assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
            everything = student.clone().requires_grad_()
            whole = loss(everything, teacher, 0.05)
            whole.backward()
            torch.testing.assert_close(local.grad, everything.grad[2:])
            own = GlobalAlignmentLoss(make())
            own.load_state_dict(before)
            first = own(torch.cat([student[:2]]), teacher, 0.05)  # a mean over 2 pairs instead of 8
            torch.testing.assert_close(part + first / 4, whole.detach())


@pytest.mark.parametrize("make", [lambda: CentredTargets(64, 0.9, 0.5), lambda: SinkhornTargets(64, 8)])
def test_tokens_a_few_at_a_time_give_the_plain_forms_numbers(
    rng: np.random.Generator, make: Callable[[], CentredTargets | SinkhornTargets], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two crops of 45 tokens, 32 at a time, against PyTorch's own cross-entropy of all logits at once."""
    monkeypatch.setattr(cross_entropy, "TOKENS_AT_ONCE", 32)
    units, prototypes, taught = (
        torch.nn.functional.normalize(as_tensor(rng.normal(size=size)), dim=-1)
        for size in ((2, 45, 9), (64, 9), (2, 45, 9))
    )
    loss, twin = PatchAlignmentLoss(make()), make()
    mine = [units.clone().requires_grad_(), prototypes.clone().requires_grad_()]
    theirs = [units.clone().requires_grad_(), prototypes.clone().requires_grad_()]
    for turn in range(2):  # the second time with a centre, or a queue
        value = loss(TokenLogits(*mine), TokenLogits(taught, prototypes), 0.05)
        teacher = taught @ prototypes.T
        target = twin(teacher, 0.05)
        logits = theirs[0] @ theirs[1].T / 0.1
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
        for actual, expected in zip(
            torch.autograd.grad(3 * value, mine), torch.autograd.grad(3 * plain, theirs), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        spread = teacher.flatten(0, 1).std(dim=0).mean()
        torch.testing.assert_close(loss.statistics["logit_spread"], spread, rtol=1e-4, atol=0)
        # The second time, the student's tokens of the last crop are those of the volume before.
        strangers = (units[-1:] @ prototypes.T / 0.1).expand(2, -1, -1)
        other = torch.nn.functional.cross_entropy(strangers.flatten(0, 1), target.flatten(0, 1))
        predicted = (other - plain) / math.log(64) if turn else torch.tensor(0.0)
        torch.testing.assert_close(loss.statistics["predicted"], predicted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.statistics["teacher_entropy"], entropy_share(target).mean())
    for name, buffer in twin.state_dict().items():
        torch.testing.assert_close(loss.targets.state_dict()[name], buffer, rtol=1e-4, atol=1e-5, msg=name)


def test_masked_tokens_alone_count(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted by the masked share of each patch of 4x2x2 voxels, against PyTorch's own weighted cross-entropy."""
    monkeypatch.setattr(cross_entropy, "TOKENS_AT_ONCE", 5)
    masked = rng.random((2, 1, 8, 4, 6)) < 0.4
    masked[0, 0, :4, :2, :2], masked[1, 0, 4:, 2:, 4:] = False, True
    shares = masked.reshape(2, 2, 4, 2, 2, 3, 2).mean(axis=(2, 4, 6)).reshape(-1)
    assert (shares == 0).any() and (shares == 1).any()
    own, other, prototypes = (as_tensor(rng.normal(size=size)) for size in ((2, 12, 5), (2, 12, 5), (7, 5)))
    mine = [own.clone().requires_grad_(), prototypes.clone().requires_grad_()]
    theirs = [own.clone().requires_grad_(), prototypes.clone().requires_grad_()]
    target = (other @ prototypes.T).softmax(dim=-1).flatten(0, 1)
    loss = PatchAlignmentLoss(CentredTargets(7), masked_patch=(4, 2, 2))
    value = loss(TokenLogits(*mine), TokenLogits(other, prototypes), 1.0, torch.tensor(masked))
    each = torch.nn.functional.cross_entropy((theirs[0] @ theirs[1].T / 0.1).flatten(0, 1), target, reduction="none")
    plain = (each * as_tensor(shares)).sum() / shares.sum()
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
    divergences = each.detach() - torch.special.entr(target).sum(dim=-1)
    weighted = (divergences * as_tensor(shares)).sum() / shares.sum()
    torch.testing.assert_close(loss.statistics["divergence"], weighted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.statistics["teacher_entropy"], entropy_share(target).mean())
    for actual, expected in zip(torch.autograd.grad(value, mine), torch.autograd.grad(plain, theirs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_global_loss_by_hand() -> None:
    """Two prototypes, teacher certain: -ln of the student's share of that prototype in the other view."""
    teacher = torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]])
    student = torch.tensor([[[0.1, 0.0]], [[0.0, 0.3]]])
    loss = GlobalAlignmentLoss(CentredTargets(2), student_temperature=0.1)(student, teacher, 0.04)
    # Teacher 1 says prototype 0 to student 2 (logits 0, 3); teacher 2 says prototype 1 to student 1 (logits 1, 0).
    expected = (math.log(1 + math.exp(3)) + math.log(1 + math.exp(1))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_centre_stands_still_in_evaluation(rng: np.random.Generator) -> None:
    targets = CentredTargets(4, 0.5, target_entropy=0.5)
    teacher = as_tensor(rng.normal(size=(3, 4)))
    targets(teacher, 0.05)
    before = {name: value.clone() for name, value in targets.state_dict().items()}
    targets.eval()(teacher + 1, 0.05)
    for name, value in targets.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_entropy_control_by_hand(rng: np.random.Generator) -> None:
    prototypes, wanted, gain, temperature = 5, 0.6, 0.3, 0.04
    targets = CentredTargets(prototypes, 0.9, target_entropy=wanted, entropy_gain=gain)
    centre, log_scale = np.zeros(prototypes), 0.0
    for step in range(6):
        logits = rng.normal(scale=0.02, size=(4, prototypes))
        distribution = softmax((logits - centre) / (temperature * math.exp(log_scale)), axis=-1)
        np.testing.assert_allclose(targets(as_tensor(logits), temperature).numpy(), distribution, atol=1e-5)
        share = np.mean([-(row * np.log(row)).sum() for row in distribution]) / math.log(prototypes)
        log_scale += gain * (wanted - share)
        centre = logits.mean(axis=0) if step == 0 else 0.9 * centre + 0.1 * logits.mean(axis=0)
        assert targets.log_scale.item() == pytest.approx(log_scale, abs=1e-5)


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1.0])
def test_entropy_control_finds_its_target(rng: np.random.Generator, spread: float) -> None:
    targets = CentredTargets(32, 0.99, target_entropy=0.5, entropy_gain=0.3)
    shares = [
        entropy_share(targets(as_tensor(rng.normal(scale=spread, size=(8, 32))), 0.04)).mean() for _ in range(150)
    ]
    assert np.mean(shares[-30:]) == pytest.approx(0.5, abs=0.05)


def test_entropy_scale_is_bounded() -> None:
    targets = CentredTargets(4, target_entropy=0.5, entropy_gain=100.0)
    for _ in range(3):
        assert torch.isfinite(targets(torch.zeros(2, 4), 0.04)).all()
    assert targets.log_scale.item() == -12.0


def test_entropy_share_by_hand() -> None:
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    np.testing.assert_allclose(entropy_share(rows).numpy(), [1.0, 0.0, 0.5], atol=1e-6)


def numpy_sinkhorn(rows: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Sinkhorn-Knopp on probabilities (the package works on logarithms)."""
    scores = rows - rows.mean(axis=0)
    plan = np.exp(scores / scores.std(ddof=1) / epsilon)
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(axis=0, keepdims=True) * plan.shape[1]
        plan /= plan.sum(axis=1, keepdims=True) * plan.shape[0]
    return plan * plan.shape[0]


def test_sinkhorn_over_the_queue_equals_numpy(rng: np.random.Generator) -> None:
    targets = SinkhornTargets(5, queue_size=7, epsilon=0.4, num_iterations=3, centre_momentum=0.6)
    queue = np.zeros((0, 5))
    centre = None
    for _ in range(5):
        logits = rng.normal(scale=0.01, size=(2, 2, 5)) + rng.normal(size=5)
        mean = logits.reshape(-1, 5).mean(axis=0)
        centre = mean if centre is None else centre
        rows = np.concatenate([logits.reshape(-1, 5) - centre, queue])
        centre = 0.6 * centre + 0.4 * mean
        expected = numpy_sinkhorn(rows, 0.4, 3)[:4].reshape(2, 2, 5)
        actual = targets(as_tensor(logits), 0.04).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-4)
        np.testing.assert_allclose(actual.sum(axis=-1), 1.0, atol=1e-6)
        queue = rows[:7]
        # The newest outputs lie in front; the oldest fall out.
        assert int(targets.filled) == len(queue)
        np.testing.assert_allclose(targets.queue[: len(queue)].numpy(), queue, atol=1e-6)


def test_sinkhorn_marginals(rng: np.random.Generator) -> None:
    """Each sample weighs 1, each prototype samples / prototypes, over all that takes part."""
    plan = SinkhornTargets(6, queue_size=4, epsilon=0.5, num_iterations=100)(as_tensor(rng.normal(size=(40, 6))), 0.04)
    np.testing.assert_allclose(plan.sum(dim=1).numpy(), 1.0, atol=1e-5)
    np.testing.assert_allclose(plan.sum(dim=0).numpy(), 40 / 6, rtol=1e-3)


def test_sinkhorn_cannot_be_driven_to_a_point(rng: np.random.Generator) -> None:
    """One prototype favoured by every sample still gets only its share."""
    logits = rng.normal(scale=0.1, size=(64, 4))
    logits[:, 2] += 5.0
    plan = SinkhornTargets(4, epsilon=0.5, num_iterations=50)(as_tensor(logits), 0.04)
    np.testing.assert_allclose(plan.mean(dim=0).numpy(), 0.25, atol=0.01)


def test_sinkhorn_tells_inputs_apart_while_the_network_drifts(rng: np.random.Generator) -> None:
    """Two inputs seen again and again from a network whose logits wander more than the inputs differ."""
    targets = SinkhornTargets(4, queue_size=64, epsilon=0.5)
    difference = np.array([[0.01, -0.01, 0.0, 0.0], [-0.01, 0.01, 0.0, 0.0]])
    slope = rng.normal(scale=0.01, size=4)
    for step in range(40):
        plan = targets(as_tensor(difference + slope * step), 0.04).numpy()
    assert plan[0, 0] > 2 * plan[1, 0]
    assert plan[1, 1] > 2 * plan[0, 1]
    # What both have in common, the drift, favours no prototype by much.
    assert np.ptp(plan.mean(axis=0)) < 0.35


def test_sinkhorn_of_one_sample_is_finite() -> None:
    targets = SinkhornTargets(4)
    np.testing.assert_allclose(targets(torch.ones(1, 4), 0.04).numpy(), 0.25, atol=1e-6)


def test_sinkhorn_queue_stands_still_in_evaluation(rng: np.random.Generator) -> None:
    targets = SinkhornTargets(4, queue_size=3).eval()
    targets(as_tensor(rng.normal(size=(2, 4))), 0.04)
    assert int(targets.filled) == 0


def numpy_koleo(embeddings: np.ndarray, queue: np.ndarray) -> float:
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    views, batch, _ = unit.shape
    logs = []
    for v in range(views):
        for b in range(batch):
            others = [unit[w, c] for w in range(views) for c in range(batch) if c != b] + list(queue)
            distances = [np.linalg.norm(unit[v, b] - other) for other in others]
            logs.append(np.log(min(distances)))
    return -float(np.mean(logs))


def test_koleo_equals_brute_force_with_queue(rng: np.random.Generator) -> None:
    loss = KoLeoLoss(dim=6, queue_size=10)
    queue = np.zeros((0, 6))
    for _ in range(4):
        embeddings = rng.normal(size=(2, 3, 6)) * rng.uniform(0.1, 10)
        expected = numpy_koleo(embeddings, queue)
        assert loss(as_tensor(embeddings)).item() == pytest.approx(expected, rel=1e-4)
        unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
        queue = np.concatenate([unit.transpose(1, 0, 2).reshape(-1, 6), queue])[:10]


def test_koleo_with_one_volume_has_neighbours_in_the_queue_only(rng: np.random.Generator) -> None:
    loss = KoLeoLoss(dim=4, queue_size=8)
    first, second = rng.normal(size=(2, 2, 1, 4))
    embeddings = as_tensor(first).requires_grad_()
    value = loss(embeddings)
    assert value.item() == 0.0
    value.backward()  # the graph must exist: distributed training waits for every gradient
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))
    unit = first.reshape(2, 4) / np.linalg.norm(first.reshape(2, 4), axis=-1, keepdims=True)
    assert loss(as_tensor(second)).item() == pytest.approx(numpy_koleo(second, unit), rel=1e-4)


def test_koleo_pushes_towards_greater_distance(rng: np.random.Generator) -> None:
    embeddings = as_tensor(rng.normal(size=(1, 6, 3)) * 0.05 + np.array([1.0, 0, 0])).requires_grad_()
    loss = KoLeoLoss(dim=3).eval()
    start = loss(embeddings)
    start.backward()
    assert loss(embeddings - 1e-4 * embeddings.grad) < start


def test_reconstruction_is_a_mean_within_each_crop_then_over_crops(rng: np.random.Generator) -> None:
    image, restored = rng.uniform(size=(2, 3, 1, 4, 5, 6))
    masked = np.stack([rng.random((1, 4, 5, 6)) < share for share in (0.05, 0.5, 0.95)])
    expected = np.mean([((restored[i] - image[i]) ** 2)[masked[i]].mean() for i in range(3)])
    pooled = ((restored - image) ** 2)[masked].mean()
    assert abs(expected - pooled) > 1e-4  # the two readings differ here, so the test can tell them apart
    actual = ReconstructionLoss()(as_tensor(restored), as_tensor(image), torch.tensor(masked))
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_reconstruction_everywhere_counts_every_voxel(rng: np.random.Generator) -> None:
    made, image = rng.uniform(size=(2, 3, 1, 2, 3, 4))
    loss = ReconstructionLoss(everywhere=True)(as_tensor(made), as_tensor(image), torch.zeros(made.shape).bool())
    assert loss.item() == pytest.approx(((made - image) ** 2).mean(), rel=1e-5)


def test_reconstruction_ignores_what_is_visible(rng: np.random.Generator) -> None:
    image = as_tensor(rng.uniform(size=(2, 1, 3, 3, 3)))
    masked = torch.zeros(2, 1, 3, 3, 3, dtype=torch.bool)
    masked[:, :, 1] = True
    restored = image + (~masked) * 7.0 + masked * 0.5
    assert ReconstructionLoss()(restored, image, masked).item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("branch", ["global", "patch", "reconstruction", "koleo"])
def test_gradients_equal_finite_differences_of_numpy(rng: np.random.Generator, branch: str) -> None:
    if branch == "global":
        student, teacher = rng.uniform(-1, 1, (4, 2, 5)), rng.uniform(-1, 1, (2, 2, 5))
        module = GlobalAlignmentLoss(CentredTargets(5))
        target = softmax(teacher / 0.05, axis=-1)
        expected = numerical_gradient(lambda s: numpy_global(s, target, 0.1), student)
        value = as_tensor(student).requires_grad_()
        loss = module(value, as_tensor(teacher), 0.05)
    elif branch == "patch":
        student, teacher = rng.uniform(-1, 1, (2, 2, 3, 5))
        target = softmax(teacher / 0.05, axis=-1)
        # Analytically: (softmax - target) / tau, over the number of tokens.
        expected = (softmax(student / 0.1, axis=-1) - target) / 0.1 / 6
        value = as_tensor(student).requires_grad_()
        loss = PatchAlignmentLoss(CentredTargets(5))(token_logits(value), tokens_of(teacher), 0.05)
    elif branch == "reconstruction":
        restored, image = rng.uniform(size=(2, 2, 1, 2, 3, 2))
        masked = rng.random(restored.shape) < 0.5
        counts = masked.reshape(2, -1).sum(axis=1).reshape(2, 1, 1, 1, 1)
        expected = 2 * (restored - image) * masked / counts / 2
        value = as_tensor(restored).requires_grad_()
        loss = ReconstructionLoss()(value, as_tensor(image), torch.tensor(masked))
    else:
        embeddings, past = rng.normal(size=(2, 2, 2, 4))
        unit = (past / np.linalg.norm(past, axis=-1, keepdims=True)).transpose(1, 0, 2).reshape(-1, 4)
        fixed = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)

        def koleo_of_own(own: np.ndarray) -> float:
            """Neighbours are constants: only the embedding itself moves."""
            norm = own / np.linalg.norm(own, axis=-1, keepdims=True)
            logs = []
            for v, b in np.ndindex(2, 2):
                others = [fixed[w, 1 - b] for w in range(2)] + list(unit)
                nearest = min(others, key=lambda other: np.linalg.norm(fixed[v, b] - other))
                logs.append(np.log(np.linalg.norm(norm[v, b] - nearest)))
            return -float(np.mean(logs))

        expected = numerical_gradient(koleo_of_own, embeddings)
        module = KoLeoLoss(4, queue_size=4)
        module(as_tensor(past))
        value = as_tensor(embeddings).requires_grad_()
        loss = module(value)
    loss.backward()
    np.testing.assert_allclose(value.grad.numpy(), expected, atol=2e-5, rtol=1e-4)


def test_the_sum_of_the_dicom_losses_equals_numpy(rng: np.random.Generator) -> None:
    """Eq. 6, two volumes, two global and three local crops: each term from the arrays that the networks gave."""
    views, batch, tokens, prototypes, hidden = 5, 2, 4, 6, 3
    logits, patches = rng.normal(size=(views, batch, prototypes)), rng.normal(size=(2 * batch, tokens, prototypes))
    taught, taught_patches = rng.normal(size=(2, batch, prototypes)), rng.normal(size=patches.shape)
    image, restored = rng.uniform(size=(2, 2, batch, 1, 2, 3, 4))
    masked = rng.random(image.shape) < 0.5
    summary = as_tensor(rng.normal(size=(2 * batch, hidden)))

    def rows(array: np.ndarray) -> torch.Tensor:
        return as_tensor(array.reshape(-1, *array.shape[2:]))

    student = StudentOutput(GlobalOutput(summary, rows(logits[:2]), tokens_of(patches)), rows(restored))
    teacher = GlobalOutput(summary, rows(taught), tokens_of(taught_patches))
    koleo = KoLeoLoss(hidden, 4)
    loss = DiCoMLoss(
        GlobalAlignmentLoss(CentredTargets(prototypes), 0.1),
        PatchAlignmentLoss(CentredTargets(prototypes), 0.2),
        ReconstructionLoss(),
        reconstruction_weight=7.0,
        koleo_loss=koleo,
        koleo_weight=0.5,
        global_weight=2.0,
        patch_weight=3.0,
    )
    output = {
        name: value.item()
        for name, value in loss(
            student, rows(logits[2:]), teacher, as_tensor(image), torch.tensor(masked), 0.05, 0.06
        ).items()
    }
    expected = {
        "loss_global": numpy_global(logits, softmax(taught / 0.05, axis=-1), 0.1),
        "loss_patch": -(softmax(taught_patches / 0.06, axis=-1) * log_softmax(patches / 0.2, axis=-1)).sum(-1).mean(),
        "loss_reconstruction": np.mean(
            [((restored - image)[v, b][masked[v, b]] ** 2).mean() for v in range(2) for b in range(batch)]
        ),
        "loss_koleo": KoLeoLoss(hidden, 4)(summary.unflatten(0, (2, batch))).item(),
    }
    assert expected["loss_koleo"] != 0
    for name, value in expected.items():
        assert output[name] == pytest.approx(value, rel=1e-5), name
    total = (
        2 * expected["loss_global"]
        + 3 * expected["loss_patch"]
        + 7 * expected["loss_reconstruction"]
        + 0.5 * expected["loss_koleo"]
    )
    assert output["loss"] == pytest.approx(total, rel=1e-5)
    entropy = -(softmax(taught / 0.05, axis=-1) * log_softmax(taught / 0.05, axis=-1)).sum(-1).mean()
    assert output["global_teacher_entropy"] == pytest.approx(entropy / math.log(prototypes), rel=1e-5)
    assert "patch_predicted" in output
    # What the local crops add when they are propagated back on their own has the same weight.
    alone = loss.local_crops(rows(logits[2:]), teacher, 0.05)
    assert alone.item() == pytest.approx(
        2 * loss.global_loss.local_crops(as_tensor(logits[2:]), as_tensor(taught), 0.05).item(), rel=1e-6
    )
    loss.koleo_loss = None
    without = loss(student, rows(logits[2:]), teacher, as_tensor(image), torch.tensor(masked), 0.05, 0.06)
    assert "loss_koleo" not in without


class Products(TorchDispatchMode):
    """Notes each matrix product that a GPU would round to TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(function) for word in ("mm", "matmul", "mv", "dot")):
            self.count += 1
            self.rounded += [str(function)] * (torch.get_float32_matmul_precision() != "highest")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("local", [False, True])
def test_losses_and_their_gradients_are_not_rounded_to_tf32(local: bool, rng: np.random.Generator) -> None:
    """The student of an even output has logarithms that differ by less: all of them would be rounded alike."""
    summary, logits, units = (as_tensor(rng.normal(size=size)) for size in ((2, 3), (4, 6), (2, 5, 4)))
    leaves = [value.requires_grad_() for value in (summary, logits, units, as_tensor(rng.normal(size=(6, 4))))]
    student = GlobalOutput(summary, logits[:2], TokenLogits(*leaves[2:]))
    teacher = GlobalOutput(summary.detach(), logits[:2].detach(), TokenLogits(*(leaf.detach() for leaf in leaves[2:])))
    loss = DiCoMLoss(
        GlobalAlignmentLoss(CentredTargets(6)),
        PatchAlignmentLoss(CentredTargets(6)),
        ReconstructionLoss(),
        koleo_loss=KoLeoLoss(3, 4),
    )
    image = torch.rand(2, 1, 1, 2, 2, 2)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Products() as products:
            if local:
                found = loss.local_crops(logits[2:], teacher, 0.05)
            else:
                whole = StudentOutput(student, image.flatten(0, 1))
                found = loss(whole, logits[2:], teacher, image, image > 0.5, 0.05, 0.05)["loss"]
            found.backward()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert not products.rounded
    assert local or products.count


def test_no_gradient_reaches_the_teacher(rng: np.random.Generator) -> None:
    student = as_tensor(rng.normal(size=(3, 2, 4))).requires_grad_()
    teacher = as_tensor(rng.normal(size=(2, 2, 4))).requires_grad_()
    GlobalAlignmentLoss(CentredTargets(4))(student, teacher, 0.04).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_statistics_for_monitoring(rng: np.random.Generator) -> None:
    prototypes = 6
    loss = GlobalAlignmentLoss(CentredTargets(prototypes, 0.9))
    first = rng.normal(scale=0.1, size=(2, 3, prototypes))
    loss(as_tensor(rng.normal(size=(4, 3, prototypes))), as_tensor(first), 0.05)
    student = rng.uniform(-0.2, 0.2, size=(4, 3, prototypes))
    teacher = rng.normal(scale=0.1, size=(2, 3, prototypes))
    loss(as_tensor(student), as_tensor(teacher), 0.05)
    target = softmax((teacher - first.mean(axis=(0, 1))) / 0.05, axis=-1)
    divergences = [
        (target[i, b] * (np.log(target[i, b]) - log_softmax(student[j, b] / 0.1))).sum()
        for i in range(2)
        for j in range(4)
        for b in range(3)
        if i != j
    ]
    assert loss.statistics["divergence"].item() == pytest.approx(np.mean(divergences), rel=1e-4)
    entropy = -(target * np.log(target)).sum(axis=-1).mean() / np.log(prototypes)
    assert loss.statistics["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    spread = teacher.reshape(-1, prototypes).std(axis=0, ddof=1).mean()
    assert loss.statistics["logit_spread"].item() == pytest.approx(spread, rel=1e-5)


def test_predicted_compares_with_an_earlier_volume(rng: np.random.Generator) -> None:
    """Against NumPy, pair by pair: how much better the loss's own pairs are than those of 16 mini-batches ago."""
    prototypes, tau = 6, 0.1
    loss = GlobalAlignmentLoss(CentredTargets(prototypes, 1.0), tau)
    seen: list[np.ndarray] = []
    for batch in (2, 2, 1) * 6:
        student, teacher = (
            rng.uniform(-0.3, 0.3, (4, batch, prototypes)),
            rng.normal(scale=0.1, size=(2, batch, prototypes)),
        )
        centre = loss.targets.centre.numpy().copy()
        value = loss(as_tensor(student), as_tensor(teacher), 0.05).item()
        target = softmax((teacher - centre) / 0.05, axis=-1)
        if len(seen) < 16:
            assert loss.statistics["predicted"].item() == 0.0
        else:
            before = seen[-16]
            pairs = [
                -(target[i, b] @ log_softmax(before[j, c] / tau))
                for i in range(2)
                for j in range(4)
                if i != j
                for b in range(batch)
                for c in range(before.shape[1])
            ]
            expected = (np.mean(pairs) - value) / np.log(prototypes)
            assert loss.statistics["predicted"].item() == pytest.approx(expected, abs=1e-5)
        seen.append(student)


def test_predicted_tells_agreement_from_sharpened_noise(rng: np.random.Generator) -> None:
    """Both have targets of the same entropy; a student that knows the volume is told from one that does not."""
    prototypes, steps = 16, 400
    means = {}
    for knows in (False, True):
        targets = CentredTargets(prototypes, 0.7, target_entropy=0.7, entropy_gain=0.1)
        loss = GlobalAlignmentLoss(targets)
        values, entropies = [], []
        for _ in range(steps):
            subject = rng.normal(size=(1, 1, prototypes))
            teacher = 0.5 + 1e-4 * np.repeat(subject, 2, axis=0)  # nearly constant logits, as of aligned brains
            student = 0.1 * (subject if knows else rng.normal(size=(1, 1, prototypes))).repeat(3, axis=0)
            loss(as_tensor(student), as_tensor(teacher), 0.04)
            values.append(loss.statistics["predicted"].item())
            entropies.append(loss.statistics["teacher_entropy"].item())
        means[knows] = np.mean(values[200:])
        assert 0.6 < np.mean(entropies[200:]) < 0.8  # the entropy tells nothing
    assert abs(means[False]) < 0.03
    assert means[True] > 0.1


def test_information_is_the_divergence_from_earlier_targets(rng: np.random.Generator) -> None:
    prototypes = 5
    loss = PatchAlignmentLoss(CentredTargets(prototypes, 1.0))
    marginal = before = None
    for _ in range(4):
        student, teacher = rng.normal(scale=0.1, size=(2, 2, 6, prototypes))
        centre = loss.targets.centre.numpy().copy()
        value = loss(tokens_of(student), tokens_of(teacher), 0.05).item()
        target = softmax((teacher - centre) / 0.05, axis=-1)
        mean = target.reshape(-1, prototypes).mean(axis=0)
        marginal = mean if marginal is None else marginal
        expected = (target * np.log(target / marginal)).sum(axis=-1).mean() / np.log(prototypes)
        assert loss.statistics["information"].item() == pytest.approx(expected, abs=1e-5)
        other = value if before is None else -(target * log_softmax(before / 0.1, axis=-1)).sum(axis=-1).mean()
        assert loss.statistics["predicted"].item() == pytest.approx((other - value) / np.log(prototypes), abs=1e-5)
        before = student[-1]
        marginal = 0.98 * marginal + 0.02 * mean


def test_half_precision_logits_are_used_in_single_precision(rng: np.random.Generator) -> None:
    student, teacher = (as_tensor(rng.normal(size=(2, 3, 8))).bfloat16() for _ in range(2))
    half = PatchAlignmentLoss(CentredTargets(8))(token_logits(student), token_logits(teacher), 0.05)
    single = PatchAlignmentLoss(CentredTargets(8))(token_logits(student.float()), token_logits(teacher.float()), 0.05)
    assert half.dtype == torch.float32
    assert half.item() == single.item()


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"momentum 1\.5"):
        CentredTargets(4, momentum=1.5)
    with pytest.raises(InputError, match="target_entropy 0"):
        CentredTargets(4, target_entropy=0)
    with pytest.raises(InputError, match="sinkhorn"):
        SinkhornTargets(4, epsilon=0)
    with pytest.raises(ValueError, match="do not fit"):
        GlobalAlignmentLoss(CentredTargets(4))(torch.zeros(3, 2, 4), torch.zeros(2, 3, 4), 0.04)
    with pytest.raises(ValueError, match="do not fit"):
        GlobalAlignmentLoss(CentredTargets(4))(torch.zeros(1, 2, 4), torch.zeros(2, 2, 4), 0.04)
    with pytest.raises(ValueError, match="differ"):
        PatchAlignmentLoss(CentredTargets(4))(tokens_of(np.zeros((3, 2, 4))), tokens_of(np.zeros((2, 2, 4))), 0.04)


def test_position_alone_predicts_nothing_of_patches(rng: np.random.Generator) -> None:
    """Student and teacher agree on where a token lies, and on nothing else; then on what is there as well."""
    positions = 0.5 * rng.normal(size=(1, 12, 16))
    for knows in (False, True):
        loss = PatchAlignmentLoss(CentredTargets(16, 0.9, target_entropy=0.6))
        told = []
        for _ in range(60):
            content = 0.3 * rng.normal(size=(1, 12, 16))
            student = positions + (content if knows else 0.3 * rng.normal(size=(1, 12, 16)))
            loss(tokens_of(student.repeat(2, axis=0)), tokens_of((positions + content).repeat(2, axis=0)), 0.04)
            told.append(loss.statistics["predicted"].item())
        assert (np.mean(told[20:]) > 0.1) if knows else (abs(np.mean(told[20:])) < 0.03)


def test_a_centre_for_each_token_takes_the_position_out_of_targets(rng: np.random.Generator) -> None:
    """Against NumPy: ``softmax((t - c_n - c) / tau)`` with a running mean for each position; and it is resumed."""
    momentum, prototypes = 0.8, 5
    loss = PatchAlignmentLoss(CentredTargets(prototypes, 1.0), 0.1, token_centre_momentum=momentum)
    positions = rng.normal(size=(6, prototypes))
    centre, own = None, None
    for turn in range(4):
        teacher = positions + 0.1 * rng.normal(size=(2, 6, prototypes))
        student = 0.1 * rng.normal(size=(2, 6, prototypes))
        mean = teacher.mean(axis=0)
        centre = mean if centre is None else centre
        shifted = teacher - centre
        own = np.zeros(prototypes) if own is None else own
        target = softmax((shifted - own) / 0.05, axis=-1)
        expected = -(target * log_softmax(student / 0.1, axis=-1)).sum(axis=-1).mean()
        assert loss(tokens_of(student), tokens_of(teacher), 0.05).item() == pytest.approx(expected, rel=1e-4)
        if turn == 0:
            own = shifted.reshape(-1, prototypes).mean(axis=0)
        centre = momentum * centre + (1 - momentum) * mean
        if turn == 1:
            again = PatchAlignmentLoss(CentredTargets(prototypes, 1.0), 0.1, token_centre_momentum=momentum)
            again.load_state_dict(loss.state_dict())
            loss = again
