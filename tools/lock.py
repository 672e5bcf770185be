# SPDX-License-Identifier: Apache-2.0
"""Renew the hashes in ``locks/`` after a change of versions: ``python -m tools.lock``, with uv on the PATH.

``make`` installs nothing but what is listed there (pip's ``--require-hashes``). The lists hold every file of each
release on the Python Package Index, so that they serve all platforms and Pythons.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
BUILD = ("pip", "setuptools", "wheel")
CUDA = re.compile(r"(cuda|nvidia)-|triton$")
# PyTorch's own CPU builds for Linux, which are not on the Python Package Index: SHA-256 of the wheels for Python 3.11,
# 3.12 and 3.13 on x86_64 and on aarch64, of this release. A new release needs new ones, from PyTorch's index.
CPU_BUILDS = {
    "2.13.0": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    )
}


def compiled(*words: str, text: str | None = None) -> dict[str, str]:
    """What ``uv pip compile`` makes of these inputs: requirement with marker and hashes, by name."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
    made = subprocess.run(
        [*command, "--no-header", "--no-annotate", *words], cwd=ROOT, input=text, stdout=subprocess.PIPE, text=True
    )
    if made.returncode:
        raise SystemExit("tools.lock: uv failed, see above")
    return {part.split("==")[0]: part for part in re.split(r"\n(?=\S)", made.stdout.strip())}


def with_cpu_builds(torch: str) -> str:
    """The requirement of PyTorch, with the hashes of its CPU builds."""
    version = re.split(r"[=\s]+", torch)[1]
    if version not in CPU_BUILDS:
        raise SystemExit(
            f"tools.lock: torch {version}: add the hashes of its CPU builds to CPU_BUILDS in tools/lock.py"
        )
    return " \\\n".join([torch, *(f"    --hash=sha256:{digest}" for digest in CPU_BUILDS[version])])


def write(name: str, parts: Mapping[str, str]) -> None:
    """Write one list."""
    lines = [f"# Made by python -m tools.lock; {len(parts)} releases.", *(parts[key] for key in sorted(parts))]
    (LOCKS / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"locks/{name}.txt: {len(parts)} releases")


def main() -> int:
    """Write all lists."""
    LOCKS.mkdir(exist_ok=True)
    setup = compiled("setup.cfg", "--extra", "dev", "--constraints", "constraints.txt")
    label = compiled("label/requirements.txt")
    label |= compiled("label/requirements-nodeps.txt", "--no-deps")
    write("build", compiled("-", "--constraints", "constraints.txt", text="\n".join(BUILD)))
    write("torch", {"torch": with_cpu_builds(setup["torch"])})
    write("cuda", {name: part for name, part in setup.items() if CUDA.match(name)})
    for kind, parts in (("setup", setup), ("label", label)):
        write(kind, {name: part for name, part in parts.items() if name != "torch" and not CUDA.match(name)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
