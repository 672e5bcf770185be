# SPDX-License-Identifier: Apache-2.0
"""Each bundle's metadata against the schema.

MONAI's own schema is not part of this repository. Where the variable ``MONAI_META_SCHEMA`` names a copy of it, the
metadata is verified against that as well, and this project's schema is held against it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft201909Validator
from monai.bundle import ConfigParser, verify_metadata
from packed import BUNDLES, ROOT

# Of meta_schema_20240725.json at https://project-monai.github.io/schema/.
OFFICIAL_SHA256 = "cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678"
# What that schema says of each field: (required, JSON type).
FIELDS = {
    **dict.fromkeys(("schema", "version", "monai_version", "pytorch_version", "numpy_version"), (True, "string")),
    **dict.fromkeys(("task", "description", "authors", "copyright"), (True, "string")),
    **dict.fromkeys(("required_packages_version", "network_data_format"), (True, "object")),
    **dict.fromkeys(("data_source", "data_type", "image_classes", "label_classes"), (False, "string")),
    **dict.fromkeys(("pred_classes", "intended_use"), (False, "string")),
    **dict.fromkeys(("changelog", "eval_metrics", "supported_apps"), (False, "object")),
    "references": (False, "array"),
}
TENSOR_FIELDS = {
    **dict.fromkeys(("type", "format", "dtype"), (True, "string")),
    "num_channels": (True, "integer"),
    **dict.fromkeys(("spatial_shape", "value_range"), (True, "array")),
    "is_patch_data": (False, "boolean"),
    "channel_def": (False, "object"),
}
# A value of another type than the named one.
WRONG: dict[str, Any] = {"string": 1, "integer": "one", "array": "x", "boolean": "no", "object": "x"}


def metadata(bundle: str) -> Path:
    return ROOT / "bundles" / bundle / "configs" / "metadata.json"


def validator(schema: Path) -> Draft201909Validator:
    content = json.loads(schema.read_text())
    Draft201909Validator.check_schema(content)
    return Draft201909Validator(content)


def spoilt(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metadata with one thing wrong by MONAI's schema, for each thing."""
    tensors = [("network_data_format", side, name) for side, name in (("inputs", "image"), ("outputs", "pred"))]
    places = [((), FIELDS), *((tensor, TENSOR_FIELDS) for tensor in tensors)]
    for place, fields in places:
        for name, (required, kind) in fields.items():
            for what in ("missing", "type"):
                if what == "missing" and not required:
                    continue
                changed = copy.deepcopy(content)
                target = changed
                for key in place:
                    target = target[key]
                if what == "missing":
                    del target[name]
                else:
                    target[name] = WRONG[kind]
                yield f"{'.'.join((*place, name))}: {what}", changed
    for side in ("inputs", "outputs"):
        changed = copy.deepcopy(content)
        del changed["network_data_format"][side]
        yield f"{side}: missing", changed
    for name, value in (("spatial_shape", [1.5]), ("value_range", ["0", "1"])):
        changed = copy.deepcopy(content)
        changed["network_data_format"]["inputs"]["image"][name] = value
        yield f"{name}: items", changed
    yield "references: items", {**content, "references": [1]}
    yield "another network's format", {**content, "teacher_data_format": {"inputs": {}}}


@pytest.fixture(scope="module")
def official() -> Path:
    """MONAI's own schema, where there is a copy."""
    given = os.environ.get("MONAI_META_SCHEMA")
    if not given:
        pytest.skip("MONAI_META_SCHEMA names no copy of MONAI's meta_schema_20240725.json")
    return Path(given)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_has_the_form(bundle: str, schema: Path) -> None:
    """By jsonschema and by MONAI's command, which downloads nothing where ``filepath`` is there already."""
    content = json.loads(metadata(bundle).read_text())
    assert [error.message for error in validator(schema).iter_errors(content)] == []
    verify_metadata(meta_file=str(metadata(bundle)), filepath=str(schema))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_monais_schema_refuses_is_refused(bundle: str, schema: Path) -> None:
    ours = validator(schema)
    passing = [what for what, content in spoilt(json.loads(metadata(bundle).read_text())) if ours.is_valid(content)]
    assert passing == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_monais_own_schema(bundle: str, official: Path) -> None:
    """By MONAI's command, which compares the file's hash, and by jsonschema; and every spoilt one is one to it."""
    verify_metadata(
        meta_file=str(metadata(bundle)), filepath=str(official), hash_val=OFFICIAL_SHA256, hash_type="sha256"
    )
    theirs, content = validator(official), json.loads(metadata(bundle).read_text())
    assert [error.message for error in theirs.iter_errors(content)] == []
    assert [what for what, changed in spoilt(content) if theirs.is_valid(changed)] == []


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.parametrize("run_name", [7, 20240601, "2024_06_01"])
def test_a_run_name_of_digits_names_the_folder(bundle: str, name: str, run_name: int | str) -> None:
    """``--run_name 7`` arrives as a number."""
    configs = ROOT / "bundles" / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "train.json"), str(configs / f"{name}.json")])
    parser["run_name"] = run_name
    assert Path(parser.get_parsed_content("output_dir")).name == str(run_name)
