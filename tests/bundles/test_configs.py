# SPDX-License-Identifier: Apache-2.0
"""What holds for the configs of every bundle: their length, what a run is, and that they are read without any data."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser, ConfigWorkflow
from packed import BUNDLES, random_weights
from prepared import ROOT

from volta_components import bundle as volta
from volta_components.errors import InputError, explain_input_errors, find_input_error
from volta_components.files import read_json
from volta_components.sharing.pack import assemble
from volta_components.training.checkpoint import ResumableCheckpoint
from volta_components.training.record import HARMLESS, WATCHING, settings_of

CONFIGS = {bundle: ROOT / "bundles" / bundle / "configs" for bundle in BUNDLES}
HARMLESS_IDS = {name for names in HARMLESS.values() for name in names}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_config_is_read_in_one_sitting(bundle: str) -> None:
    assert len((CONFIGS[bundle] / "train.json").read_text().splitlines()) < 340


def test_expressions_call_what_is_there_and_nothing_else_is_offered() -> None:
    text = "".join(path.read_text() for configs in CONFIGS.values() for path in configs.glob("*.json"))
    used = set(re.findall(r"\bvolta\.(\w+)", text))
    for name in used:
        assert callable(getattr(volta, name)), name
    assert used == {name for name in dir(volta) if not name.startswith("_")} - {
        *("Any", "annotations", "explain_input_errors", "import_module", "keep_private")
    }
    assert not re.findall(r'"\$from volta_components|"\$import os', text)
    with pytest.raises(AttributeError, match=r"volta_components\.bundle' has no attribute 'load_everything'"):
        volta.load_everything  # noqa: B018


def without_bundle(content: Any) -> Any:
    """A config of a classification bundle without what its task is, or its data set's reference."""
    task = ("_desc_", "bundle", "dataset_dir", "label_key", "classes", "class_names", "balanced", "threshold")
    task += ("validation_fraction",)  # of those who would choose the threshold
    facts = ("name", "task", "description", "data_source", "label_classes", "pred_classes", "network_data_format")
    rest = {key: value for key, value in content.items() if key not in (*task, *facts)}
    if "references" in rest:
        rest["references"] = [each for each in rest["references"] if not re.search("IXI|AIBL", each)]
    return rest


def test_the_two_classification_bundles_are_one_but_for_their_task() -> None:
    """Both are whole, so that each can be packed and read alone; whatever is mended in one is mended in the other."""
    names = [sorted(path.name for path in CONFIGS[bundle].iterdir()) for bundle in ("ixi_sex", "aibl_ad")]
    assert names[0] == names[1]
    for name in names[0]:
        texts = [(CONFIGS[bundle] / name).read_text() for bundle in ("ixi_sex", "aibl_ad")]
        if name == "tiny.json":
            texts = [re.sub(r'"epochs": (6|10),', "", text) for text in texts]
        if not name.endswith(".json"):
            assert texts[0] == texts[1], name
            continue
        first, second = map(json.loads, texts)
        assert without_bundle(first) == without_bundle(second), name
        assert list(first) == list(second), name
        for side in ("inputs", "outputs") if name == "metadata.json" else ():
            (one,), (other,) = (content["network_data_format"][side].values() for content in (first, second))
            assert {**one, "channel_def": 0} == {**other, "channel_def": 0}


# --- what a run is -----------------------------------------------------------------------------------------------


def leaves(block: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a config."""
    if isinstance(block, dict) and block:
        for key, value in block.items():
            yield from leaves(value, (*path, key))
    elif isinstance(block, list) and any(isinstance(item, dict) for item in block):
        for place, value in enumerate(block):
            yield from leaves(value, (*path, place))
    else:
        yield path


def changed(config: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A config with another value at a place."""
    result = copy.deepcopy(config)
    block: Any = result
    for key in path[:-1]:
        block = block[key]
    value = block[path[-1]]
    other = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value * 2 + 1, str: lambda: f"{value} + 1"}
    block[path[-1]] = other.get(type(value), lambda: "another")()
    return result


def is_harmless(config: dict[str, Any], path: tuple[Any, ...]) -> bool:
    """Listed with a reason: an id, a comment, or a handler that only watches."""
    block: Any = config
    for key in path:
        if isinstance(block, list) and block[key].get("_target_", "").rpartition(".")[2] in WATCHING:
            return path[-1] != "_target_"
        block = block[key]
    return path[0] in HARMLESS_IDS or "_desc_" in path


@pytest.mark.parametrize(
    ("bundle", "overlays"),
    [
        ("pretrain", ()),
        ("pretrain", ("sinkhorn",)),
        ("pretrain", ("koleo",)),
        ("ixi_sex", ()),
        ("aibl_ad", ("swin_scratch",)),
        ("harp_hippocampus", ()),
        ("harp_hippocampus", ("unet_scratch",)),
        ("harp_hippocampus", ("synthetic",)),
    ],
)
def test_a_checkpoint_is_refused_whatever_id_has_changed(
    bundle: str, overlays: tuple[str, ...], tmp_path: Path
) -> None:
    """But for those that are listed as harmless, with the reason."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS[bundle] / f"{name}.json") for name in ("train", *overlays)])
    parser.resolve_macro_and_relative_ids()
    config = parser.get()
    engine = Engine(lambda *_: None)
    path = tmp_path / "checkpoint.pt"
    torch.save({"settings": settings_of(config), "engine": engine.state_dict()}, path)
    accepted, refused = set(), set()
    for place in leaves(config):
        handler = ResumableCheckpoint(path, {}, settings_of(changed(config, place)))
        try:
            handler.load(engine)
            accepted.add(place)
        except InputError as error:
            assert "belongs to a run with other settings" in str(error)
            refused.add(place)
    assert accepted == {place for place in leaves(config) if is_harmless(config, place)}
    assert len(refused) > 150


@pytest.mark.parametrize("bundle", ["pretrain", "ixi_sex", "aibl_ad", "harp_hippocampus"])
def test_what_changes_predictions_is_a_setting_of_their_journal(bundle: str, tmp_path: Path) -> None:
    def settings(**changes: Any) -> dict[str, Any]:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS[bundle] / "inference.json"))
        parser.update({"source": [], "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path), **changes})
        return dict(parser.get_parsed_content("journal").settings)

    first = settings()
    assert first == settings(source=[str(tmp_path)], num_workers=3, check_volumes=False, suffix="_other")
    network = ["num_heads", *(["summary_heads"] if bundle != "harp_hippocampus" else [])]
    task = {"pretrain": ["save_attention"], "harp_hippocampus": ["mirrored", "largest_part", "amp", "window_overlap"]}
    for name in ("assume_orientation", "spacing", *network, *task.get(bundle, ["pool", "threshold"])):
        assert first != settings(**{name: 2}), name


def test_what_is_harmless_is_an_id_and_has_a_reason() -> None:
    known = {"_meta_", "tracking_uri", "save_execute_config", "is_not_rank0"}  # of MONAI's
    for configs in CONFIGS.values():
        for path in configs.glob("*.json"):
            known |= {name.removeprefix("+").partition("#")[0] for name in read_json(path)}
    assert known >= {name.partition("#")[0] for name in HARMLESS_IDS}
    assert all(len(reason) > 20 for reason in HARMLESS)


def test_tracking_by_mlflow_is_no_other_run(tmp_path: Path) -> None:
    settings = []
    for tracking in (None, "mlflow"):
        made = ConfigWorkflow(
            config_file=str(CONFIGS["pretrain"] / "train.json"),
            logging_file=False,
            tracking=tracking,
            output_dir=f"${str(tmp_path)!r}",
            datalist_path=str(tmp_path / "none.json"),
        )
        made.parser.parse()
        settings.append(made.parser.get_parsed_content("settings"))
    assert settings[0] == settings[1]
    assert settings[0]["processes"] == 1 and settings[0]["teacher_momentum"] == [0.996, 1.0]


def test_with_many_processes_a_run_begins_as_with_one() -> None:
    for configs in CONFIGS.values():
        one, many = (
            ConfigParser.load_config_files([str(configs / f"{name}.json") for name in names])
            for names in (("train",), ("train", "multi_gpu_train"))
        )
        assert many["initialize"][: len(one["initialize"])] == one["initialize"]
        assert many["initialize"][len(one["initialize"]) :] == ["$volta.join_processes(@device)"]
        assert many["run"] == one["run"] and any(
            "check_counts" in str(many[key]) for key in ("checks", "run") if key in many
        )


# --- without data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every bundle with the quick start's sizes and random weights, as ``download`` leaves it; no data set."""
    folder = tmp_path_factory.mktemp("downloaded")
    for bundle in BUNDLES:
        weights = random_weights(bundle, folder / "weights" / bundle)
        assemble(ROOT / "bundles" / bundle, folder / f"{bundle}_phantom_tiny", ["tiny"], model=weights)
    return folder


FILES = [
    ("train", ("train",)),
    ("train", ("train", "evaluate")),
    ("train", ("train", "multi_gpu_train")),
    ("infer", ("inference",)),
]


def workflow(downloaded: Path, bundle: str, kind: str, names: tuple[str, ...], **ids: Any) -> ConfigWorkflow:
    folder = downloaded / f"{bundle}_phantom_tiny"
    made = ConfigWorkflow(
        config_file=[str(folder / "configs" / f"{name}.json") for name in names],
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(folder),
        **ids,
    )
    made.parser["initialize"] = [line for line in made.parser.get("initialize", []) if "join_processes" not in line]
    return made


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(
    ("kind", "names"), FILES, ids=lambda value: "+".join(value) if isinstance(value, tuple) else ""
)
def test_bundles_are_read_without_data_and_have_all_properties(
    bundle: str,
    kind: str,
    names: tuple[str, ...],
    downloaded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_process: None,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("LOCAL_RANK", "0")
    made = workflow(downloaded, bundle, kind, names, device="cpu")  # a text, as the command line gives it
    made.initialize()
    assert made.check_properties() == []
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("bundle", [bundle for bundle in BUNDLES if bundle != "pretrain"])
def test_an_evaluation_without_train_json_says_what_to_give(
    bundle: str, downloaded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    explain_input_errors()  # as importing volta_components.bundle does, which happened before this test
    made = workflow(downloaded, bundle, "train", ("evaluate",))
    made.initialize()
    with pytest.raises(ValueError, match="is not defined in the config content") as caught:
        made.run()
    sys.excepthook(caught.type, caught.value, caught.tb)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the referring item `@")
    assert line.endswith("""give it after train.json: --config_file "['.../train.json','.../evaluate.json']\"""")


def test_the_evaluation_of_pretraining_stands_alone_as_well(downloaded: Path, tmp_path: Path) -> None:
    made = workflow(downloaded, "pretrain", "eval", ("evaluate",), dataset_dir=str(tmp_path))
    made.initialize()
    assert made.check_properties() == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_evaluations_of_two_models_of_one_name_have_folders_of_their_own(bundle: str, tmp_path: Path) -> None:
    path = "encoder_path" if bundle == "pretrain" else "model_path"
    names = ("evaluate",) if bundle == "pretrain" else ("train", "evaluate")
    found = []
    for content in ("one", "other", "one"):
        (tmp_path / "model.pt").write_text(content)
        parser = ConfigParser()
        parser.read_config([CONFIGS[bundle] / f"{name}.json" for name in names])
        parser.update({path: str(tmp_path / "model.pt"), "dataset_dir": str(tmp_path)})
        found.append(parser.get_parsed_content("output_dir"))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("kind", ["train", "inference"])
def test_a_network_is_loaded_with_its_weights_and_without_data(
    bundle: str, kind: str, downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{bundle}_phantom_tiny"
    network = monai.bundle.load(name, bundle_dir=downloaded, workflow_type=kind, device="cpu")
    weights = torch.load(downloaded / name / "models" / "model.pt", weights_only=True)
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("names", [("train",), ("train", "evaluate"), ("inference",)], ids="+".join)
def test_a_run_without_data_ends_before_anything_is_done(
    bundle: str, names: tuple[str, ...], downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = workflow(downloaded, bundle, "train" if "train" in names else "infer", names, output_dir=str(tmp_path / "o"))
    made.initialize()
    with pytest.raises((InputError, RuntimeError)) as caught:
        made.run()
    error = find_input_error(caught.value)
    assert re.search(r"no such datalist; make one with: volta3d prepare|no such folder, volume or datalist", str(error))
    assert list(tmp_path.iterdir()) == []
