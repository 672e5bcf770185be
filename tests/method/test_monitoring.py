# SPDX-License-Identifier: Apache-2.0
"""Pictures and checks of the reconstruction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_mlflow import FakeMLFlow
from ignite.engine import Engine, Events
from matplotlib.image import imread
from method_helpers import IMAGE, assert_equal_states, tiny_network, tiny_run, tiny_views, tiny_volumes

from volta_components.method import monitoring
from volta_components.method.masking import GroupMask
from volta_components.method.monitoring import ReconstructionCheck, ReconstructionPicture, restore
from volta_components.method.views import CropGeometry


def test_pictures_are_drawn_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLFlow({})
    plain, drawn = (tiny_run(count=2, epochs=5) for _ in range(2))
    plain.trainer.run()
    monkeypatch.setattr(monitoring, "find_mlflow_handler", lambda engine: fake)
    network = drawn.plain_student.network
    ReconstructionPicture(tmp_path, drawn.loader.dataset, network, drawn.views, interval=3).attach(drawn.trainer)
    drawn.trainer.run()
    names = [f"reconstruction_{epoch:04d}.png" for epoch in (1, 3, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert fake.client.artifacts == [(name, "pictures") for name in names]
    picture = imread(tmp_path / names[0])
    assert picture.shape[0] > 100
    assert picture[..., 0].std() > 0.05
    assert_equal_states(drawn.teacher.state_dict(), plain.teacher.state_dict())


def test_a_reconstruction_is_the_whole_network_s_and_training_resumes_as_before() -> None:
    network = tiny_network()
    image = torch.rand(6, 1, *IMAGE)
    expected = restore(network, image)
    network.drop_paths(0.9)
    network.train()
    assert torch.equal(restore(network, image), expected)
    assert all(module.training for module in network.modules())


class StubNetwork:
    """Gives back what it was shown (masked with zeros), or a constant."""

    def __init__(self, constant: float | None) -> None:
        self.constant = constant

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def token_grid(self, image: torch.Tensor) -> tuple[int, ...]:
        return ()

    def decode(self, tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        return tokens if self.constant is None else torch.full_like(tokens, self.constant)


# Errors of the mean volume are 0 and 0.4 squared: a constant 0.5 is better on the second volume only.
@pytest.mark.parametrize(
    ("constant", "expected", "better"), [(0.5, (0.1**2 + 0.3**2) / 2, 0.5), (None, (0.4**2 + 0.8**2) / 2, 0.0)]
)
def test_held_out_errors_over_masked_voxels(
    tmp_path: Path, constant: float | None, expected: float, better: float
) -> None:
    def items(*values: float) -> list[dict[str, torch.Tensor]]:
        return [{"image": torch.full((1, *IMAGE), value)} for value in values]

    engine: Any = Engine(lambda e, b: None)
    engine.state.device = torch.device("cpu")
    network: Any = StubNetwork(constant)
    views = tiny_views(mask=GroupMask(cell=1, noise_share=0.0), global_geometry=CropGeometry(IMAGE, zoom=(2, 3)))
    check = ReconstructionCheck(
        tmp_path / "check.json", items(0.4, 0.8, 0.0), items(0.2, 0.6, 1.0), network, views, interval=2, limit=2
    )
    check.attach(engine)
    seen: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.metrics.get("validation_mean_view")))
    engine.run([0], max_epochs=3)
    assert engine.state.metrics["validation_reconstruction"] == pytest.approx(expected, rel=1e-5)
    # The mean of the first two training volumes is 0.4.
    assert engine.state.metrics["validation_mean_view"] == pytest.approx((0.0**2 + 0.4**2) / 2, rel=1e-5)
    assert [value is None for value in seen] == [True, False, False]
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["epoch"] == 3
    assert content["volumes"] == 2
    assert content["reconstruction"] == pytest.approx(expected, rel=1e-5)
    assert content["share_better"] == engine.state.metrics["validation_share_better"] == better


def test_numbers_of_a_check_are_of_its_epoch_alone(tmp_path: Path) -> None:
    engine: Any = Engine(lambda e, b: None)
    engine.state.device, engine.state.metrics = torch.device("cpu"), {"loss": 1.0}
    items = [{"image": torch.full((1, *IMAGE), 0.4)}]
    network: Any = StubNetwork(0.5)
    ReconstructionCheck(tmp_path / "check.json", items, items, network, tiny_views(), interval=2).attach(engine)
    seen: list[set[str]] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(set(e.state.metrics)))
    engine.run([0], max_epochs=3)
    three = {f"validation_{name}" for name in ("reconstruction", "mean_view", "share_better")}
    assert seen == [{"loss"}, {"loss"} | three, {"loss"} | three]
    engine.run([0], max_epochs=5)
    assert seen[3:] == [{"loss"} | three, {"loss"} | three]


def check_of(count: int, shape: tuple[int, ...], geometry: CropGeometry) -> dict[str, float]:
    """Errors on volumes in which each voxel of smaller ones is repeated, of a random network."""
    sides = [side // own for side, own in zip(shape, IMAGE)]
    volumes = tiny_volumes(count, IMAGE)
    for item in volumes:
        for axis, side in enumerate(sides):
            item["image"] = item["image"].repeat_interleave(side, dim=axis + 1)
    views = tiny_views(mask=GroupMask(cell=1), global_geometry=geometry)
    check = ReconstructionCheck("", volumes[: count // 2], volumes[count // 2 :], tiny_network(), views)
    return check.errors(torch.device("cpu"))


def test_held_out_volumes_are_seen_at_the_scale_of_global_crops() -> None:
    """Crops of half the resolution: the numbers of volumes of that resolution, without anything random."""
    expected = check_of(4, IMAGE, CropGeometry(IMAGE))
    double = (16, 24, 24)
    random = {"zoom": (1.5, 2.0), "rotation": 20, "translation": 3, "flip": 1.0, "anywhere": True}
    found = check_of(4, double, CropGeometry(IMAGE, extent=double, **random))  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-4)


def test_held_out_volumes_need_not_be_multiples_of_the_patch(tmp_path: Path) -> None:
    """They are larger than the crops here, and patches of 4 do not divide them."""
    parts = tiny_run(count=2, epochs=2)
    volumes = tiny_volumes(2, (10, 14, 14))
    path = tmp_path / "check.json"
    ReconstructionCheck(path, volumes, volumes, parts.plain_student.network, parts.views, interval=2).attach(
        parts.trainer
    )
    parts.trainer.run()
    assert json.loads(path.read_text())["volumes"] == 2
