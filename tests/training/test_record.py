# SPDX-License-Identifier: Apache-2.0
"""What a run was made from."""

from __future__ import annotations

import json

from volta_components import __version__
from volta_components.training.record import code_version, patient_key, provenance


def test_provenance_tells_whom_an_encoder_has_seen_without_their_names() -> None:
    items = [{"patient_id": name, "session": str(i)} for i, name in enumerate(["sub-0002", "sub-0001", "sub-0002"])]
    record = provenance({"seed": 0}, "abc", iter(items), "phantom")
    assert (record["volumes"], record["cohort"]) == (3, "phantom")
    assert record["patient_ids"] == sorted({patient_key("sub-0001"), patient_key("sub-0002")})
    assert len(record["patient_ids"]) == 2
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in record["patient_ids"])
    assert "sub-0001" not in json.dumps(record)


def test_the_version_of_the_code_is_known() -> None:
    assert code_version().startswith(__version__)
