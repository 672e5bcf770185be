# SPDX-License-Identifier: Apache-2.0
"""Embeddings as tables, and attention maps on the image."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from method_helpers import HIDDEN, IMAGE, tiny_network
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from volta_components.inference.embeddings import EmbeddingInferer, EmbeddingTable, embedding_picture

AFFINE = np.array([[2.0, 0, 0, -7], [0, 2.0, 0, 5], [0, 0, 2.0, 11], [0, 0, 0, 1]])


def images(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": MetaTensor(torch.rand(1, *IMAGE, generator=generator), affine=torch.tensor(AFFINE)),
            "subject_id": f"sub-{i}",
            "session": "" if i == 1 else "ses-M000",
        }
        for i in range(count)
    ]


def evaluate(table: EmbeddingTable, data: list[dict[str, Any]], attention: bool = False, runs: int = 1) -> Any:
    network = tiny_network(decoder=False).eval()
    for _ in range(runs):
        SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(data), batch_size=2),
            network=network,
            inferer=EmbeddingInferer(attention),
            val_handlers=[table],
        ).run()
    return network


def test_the_table_has_a_row_for_each_volume(tmp_path: Path) -> None:
    """Five volumes in batches of two; run twice, with the second run's rows only."""
    data = images(5)
    table = EmbeddingTable(tmp_path / "new" / "embeddings.csv")
    network = evaluate(table, data, runs=2)
    with torch.no_grad():
        tokens = network.encode(torch.stack([torch.as_tensor(item["image"]).as_tensor() for item in data]))
        expected = {"summary": network.summarise(tokens).numpy(), "mean": tokens.mean(dim=1).numpy()}
    with (tmp_path / "new" / "embeddings.csv").open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header[:3] == ["subject_id", "session", "summary_0"]
    assert header[33:36] == ["summary_31", "mean_0", "mean_1"]
    assert [row[:2] for row in rows] == [[f"sub-{i}", "" if i == 1 else "ses-M000"] for i in range(5)]
    values = np.array([[float(value) for value in row[2:]] for row in rows])
    wanted = np.concatenate([expected["summary"], expected["mean"]], axis=1)
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.matrix("mean"), expected["mean"], rtol=1e-5, atol=1e-6)
    assert table.matrix("summary+mean").shape == (5, 64)
    assert table.matrix("summary+mean")[3, 32] == table.matrix("mean")[3, 0]
    np.testing.assert_allclose(network(data[0]["image"][None]).detach().numpy()[0], expected["summary"][0], rtol=1e-4)


def test_tokens_come_with_means_of_places_and_of_voxels() -> None:
    """Of 2 x 3 x 3 patches: no more places than tokens, and 4 x 4 x 4 means a patch."""
    network = tiny_network(decoder=False).eval()
    image = torch.stack([item["image"].as_tensor() for item in images(2)])
    with torch.no_grad():
        found = EmbeddingInferer(tokens=True)(image, network)
    grid = network.token_grid(image)
    assert found["tokens"].shape == found["places"].shape == (2, HIDDEN, *grid)
    torch.testing.assert_close(found["places"], found["tokens"])
    patch = [side // count for side, count in zip(IMAGE, grid, strict=True)]
    first = image[1, 0, : patch[0], : patch[1], : patch[2]].numpy()
    parts = first.reshape(4, patch[0] // 4, 4, patch[1] // 4, 4, patch[2] // 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(found["voxels"][1, :, 0, 0, 0].reshape(4, 4, 4), parts, rtol=1e-5)

    wide = torch.rand(1, 1, *(6 * side for side in patch), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = EmbeddingInferer(tokens=True)(wide, network)
    assert found["places"].shape == (1, HIDDEN, 4, 4, 4)
    # Places of six tokens overlap: the first holds tokens 0 and 1 of each axis, the last 4 and 5.
    np.testing.assert_allclose(
        found["places"][0, :, 0, 0, 3], found["tokens"][0, :, :2, :2, 4:].mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6
    )


def test_a_table_in_memory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = EmbeddingTable()
    evaluate(table, images(2))
    assert table.matrix("summary").shape == (2, 32)
    assert list(tmp_path.iterdir()) == []


def test_attention_maps_lie_on_the_image(tmp_path: Path) -> None:
    data = images(2)
    folder = tmp_path / "not" / "yet" / "there"
    network = evaluate(EmbeddingTable(attention_dir=folder), data, attention=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "sub-0_ses-M000_attention.nii.gz",
        "sub-1_attention.nii.gz",
    ]
    for item, path in zip(data, sorted(folder.iterdir())):
        saved = nib.load(path)
        assert saved.shape == IMAGE
        np.testing.assert_allclose(saved.affine, AFFINE)
        with torch.no_grad():
            volume = item["image"].as_tensor()[None]
            expected = network.attention_on_voxels(network.encode(volume), volume)[0, 0].numpy()
        np.testing.assert_allclose(saved.get_fdata(), expected, rtol=1e-5)
        assert saved.get_fdata().mean() == pytest.approx(1.0, abs=0.1)


def test_the_picture_is_written(rng: np.random.Generator, tmp_path: Path) -> None:
    table = EmbeddingTable()
    table.rows[:] = [{"summary": row, "mean": row} for row in rng.normal(size=(40, 4))]
    items = [{"sex": "MF"[i % 2], "diagnosis": ("CN", "AD", None)[i % 3], "site": "AB"[i // 20]} for i in range(40)]
    embedding_picture(table, items, ["sex", "diagnosis", "site"], tmp_path / "p" / "embeddings.png")
    from matplotlib.image import imread

    picture = imread(tmp_path / "p" / "embeddings.png")
    assert picture.shape[1] > 2.5 * picture.shape[0]  # three panels beside each other
    assert picture[..., :3].std() > 0.05
