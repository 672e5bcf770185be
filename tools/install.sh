#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what locks/LIST.txt names, and PyTorch before it; each file has to have a known hash: tools/install.sh PYTHON LIST
# A CPU build of PyTorch that pip finds is taken. Any other Linux build needs CUDA's libraries, which are not in LIST.
set -euo pipefail
python=$1
list=$2
locks=$(cd "$(dirname "$0")/../locks" && pwd)
install=("$python" -m pip install --quiet --no-deps --require-hashes)
needs_cuda='from importlib.metadata import requires; raise SystemExit("cuda" not in str(requires("torch")))'
"${install[@]}" -r "$locks/build.txt"
"${install[@]}" -r "$locks/torch.txt"
if "$python" -c "$needs_cuda"; then
    "${install[@]}" -r "$locks/cuda.txt"
fi
"${install[@]}" --no-build-isolation -r "$locks/$list.txt"
