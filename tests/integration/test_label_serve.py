# SPDX-License-Identifier: Apache-2.0
"""What ``make label`` serves; the server itself is in ``tests/integration/test_monai_label.py``."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
from label_server import STARTER, page_blocks
from packed import ROOT, random_weights

from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json

HARP = "harp_hippocampus"


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("label_serve", ROOT / "label" / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The bundles' folders, without a trained model."""
    left_out = shutil.ignore_patterns("models", "runs", "eval")
    for name in (HARP, "ixi_sex", "aibl_ad"):
        shutil.copytree(ROOT / "bundles" / name, tmp_path / "bundles" / name, ignore=left_out)
    return tmp_path


def trained(bundle: str, folder: Path) -> Path:
    """The quick start's model with random weights, as a training records it."""
    path = random_weights(bundle, folder)
    record = path.with_suffix(".json")
    write_json(record, {**read_json(record), "bundle": bundle})
    return path


def test_without_a_model_it_says_what_to_run_first(serve: ModuleType, repository: Path) -> None:
    trained("ixi_sex", repository / "bundles" / "ixi_sex" / "models")
    with pytest.raises(InputError, match=r"no trained hippocampus model(?s:.)*make demo(?s:.)*BUNDLE=DIR"):
        serve.choose_bundles("", repository, repository / "copies")


def test_the_demos_models_are_served_as_copies_that_stay(serve: ModuleType, repository: Path) -> None:
    demo = repository / "runs" / "demo"
    model = trained(HARP, demo / HARP / "volta_fold0" / "models")
    trained("aibl_ad", demo / "aibl_ad" / "volta_fold0" / "models")
    found = serve.choose_bundles("", repository, repository / "copies")
    assert [path.name for path in found] == [f"{HARP}_phantom_tiny", "aibl_ad_phantom_tiny"]
    weights = found[0] / "models" / "model.pt"
    assert sha256_file(weights) == sha256_file(model)
    # What annotators have trained since is kept at the next start.
    weights.write_bytes(b"trained since")
    assert serve.choose_bundles("", repository, repository / "copies") == found
    assert weights.read_bytes() == b"trained since" and model.is_file()
    # A model of the bundle's own comes first; it gets a folder of its own.
    trained(HARP, repository / "other").rename(repository / "model.pt")
    own = repository / "bundles" / HARP / "models"
    own.mkdir()
    (repository / "model.pt").rename(own / "model_phantom_tiny.pt")
    record = read_json(repository / "other" / "model_phantom_tiny.json")
    changed = own / "model_phantom_tiny.pt"
    changed.write_bytes(changed.read_bytes() + b" ")
    write_json(changed.with_suffix(".json"), {**record, "sha256": sha256_file(changed)})
    assert [path for path, _ in serve.trained_models(HARP, repository)] == [changed, model]


def test_what_was_refused_at_one_start_is_refused_at_the_next(serve: ModuleType, repository: Path) -> None:
    model = trained(HARP, repository / "runs" / "demo" / HARP / "volta_fold0" / "models")
    (repository / "bundles" / HARP / "models").mkdir()
    model.rename(repository / "bundles" / HARP / "models" / "model.pt")  # without the overlay that it was trained with
    model.with_suffix(".json").rename(repository / "bundles" / HARP / "models" / "model.json")
    for _ in range(2):
        with pytest.raises(InputError, match="does not fit the configs"):
            serve.choose_bundles("", repository, repository / "copies")


def test_the_page_asks_for_models_that_are_served(serve: ModuleType, repository: Path) -> None:
    """With the model that ships, and the quick start's beside it."""
    models = repository / "bundles" / HARP / "models"
    models.mkdir()
    for kind in ("pt", "json"):
        shutil.copy(ROOT / "bundles" / HARP / "models" / f"model_starter.{kind}", models)
    trained(HARP, models)
    trained("ixi_sex", repository / "bundles" / "ixi_sex" / "models")
    served = [path.name for path in serve.choose_bundles("", repository, repository / "copies")]
    assert served == [STARTER, "ixi_sex_phantom_tiny"]
    requests = "\n".join(block.text for block in page_blocks())
    assert set(re.findall(r"8000/(?:infer|train)/(\w+)", requests)) == set(served)


def test_bundles_that_cannot_be_served_are_listed(serve: ModuleType, repository: Path) -> None:
    models = repository / "bundles" / HARP / "models"
    models.mkdir()
    (models / "model.pt").write_bytes(b"")
    folders = [models.parent, repository / "bundles" / "ixi_sex", repository]
    with pytest.raises(InputError, match="bundles that cannot be served") as caught:
        serve.choose_bundles(",".join(map(str, folders)), repository, repository / "copies")
    for words in ("not packed", "train or download the weights", "not a bundle's folder"):
        assert words in str(caught.value)


def test_the_app_links_what_is_served_now(serve: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    serve.make_app(tmp_path / "app", [tmp_path / "a"])
    app = serve.make_app(tmp_path / "app", [tmp_path / "b"])
    assert [path.resolve() for path in (app / "model").iterdir()] == [tmp_path / "b"]
    words = serve.server_command(app, "studies", "127.0.0.1", 8001)
    assert words[0] == sys.executable and words[words.index("models") + 1] == "b"
    assert words[words.index("zoo_source") + 1] == "local"  # or it would ask the network


def test_a_port_that_is_taken_is_found_before_anything_changes(
    serve: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABEL_PASSWORD", "secret")
    (tmp_path / "served").mkdir()
    app = serve.make_app(tmp_path / "app", [tmp_path / "served"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            words = ["--studies", str(tmp_path), "--app", str(app), "--port", str(port), "--host", host]
            assert serve.main([*words, "--bundle", str(tmp_path / "nothing")]) == 2
            assert f"something answers at http://127.0.0.1:{port} already" in capsys.readouterr().err
    assert [path.name for path in (app / "model").iterdir()] == ["served"]
    assert serve.reachable("0.0.0.0", port) == serve.reachable("127.0.0.1", port) == f"http://127.0.0.1:{port}"
    # What listens on another address of this machine is asked there.
    assert serve.reachable("127.0.0.2", port) == f"http://127.0.0.2:{port}"


def test_a_bundle_that_runs_other_code_is_not_served(serve: ModuleType, repository: Path) -> None:
    demo = repository / "runs" / "demo"
    trained(HARP, demo / HARP / "volta_fold0" / "models")
    (bundle,) = serve.choose_bundles("", repository, repository / "copies")
    assert serve.choose_bundles(str(bundle), repository, repository / "copies") == [bundle]
    config = bundle / "configs" / "inference.json"
    write_json(config, {**read_json(config), "imports": ["$import evil"]})
    with pytest.raises(InputError, match=r"imports +\$import evil"):
        serve.choose_bundles(str(bundle), repository, repository / "copies")
    assert serve.choose_bundles(str(bundle), repository, repository / "copies", trust=True) == [bundle]
