# SPDX-License-Identifier: Apache-2.0
"""Inits, and overlays by name or path."""

from __future__ import annotations

from pathlib import Path

import pytest

from volta_components.downstream.inits import find_overlay, is_pretrained
from volta_components.errors import InputError


def test_an_init_starts_from_weights_or_from_scratch() -> None:
    assert is_pretrained("volta") and not is_pretrained("swin_scratch")
    with pytest.raises(InputError, match="init 'vit'"):
        is_pretrained("vit")


def test_an_overlay_is_found_by_its_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, own = tmp_path / "bundle" / "configs", tmp_path / "ours.json"
    configs.mkdir(parents=True)
    for path in (configs / "train.json", configs / "tiny.json", own):
        path.write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_overlay(configs, "tiny") == find_overlay(configs, "tiny.json") == configs / "tiny.json"
    assert find_overlay(configs, str(own)) == find_overlay(configs, "ours") == own
    with pytest.raises(InputError, match=r"tinny\.json: no such overlay; this bundle has tiny, or give a path"):
        find_overlay(configs, "tinny")
