# SPDX-License-Identifier: Apache-2.0
"""The leak guard: who is scored was not trained on."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import pytest
from fine_tuning import SIZES, make_encoder

from volta_components.downstream.leaks import Origin, check_encoder, check_model, check_origin
from volta_components.errors import InputError
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder
from volta_components.training.people import facts_of, make_secret, patient_key, sealed
from volta_components.training.record import provenance


def test_scored_patients_who_were_pretrained_on_are_an_error_with_their_ids(tmp_path):
    path = make_encoder(tmp_path / "encoder.safetensors", ["sub-001", "002_S_0295"])
    scored = [{"patient_id": "sub-ADNI002S0295"}, {"patient_id": "sub-007"}]
    with pytest.raises(InputError, match="1 of the 2 scored patients") as caught:
        check_origin("volta", path, scored)
    assert "sub-ADNI002S0295" in str(caught.value) and "sub-007" not in str(caught.value)
    origin = check_origin("volta", path, scored, allow_leak=True)
    assert origin.leak == "allowed"
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
    assert origin.leak == "none" and len(origin.record["patient_ids"]) == 2
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


def trained_on(path, *items: dict[str, Any]):
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES), provenance({}, "d" * 64, items))
    return path


def test_ids_that_look_alike_are_refused_until_they_are_accepted(tmp_path):
    path = trained_on(tmp_path / "encoder.safetensors", {"patient_id": "sub-0007", "cohort": "clinic"})
    for patient in ("7", "SUB-7", "subject_07", "clinic-7"):
        scored = [{"patient_id": patient, "cohort": "Clinic"}, {"patient_id": "sub-8", "cohort": "clinic"}]
        with pytest.raises(InputError, match=rf"1 scored patients have ids that look like(?s:.)*\n  {patient}\n"):
            check_origin("volta", path, scored)
        assert check_origin("volta", path, scored, accept_look_alikes=True).leak == "none"
        assert check_origin("volta", path, scored, allow_leak=True).leak == "allowed"
    assert check_origin("volta", path, [{"patient_id": "7", "cohort": "other"}]).leak == "none"


def test_the_same_voxels_under_another_id_are_a_leak(tmp_path):
    path = trained_on(
        tmp_path / "encoder.safetensors", {"patient_id": "a", "voxels_sha256": "1" * 64, "sha256": "2" * 64}
    )
    for hashes in ({"voxels_sha256": "1" * 64}, {"source_sha256": "2" * 64}):
        with pytest.raises(InputError, match=r"1 of the 1 scored(?s:.)*\n  b +the same voxels, under another id"):
            check_origin("volta", path, [{"patient_id": "b", **hashes}])
    record = {"provenance": {"patient_ids": [], "voxel_hashes": ["1" * 16]}, "pretraining": None}
    with pytest.raises(InputError, match=r"trained on +the same voxels"):
        check_model(record, [{"patient_id": "b", "voxels_sha256": "1" * 64}])


def test_near_copies_are_a_warning_that_names_them(tmp_path):
    print_ = "0f" * 64
    path = trained_on(tmp_path / "encoder.safetensors", {"patient_id": "a", "fingerprint": print_})
    near, far = "07" + print_[2:], "f0" * 64
    with pytest.warns(UserWarning, match=r"1 scored volumes look like.*sub-b_ses-1 and 0f0f0f0f0f0f0f0f"):
        scored = [{"patient_id": "b", "subject_id": "sub-b", "session": "ses-1", "fingerprint": near}]
        assert check_origin("volta", path, scored).leak == "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_origin("volta", path, [{"patient_id": "b", "subject_id": "b", "fingerprint": far}, {"patient_id": "c"}])


def test_what_another_lab_has_sealed_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLTA3D_SECRET", str(tmp_path / "secret"))
    closed = sealed(facts_of([{"patient_id": "a"}, {"patient_id": "b"}]), make_secret())
    model = {"provenance": closed, "pretraining": None}
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES), {**closed, "datalist_hash": "d"})
    with pytest.raises(InputError, match="1 of the 1 scored"):
        check_model(model, [{"patient_id": "a"}])
    assert (
        check_model(model, [{"patient_id": "c"}]) == check_origin("volta", path, [{"patient_id": "c"}]).leak == "none"
    )
    (tmp_path / "secret").write_text("z" * 64)
    for patient in ("a", "c"):
        with pytest.raises(InputError, match="another lab has sealed on which subjects the model was trained"):
            check_model(model, [{"patient_id": patient}])
        with pytest.raises(InputError, match="a list of 2 subjects that another lab has sealed"):
            check_origin("volta", path, [{"patient_id": patient}])
        assert check_model(model, [{"patient_id": patient}], allow_leak=True) == "allowed"
        assert check_origin("volta", path, [{"patient_id": patient}], allow_leak=True).leak == "allowed"
