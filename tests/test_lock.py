# SPDX-License-Identifier: Apache-2.0
"""The lists of hashes that ``make`` installs from hold the releases of the constraints, and nothing without a hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.utils import canonicalize_name

from tools import lock

ROOT = Path(__file__).parents[1]
NAMES = ("build", "torch", "cuda", "setup", "label")


def listed(name: str) -> dict[str, str]:
    """What is written of each release in a list: the requirement with all of its hashes."""
    lines = (ROOT / "locks" / f"{name}.txt").read_text().split("\n", 1)[1]
    return {part.split("==")[0]: part for part in re.split(r"\n(?=\S)", lines.strip())}


def versions(*texts: str) -> dict[str, str]:
    found = [line.split("==", 1) for text in texts for line in text.splitlines() if re.match(r"\S+==", line)]
    return {canonicalize_name(name.split("[")[0]): re.split(r"[\s;]", version)[0] for name, version in found}


@pytest.mark.parametrize("name", NAMES)
def test_every_release_is_exact_and_has_hashes(name: str) -> None:
    for part in listed(name).values():
        requirement, *hashes = [line.strip(" \\") for line in part.splitlines()]
        assert re.fullmatch(r"[a-z0-9.-]+==[^\s;=]+( ; .+)?", requirement), requirement
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("setup", ["constraints.txt"]),
        ("label", ["label/constraints.txt", "label/requirements.txt", "label/requirements-nodeps.txt"]),
    ],
)
def test_the_lists_hold_the_releases_that_the_constraints_name(name: str, inputs: list[str]) -> None:
    wanted = versions(*[(ROOT / path).read_text() for path in inputs])
    parts: Mapping[str, str] = {key: part for kind in ("build", "torch", name) for key, part in listed(kind).items()}
    assert versions(*parts.values()).items() >= wanted.items(), "run python -m tools.lock"
    # The rest is for other platforms.
    for key in versions(*parts.values()).keys() - wanted.keys():
        marker = parts[key].splitlines()[0].strip(" \\").partition(" ; ")[2]
        assert marker and not Marker(marker).evaluate(
            {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"}
        ), f"{key} is not in {inputs[0]}"


def test_a_new_pytorch_needs_the_hashes_of_its_cpu_builds() -> None:
    assert len(lock.with_cpu_builds("torch==2.13.0 \\\n    --hash=sha256:0").splitlines()) == 8
    with pytest.raises(SystemExit, match=r"torch 9\.9: add the hashes"):
        lock.with_cpu_builds("torch==9.9 \\\n    --hash=sha256:0")
