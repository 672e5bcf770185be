# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/learning.py``: a run is made once, from the bundle's own configs, and the table says what was found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from benchmarks import learning
from benchmarks.learning_pairs import read_heads
from volta_components.errors import InputError
from volta_components.files import write_json


def probe(label: str, encoder: str, embedding: str, way: str, value: float) -> dict[str, Any]:
    names = {"label": label, "encoder": encoder, "embedding": embedding, "probe": way}
    return {**names, "value": value, "low": value - 0.1, "high": value + 0.1}


@pytest.mark.parametrize("name", learning.ROWS)
def test_every_row_changes_ids_that_the_configs_have(name: str) -> None:
    overlays, ids = learning.ROWS[name]
    parser = ConfigParser()
    parser.read_config([str(learning.CONFIGS / f"{each}.json") for each in ("train", "tiny", "synthetic", *overlays)])
    for key in {**learning.BASE, **ids}:
        place = key.split("#")
        assert place[0] in parser.config, key
        parser[key] = 1  # a path that does not exist raises


def test_the_recommended_recipe_is_the_row_of_that_name() -> None:
    """``recommended.json`` says at once what the row puts together from overlays and ids."""
    (overlays, ids), names = learning.ROWS[learning.RECOMMENDED], ("train", "tiny", "synthetic")
    row, recipe = ConfigParser(), ConfigParser()
    row.read_config([str(learning.CONFIGS / f"{each}.json") for each in (*names, *overlays)])
    recipe.read_config([str(learning.CONFIGS / f"{each}.json") for each in (*names, "recommended")])
    for key, value in ids.items():
        row[key] = value
    own = {"_desc_", "run_name", "suffix"}
    assert {k: v for k, v in row.config.items() if k not in own} == {
        k: v for k, v in recipe.config.items() if k not in own
    }


def test_a_finished_run_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def run(configs: list[str], ids: dict[str, Any], log: Path) -> str:
        made.append((configs, ids))
        if configs == ["evaluate"]:
            folder = Path(ids["output_dir"])
            folder.mkdir(exist_ok=True)
            (folder / "probes.json").write_text(json.dumps([probe("same subject", "volta", "mean", "nearest", 0.5)]))
        return (
            "INFO epoch 1 of 2: loss 9.1, global_predicted 0.01\nINFO epoch 2 of 2: loss 8.5e-1, global_predicted -0.2"
        )

    monkeypatch.setattr(learning, "run", run)
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "datalist.json").write_text('{"hash": "a"}')
    arguments = ("two scanners alone", 0, 2, tmp_path / "maps", tmp_path / "scored", tmp_path)
    first = learning.pretrain(*arguments)
    assert first["curves"] == [{"loss": 9.1, "global_predicted": 0.01}, {"loss": 0.85, "global_predicted": -0.2}]
    assert [configs for configs, _ in made] == [["train", "tiny", "synthetic", "two_scanners"], ["evaluate"]]
    assert made[0][1]["leave_out"] == list(learning.SCORED)
    assert learning.pretrain(*arguments) == first
    assert len(made) == 2
    (tmp_path / "scored" / "datalist.json").write_text('{"hash": "b"}')
    assert learning.pretrain(*arguments) == {**first, "heads": "b"}
    assert [configs for configs, _ in made[2:]] == [["evaluate"]], "other heads: asked again, not trained again"
    del made[2:]
    learning.pretrain("two scanners alone", 1, *arguments[2:])
    assert len(made) == 4
    assert [(run["seed"], run["epochs"]) for run in learning.finished(tmp_path)] == [(0, 2), (1, 2)]


def test_the_table_has_means_over_seeds_and_the_widest_interval() -> None:
    last = {"loss_reconstruction": 0.04, "global_predicted": 0.1, "patch_predicted": 0.2}
    runs = [
        {
            "name": "two scanners",
            "epochs": 50,
            "seed": seed,
            "curves": [{}, last],
            "rows": [
                probe("same subject", "volta", "places", "whitened", value),
                probe("same subject", "random", "places", "whitened", 0.2 + 0.2 * seed),
                probe("same subject", "voxels", "voxels", "whitened", 0.85),
            ],
        }
        for seed, value in enumerate((0.4, 0.6))
    ]
    lines = learning.table(runs, [probe("same subject", "voxels", "voxels", "whitened", 0.7)])
    assert "0.30 (0.10 to 0.50)" in lines[2] and lines[2].startswith("| random weights")  # a draw for each seed
    assert lines[3].startswith("| voxels, all") and lines[3].count("0.70 (0.60 to 0.80)") == 1
    assert lines[4].startswith("| voxels, four") and lines[4].count("0.85 (0.75 to 0.95)") == 1
    assert lines[5].startswith("| two scanners | 50 | 2 | 0.040 | 0.100 | 0.200 |")
    assert "0.50 (0.30 to 0.70)" in lines[5]


def test_voxels_find_the_same_head_where_it_looks_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heads, items = rng.random((6, 2, 3, 4)), []
    for number, (head, scan) in enumerate(itertools.product(range(6), range(2))):
        voxels = heads[head] + 0.01 * rng.random((2, 3, 4))
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), tmp_path / f"{number}.nii.gz")
        who = {"subject_id": f"s{head}", "patient_id": f"p{head // 2}", "fold": head // 2}
        items.append({**who, "image": f"{number}.nii.gz", "contrast": float(scan)})
    write_json(tmp_path / "datalist.json", {"training": items})
    rows = {(row["label"], row["probe"]): row["value"] for row in learning.voxel_rows(*read_heads(tmp_path))}
    assert rows["same subject", "nearest"] == rows["same subject", "whitened"] == 1
    assert rows["same patient", "nearest"] < 1 and ("contrast", "ridge") in rows


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)failed.*no_such"):
        learning.run(["no_such"], {}, tmp_path / "log")


def test_the_scored_anatomies_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "anatomy_05.nii.gz").touch()
    with pytest.raises(InputError, match="lacks anatomy-10, anatomy-15, anatomy-20, which are scored"):
        learning.scored_heads(tmp_path, tmp_path, 4)


def test_an_unknown_row_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rows nonsense: choose recommended, two scanners alone"):
        learning.main(tmp_path, tmp_path / "output", rows=("nonsense",))
    assert not (tmp_path / "output").exists()
