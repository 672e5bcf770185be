# SPDX-License-Identifier: Apache-2.0
"""What records keep of people, and how it is sealed."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path

import pytest

from volta_components.errors import InputError
from volta_components.training.people import (
    facts_of,
    joined,
    key_of,
    make_secret,
    name_of,
    patient_key,
    patient_keys,
    read_secret,
    sealed,
    sealed_record,
)

ITEMS = [
    {"patient_id": "sub-0001", "cohort": "a", "voxels_sha256": "1" * 64, "fingerprint": "ab" * 64},
    {"patient_id": "IXI002", "cohort": "a", "source_sha256": "2" * 64},
]


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config" / "secret"
    monkeypatch.setenv("VOLTA3D_SECRET", str(path))
    return path


def test_a_secret_is_made_once_and_only_its_owner_reads_it(secret):
    assert read_secret() is None
    made = make_secret()
    assert len(made) == 64 and make_secret() == read_secret() == made
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and list(secret.parent.iterdir()) == [secret]
    secret.write_text("short")
    with pytest.raises(InputError, match="too short for a secret"):
        make_secret()


def test_a_secret_that_cannot_be_kept_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VOLTA3D_SECRET", str(tmp_path / "file" / "secret"))
    with pytest.raises(InputError, match=r"file/secret: the lab's secret cannot be"):
        make_secret()


def test_people_of_an_old_record_are_known_by_the_names_that_a_merge_gave_them():
    old = hashlib.sha256(b"a/a-sub-0001").hexdigest()[:16]
    assert old in patient_keys(ITEMS[0]) and old in patient_keys({"patient_id": "a-sub-0001", "cohort": "a"})
    assert old not in patient_keys({"patient_id": "sub-0001", "cohort": "b"})


def test_sealed_hashes_cannot_be_made_without_the_secret(secret):
    plain = facts_of(ITEMS)
    closed = sealed(plain, make_secret())
    own = hmac.new(make_secret(), patient_key("ixi-2").encode(), hashlib.sha256).hexdigest()[:16]
    assert own in closed["patient_ids"] and "fingerprints" not in closed
    for name in ("patient_ids", "look_alike_ids", "voxel_hashes"):
        assert len(closed[name]) == len(plain[name]) == 2 and not {*closed[name]} & {*plain[name]}
    assert sealed(closed, b"other" * 10) == closed and closed["sealed_with"] == name_of(make_secret())
    record = {"provenance": {"volumes": 2, **plain}, "pretraining": None, "metrics": {}}
    text = json.dumps(sealed_record(record, make_secret()))
    assert not any(value in text for values in plain.values() for value in values)
    assert sealed_record(record, None) == record
    assert key_of(closed) == make_secret() and key_of(plain) == b""
    secret.write_text("x" * 64)
    assert key_of(closed) is None


def test_a_further_training_adds_its_people(secret):
    new = [{"patient_id": "AIBL7", "sha256": "3" * 64}]
    for before in (facts_of(ITEMS), sealed(facts_of(ITEMS), make_secret())):
        both = joined(before, new)
        assert both is not None and len(both["patient_ids"]) == 3 and len(both["voxel_hashes"]) == 3
        assert both.get("sealed_with") == before.get("sealed_with")
        assert {*before["patient_ids"]} < {*both["patient_ids"]}
    assert joined({"patient_ids": None}, new) is None
    assert joined({"patient_ids": [], "sealed_with": "another"}, new) is None
