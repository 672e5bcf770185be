# SPDX-License-Identifier: Apache-2.0
"""The leak guard: who is scored was not trained on."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from fine_tuning import SIZES, make_encoder

from volta_components.downstream.leaks import Origin, check_encoder, check_model, check_origin
from volta_components.errors import InputError
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder
from volta_components.training.record import patient_key, provenance


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
    with pytest.raises(InputError, match="has no list of pretraining subjects"):
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
        ({}, "on which subjects it was trained and pretrained,"),
        (model_record(provenance={}), "on which subjects it was trained,"),
        (model_record(pretraining={"patient_ids": None}), "on which subjects it was pretrained,"),
        ({"provenance": {"patient_ids": []}, "tags": {"encoder_sha256": "ab"}}, "on which subjects it was pretrained,"),
    ],
)
def test_a_model_without_a_list_of_its_subjects_is_not_scored(record, what):
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
    check_encoder("volta", tmp_path / "bundle")
    with pytest.raises(InputError, match=r"other/models/encoder\.safetensors: no such encoder"):
        check_encoder("volta", tmp_path / "other")


def test_scratch_needs_no_encoder_and_a_missing_one_says_what_to_do(tmp_path):
    path = tmp_path / "none.safetensors"
    check_encoder("swin_scratch", path)
    assert check_origin("swin_scratch", path, []) == check_origin("volta", path, [{"patient_id": "x"}]) == Origin()
    with pytest.raises(InputError, match=r"bundles/pretrain/configs/train\.json"):
        check_encoder("volta", path)
    with pytest.raises(InputError, match="init 'vit'"):
        check_origin("vit", tmp_path / "none.safetensors", [])
