# SPDX-License-Identifier: Apache-2.0
"""Which items of a datalist have a class."""

from __future__ import annotations

import json

import pytest
from prepared import make_prepared

from volta_components.data.datalist import load_datalist
from volta_components.downstream.classification import labelled_items
from volta_components.errors import InputError
from volta_components.files import read_json


@pytest.mark.filterwarnings("ignore:.*was changed since")
def test_aibl_takes_a_patients_first_session_unless_told_otherwise(tmp_path):
    prepared = make_prepared(tmp_path / "data", count=12, shape=(8, 8, 8))
    content = read_json(prepared / "datalist.json")
    items = content["training"]
    later = {**items[0], "session": "ses-M018", "diagnosis": "AD"}
    content["training"] = sorted([*items, later], key=lambda item: (item["subject_id"], item["session"]))
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    datalist = load_datalist(tmp_path)
    first = labelled_items(datalist, "diagnosis", ["CN", "AD"])
    assert len(first.items) == 12 and first.items[0]["label"] == 0
    assert first.left_out == [("sub-0000_ses-M018", "not the patient's first session")]
    assert len(labelled_items(datalist, "diagnosis", ["CN", "AD"], "all").items) == 13
    with pytest.raises(InputError, match="no scan with diagnosis CN"):
        labelled_items(datalist, "diagnosis", ["CN", "AD"], "ses-M018")
