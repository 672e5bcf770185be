# SPDX-License-Identifier: Apache-2.0
"""Splits by patient, the leak guard, freezing, the cache, and what a run records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.networks.nets import UNETR
from monai.transforms import Compose, Lambdad, RandGaussianNoised
from torch import nn

from volta_components.downstream.finish import FinishRun
from volta_components.downstream.leaks import Origin, check_model, check_origin
from volta_components.downstream.networks import VoltaUNETR
from volta_components.downstream.splits import (
    Parts,
    check_classes,
    check_disjoint,
    check_shares,
    class_weights,
    patients_of,
    split_items,
)
from volta_components.downstream.start import freeze_encoder, load_model, save_model, start_from
from volta_components.downstream.tracking import Results, RunRecord, TrainingPlan, run_tags
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder
from volta_components.training.cache import KeyedCacheDataset
from volta_components.training.record import patient_key, provenance
from volta_components.training.sampling import ResumableSampler
from volta_components.training.schedules import CosineSchedule

SIZES = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 3, "num_heads": 4, "summary_heads": 4}


def cohort(count: int = 60, folds: int = 5, positive: float = 0.3, sessions: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "subject_id": f"sub-{patient:03d}",
            "patient_id": f"sub-{patient:03d}",
            "session": f"ses-M{12 * session:03d}",
            "label": int(patient // folds % 10 < 10 * positive),
            "fold": patient % folds,
        }
        for patient in range(count)
        for session in range(sessions)
    ]


# --- splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [0, 3])
def test_parts_share_nobody_and_the_scored_part_is_the_whole_fold(fold):
    items = cohort(sessions=3)
    for fraction in (0.2, 0.6, 1.0):
        parts = split_items(items, fold, fraction, 0.2, seed=1, stratify="label")
        groups = [parts.training, parts.validation, parts.scored, parts.unused]
        assert sum(map(len, groups)) == len(items)
        assert sum(len(patients_of(group)) for group in groups) == 60
        assert {item["fold"] for item in parts.scored} == {fold}
        assert len(parts.scored) == 36
        assert all(item["fold"] != fold for group in (parts.training, parts.validation, parts.unused) for item in group)


def test_fractions_are_nested_stratified_and_rounded():
    items = cohort(count=200)
    smaller: tuple[set[str], set[str]] = (set(), set())
    for fraction in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts = split_items(items, 2, fraction, 0.2, seed=7, stratify="label")
        for label, available in ((0, 112), (1, 48)):
            training = [item for item in parts.training if item["label"] == label]
            validation = [item for item in parts.validation if item["label"] == label]
            taken = int(np.floor(fraction * available + 0.5))
            assert len(training) + len(validation) == taken
            assert len(validation) == int(np.floor(0.2 * taken + 0.5))
        now = (patients_of(parts.training), patients_of(parts.validation))
        assert smaller[0] < now[0] and smaller[1] < now[1]
        smaller = now
    assert parts.unused == []


def test_a_split_depends_on_seed_fold_and_ids_alone():
    items = cohort()
    first = split_items(items, 0, 0.5, 0.2, seed=0, stratify="label")
    again = split_items(list(reversed(items)), 0, 0.5, 0.2, seed=0, stratify="label")
    assert patients_of(first.training) == patients_of(again.training)
    assert patients_of(first.validation) == patients_of(again.validation)
    assert patients_of(first.training) != patients_of(split_items(items, 0, 0.5, 0.2, seed=1).training)
    # The order is that of a hash that can be computed anywhere.
    alike = [item for item in items if item["fold"] != 0]
    order = sorted(patients_of(alike), key=lambda patient: hashlib.sha256(f"5:0:{patient}".encode()).hexdigest())
    parts = split_items(items, 0, 0.25, 0.0, seed=5)
    assert patients_of(parts.training) == set(order[:12])


def test_a_patient_with_two_labels_counts_by_the_larger():
    items = cohort(20, folds=2, positive=0.0, sessions=2)
    converts = items[2]["patient_id"]
    items[3]["label"] = 1
    assert items[3]["patient_id"] == converts
    parts = split_items(items, 0, 1.0, 0.5, stratify="label")
    assert converts in patients_of(parts.training) | patients_of(parts.validation)
    assert not patients_of(parts.training) & patients_of(parts.validation)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 0.0}, r"in \(0, 1\]"),
        ({"fraction": 1.5}, r"in \(0, 1\]"),
        ({"validation_fraction": 1.0}, r"in \[0, 1\)"),
        ({"fold": 9}, "folds 0, 1, 2, 3, 4"),
    ],
)
def test_bad_shares_and_folds_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        split_items(cohort(), **{"fold": 0, **changes})


def test_a_patient_in_two_folds_is_an_error_with_the_id_in_any_form():
    items = cohort(10)
    items[0] |= {"patient_id": "002_S_0295"}
    items[1] |= {"patient_id": "sub-ADNI002S0295"}
    with pytest.raises(InputError, match="002_S_0295  scored fold and other folds"):
        split_items(items, 0)
    with pytest.raises(InputError, match="sub-001"):
        check_disjoint({"a": cohort(3), "b": cohort(2)})


def test_a_missing_class_is_named_with_the_subjects_that_are_there():
    items = cohort()
    names = ["CN", "AD"]

    def parts(**changes: Any) -> Parts:
        both = [item for item in items if item["fold"] == 1]
        return Parts(**{"training": both, "validation": both, "scored": both, **changes})

    healthy = [item for item in items if item["label"] == 0][:2]
    check_classes(parts(), names)
    with pytest.raises(InputError, match=r"scored fold has nobody of AD; it has 2 CN, 0 AD") as caught:
        check_classes(parts(scored=healthy), names)
    assert healthy[1]["subject_id"] in str(caught.value)
    with pytest.raises(InputError, match="training part has nobody of AD"):
        check_classes(parts(training=healthy, validation=healthy), names)
    with pytest.raises(InputError, match=r"fraction 0.1 is too small.*nobody of AD for training"):
        check_classes(parts(training=healthy), names, fraction=0.1)
    with pytest.raises(InputError, match="nobody of AD for inner validation"):
        check_classes(parts(validation=healthy), names)
    check_classes(parts(validation=[]), names, validation=False)


def test_a_part_that_is_smaller_than_the_number_of_processes_is_named():
    items = cohort(12)
    parts = Parts(training=items[:6], validation=items[6:8], scored=items[8:11], unused=items[11:])
    check_shares(parts.in_use, 2)
    with pytest.raises(
        InputError, match=r"4 processes(?s:.)*validation +2 scans\n +scored +3 scans\nStart no more than 2"
    ):
        check_shares(parts.in_use, 4)
    check_shares(Parts(items, [], items).in_use, 12)  # nobody waits in a part that is not gone through


def test_class_weights_balance_the_classes():
    items = [{"label": 0}] * 9 + [{"label": 1}] * 3
    weights = class_weights(items, 2)
    np.testing.assert_allclose(weights, [12 / 18, 12 / 6], rtol=1e-6)
    # Each class then has the same share of the loss.
    assert 9 * weights[0] == pytest.approx(3 * weights[1].item())
    with pytest.raises(InputError, match="class 1"):
        class_weights(items[:9], 2)


# --- the leak guard ----------------------------------------------------------------------------------------------


def make_encoder(path: Path, patients: list[str] | None) -> Path:
    provenance: dict[str, Any] = {"datalist_hash": "d" * 64}
    if patients is not None:
        provenance["patient_ids"] = [hashlib.sha256(patient.encode()).hexdigest()[:16] for patient in patients]
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES), provenance)
    return path


def test_scored_patients_who_were_pretrained_on_are_an_error_with_their_ids(tmp_path):
    path = make_encoder(tmp_path / "encoder.safetensors", ["sub-001", "002_S_0295"])
    scored = [{"patient_id": "sub-ADNI002S0295"}, {"patient_id": "sub-007"}]
    with pytest.raises(InputError, match="1 of the 2 scored patients") as caught:
        check_origin("volta", path, scored)
    assert "sub-ADNI002S0295" in str(caught.value) and "sub-007" not in str(caught.value)
    origin = check_origin("volta", path, scored, allow_leak=True)
    assert (origin.leak, origin.leaked) == ("allowed", ("sub-ADNI002S0295",))
    origin = check_origin("volta", path, scored[1:])
    assert (origin.leak, origin.pretrain_datalist_hash) == ("none", "d" * 64)
    assert origin.encoder_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_encoder_that_does_not_tell_its_patients_is_refused(tmp_path):
    path = make_encoder(tmp_path / "encoder.safetensors", None)
    with pytest.raises(InputError, match="does not tell whom"):
        check_origin("volta", path, [{"patient_id": "x"}])
    assert check_origin("volta", path, [{"patient_id": "x"}], allow_leak=True).leak == "allowed"


def test_an_id_that_is_no_worldwide_one_belongs_to_its_cohort(tmp_path):
    trained = [{"patient_id": "sub-0001", "cohort": "here"}, {"patient_id": "sub-ADNI002S0295", "cohort": "here"}]
    path = make_encoder(tmp_path / "encoder.safetensors", None)
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES), provenance({}, "d" * 64, trained))
    origin = check_origin("volta", path, [{"patient_id": "sub-0001", "cohort": "elsewhere"}])
    assert origin.leak == "none" and origin.record["patient_ids"] == sorted(origin.patient_ids or ())
    for same in ({"patient_id": "sub-0001", "cohort": "here"}, {"patient_id": "002_S_0295", "cohort": "harp"}):
        with pytest.raises(InputError, match="1 of the 1 scored"):
            check_origin("volta", path, [same])
    # Records of earlier versions, and of scans without a datalist, know no cohort.
    old = make_encoder(tmp_path / "old.safetensors", ["sub-0001"])
    with pytest.raises(InputError, match="1 of the 1 scored"):
        check_origin("volta", old, [{"patient_id": "sub-0001", "cohort": "elsewhere"}])


def model_record(**changes: Any) -> dict[str, Any]:
    keys = {name: [patient_key(f"sub-{name}")] for name in ("trained", "pretrained")}
    provenance = {"patient_ids": keys["trained"]}
    return {"provenance": provenance, "pretraining": {"patient_ids": keys["pretrained"]}, **changes}


def test_a_model_is_not_scored_on_those_whom_it_or_its_encoder_was_trained_on():
    new = [{"patient_id": "sub-new", "cohort": "here"}]
    assert check_model(model_record(), new) == check_model(model_record(), new, allow_leak=True) == "none"
    for name in ("trained", "pretrained"):
        scored = [*new, {"patient_id": f"sub-{name}", "cohort": "here"}]
        with pytest.raises(InputError, match=rf"1 of the 2 scored patients(?s:.)*sub-{name} +{name} on"):
            check_model(model_record(), scored)
        assert check_model(model_record(), scored, allow_leak=True) == "allowed"


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({}, "trained and pretrained on"),
        (model_record(provenance={}), "whom it was trained on"),
        (model_record(pretraining={"patient_ids": None}), "whom it was pretrained on"),
        ({"provenance": {"patient_ids": []}, "tags": {"encoder_sha256": "ab"}}, "whom it was pretrained on"),
    ],
)
def test_a_model_that_does_not_tell_whom_it_has_seen_is_not_scored(record, what):
    with pytest.raises(InputError, match=what):
        check_model(record, [{"patient_id": "x"}])
    assert check_model(record, [{"patient_id": "x"}], allow_leak=True) == "allowed"


def test_a_record_without_pretraining_is_of_a_model_from_scratch_if_it_says_so():
    record = {"provenance": {"patient_ids": []}, "tags": {"encoder_sha256": ""}}
    assert check_model(record, [{"patient_id": "x"}]) == "none"


def test_an_encoder_is_found_in_a_folder(tmp_path):
    path = make_encoder(tmp_path / "bundle" / "models" / "encoder.safetensors", [])
    expected = check_origin("volta", path, [{"patient_id": "x"}])
    assert check_origin("volta", tmp_path / "bundle", [{"patient_id": "x"}]) == expected
    with pytest.raises(InputError, match=r"other/models/encoder\.safetensors: no such encoder"):
        check_origin("volta", tmp_path / "other", [])


def test_scratch_needs_no_encoder_and_a_missing_one_says_what_to_do(tmp_path):
    assert check_origin("swin_scratch", tmp_path / "none.safetensors", []) == Origin()
    with pytest.raises(InputError, match=r"bundles/pretrain/configs/train\.json"):
        check_origin("volta", tmp_path / "none.safetensors", [])
    with pytest.raises(InputError, match="init 'vit'"):
        check_origin("vit", tmp_path / "none.safetensors", [])


# --- freezing and weights ----------------------------------------------------------------------------------------


def moved(network: nn.Module, image: torch.Tensor) -> set[str]:
    """Names of the parameters that one step of SGD changes."""
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    network(image).square().sum().backward()
    optimizer.step()
    return {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES)
        self.head = nn.Linear(32, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(image))


@pytest.mark.parametrize("unfrozen", [0, 1, 2, 3])
def test_only_the_last_blocks_and_what_follows_them_move(unfrozen):
    network = Headed()
    freeze_encoder(network.encoder, unfrozen)
    names = moved(network, torch.rand(2, 1, 32, 32, 32))
    expected = {"head."}
    if unfrozen:
        expected |= {f"encoder.blocks.{index}." for index in range(3 - unfrozen, 3)}
        expected |= {"encoder.norm.", "encoder.summariser."}
    if unfrozen == 3:
        expected.add("encoder.patch_embedding.")
    for name, _ in network.named_parameters():
        trains = name.startswith(tuple(expected)) and "norm_cross_attn" not in name
        assert (name in names) == trains, name


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(InputError, match="the encoder has 3 blocks"):
        freeze_encoder(Headed().encoder, 4)


def test_start_loads_freezes_and_writes_what_became_of_every_weight(tmp_path):
    path = make_encoder(tmp_path / "encoder.safetensors", [])
    network = Headed()
    report = start_from(network, "volta", path, 1, "encoder.", tmp_path / "run" / "pretrained.txt")
    assert report is not None and sorted(report.missing) == ["head.bias", "head.weight"]
    text = (tmp_path / "run" / "pretrained.txt").read_text()
    assert "1 blocks of the encoder unfrozen" in text and "left  head.weight" in text
    assert "loaded  encoder.summariser.cls_token" in text
    assert not network.encoder.blocks[0].attn.qkv.weight.requires_grad
    assert start_from(network, "vit_scratch", tmp_path / "none", 0, "encoder.") is None


def test_a_unetr_starts_from_a_whole_encoder_of_its_depth_and_heads_or_not_at_all(tmp_path):
    sizes: dict[str, Any] = {"feature_size": 4, "hidden_size": 32, "mlp_dim": 48}
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **{**SIZES, "num_layers": 4}), {})
    unetr = VoltaUNETR(1, 3, (32, 32, 32), num_layers=4, num_heads=4, **sizes)
    report = start_from(unetr, "volta", path, 0, "vit.")
    assert report is not None and report.loaded
    assert not any(p.requires_grad for p in unetr.vit.parameters())
    assert all(p.requires_grad for p in unetr.decoder2.parameters())
    # As many weights of the same shapes, but another function.
    with pytest.raises(InputError, match=r"another configuration(?s:.)*num_heads +4 +8"):
        start_from(VoltaUNETR(1, 3, (32, 32, 32), num_layers=4, num_heads=8, **sizes), "volta", path, 0, "vit.")
    stock = UNETR(1, 3, (32, 32, 32), num_heads=4, proj_type="conv", **sizes)
    with pytest.raises(InputError, match=r"another configuration(?s:.)*num_layers +4 +12"):
        start_from(stock, "volta", path, 0, "vit.")


def test_models_are_plain_tensors_with_a_record_and_load_whole_or_not_at_all(tmp_path):
    network = Headed()
    save_model(tmp_path / "model.pt", network, {"threshold": 0.3})
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(state) == set(network.state_dict())
    other = Headed()
    assert load_model(other, tmp_path / "model.pt")["threshold"] == 0.3
    torch.testing.assert_close(other.head.weight, network.head.weight, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"another network(?s:.)*bias +- +\(2,\)") as caught:
        load_model(nn.Linear(32, 2), tmp_path / "model.pt")
    assert "tiny.json" in str(caught.value)
    with pytest.raises(InputError, match="no such model"):
        load_model(other, tmp_path / "none.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="changed or cut"):
        load_model(other, tmp_path / "model.pt")


# --- data --------------------------------------------------------------------------------------------------------


def test_cached_samples_equal_fresh_ones_and_depend_on_epoch_and_index_alone():
    calls: list[int] = []

    def count(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return value.clone()

    transform = Compose([Lambdad("image", count), RandGaussianNoised("image", prob=1.0, std=1.0)])
    items = [{"image": torch.full((1, 2, 2), float(index)), "label": index} for index in range(4)]
    cached = KeyedCacheDataset(items, transform, seed=3)
    fresh = KeyedCacheDataset(items, transform, seed=3, cache=False)
    keys = [(1, 2), (2, 2), (1, 0), (1, 2)]
    samples = [cached[key]["image"] for key in keys]
    assert len(calls) == 2
    for key, sample in zip(keys, samples):
        torch.testing.assert_close(fresh[key]["image"], sample, rtol=0, atol=0)
    torch.testing.assert_close(samples[0], samples[3], rtol=0, atol=0)
    assert not torch.equal(samples[0], samples[1])
    assert cached[(2, 1)]["key"].tolist() == [2, 1]
    cached.fill(workers=2)
    before = len(calls)
    assert [int(cached[index]["label"]) for index in range(4)] == [0, 1, 2, 3]
    assert len(calls) == before
    assert torch.equal(items[2]["image"], torch.full((1, 2, 2), 2.0))


# --- handlers ----------------------------------------------------------------------------------------------------


def engine_of(values: list[float], epochs: int) -> Any:
    """An engine whose mini-batches have the given losses."""
    engine: Any = Engine(lambda e, batch: {"loss": torch.tensor(batch)})
    engine.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return engine


def test_plan_sets_the_rate_of_every_step_and_the_order_of_every_epoch():
    sampler = ResumableSampler(3, seed=1)
    schedule = CosineSchedule(1.0, 0.0, total_steps=6, warmup_steps=2)
    engine = engine_of([], 2)
    TrainingPlan(sampler, schedule).attach(engine)
    rates: list[float] = []
    epochs: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rates.append(e.optimizer.param_groups[0]["lr"]))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: epochs.append(sampler.epoch))
    engine.run([0.0, 0.0, 0.0], max_epochs=2)
    assert epochs == [1, 2]
    cosine = [(1 + np.cos(np.pi * step / 3)) / 2 for step in range(4)]
    np.testing.assert_allclose(rates, [0.0, 0.5, *cosine], atol=1e-12)


def test_record_keeps_epoch_means_and_resumes_with_them():
    engine = engine_of([], 2)
    record = RunRecord({"seed": 0}, {"fold": 1})
    record.attach(engine)
    engine.run([1.0, 2.0, 6.0], max_epochs=2)
    assert [row["train_loss"] for row in record.history] == [3.0, 3.0]
    assert engine.state.metrics["train_loss"] == 3.0
    again = RunRecord({}, {})
    again.load_state_dict(record.state_dict())
    assert again.history == record.history


def test_a_finished_run_is_scored_once_and_not_trained_again(tmp_path):
    calls: list[int] = []

    def results(engine: Engine) -> Results:
        calls.append(engine.state.epoch)
        (tmp_path / "table.csv").write_text("x")
        return Results({"auroc": 0.5}, [("table.csv", "predictions")], {"more": 1})

    def run(settings: dict[str, Any]) -> int:
        steps: list[float] = []
        engine: Any = Engine(lambda e, batch: steps.append(batch))
        FinishRun(tmp_path, settings, {"fold": 0}, results, checkpoint_path=tmp_path / "checkpoint.pt").attach(engine)
        engine.run([0.0, 0.0], max_epochs=3)
        return len(steps)

    (tmp_path / "checkpoint.pt").write_text("x")
    assert run({"size": (1, 2)}) == 6
    assert not (tmp_path / "checkpoint.pt").exists()
    content = read_json(tmp_path / "result.json")
    assert content["metrics"] == {"auroc": 0.5} and content["more"] == 1 and content["tags"] == {"fold": "0"}
    assert run({"size": (1, 2)}) == 0
    assert calls == [3]
    with pytest.raises(InputError, match=r"other settings(?s:.)*size  \[1, 2\]  \[1, 3\]"):
        run({"size": (1, 3)})


def test_tags_tell_everything_that_runs_are_compared_by(tmp_path):
    datalist: Any = SimpleNamespace(
        name="demo", hash="h", content={"training": [{"cohort": "phantom"}, {"cohort": "x"}]}
    )
    tags = run_tags("ixi_sex", "volta", 2, 0.2, 7, datalist, Origin("e", "p", "allowed", ("a",)))
    expected = {
        "bundle": "ixi_sex",
        "init": "volta",
        "fold": "2",
        "fraction": "0.2",
        "seed": "7",
        "datalist_hash": "h",
        "datalist_name": "demo",
        "encoder_sha256": "e",
        "pretrain_datalist_hash": "p",
        "leak": "allowed",
        "phantom": "true",
    }
    assert {name: tags[name] for name in expected} == expected
    assert set(tags) - set(expected) == {"code_version"}
    write_json(tmp_path / "x.json", tags)
    assert json.loads((tmp_path / "x.json").read_text()) == tags
