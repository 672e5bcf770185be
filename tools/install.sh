#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what locks/LIST.txt names, and PyTorch before it; each file has to have a known hash: tools/install.sh PYTHON LIST
# A CPU build of PyTorch that pip finds is taken. Any other Linux build needs CUDA's libraries, which are not in LIST.
# It is fetched before its hash is looked at: of several builds, pip would take one whose hash its index shows. One in a
# folder of PIP_FIND_LINKS is the user's own.
set -euo pipefail
python=$1
list=$2
locks=$(cd "$(dirname "$0")/../locks" && pwd)
install=("$python" -m pip install --quiet --no-deps --require-hashes)
needs_cuda='from importlib.metadata import requires; raise SystemExit("cuda" not in str(requires("torch")))'
"${install[@]}" -r "$locks/build.txt"
fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$fetched" "$(grep -o '^torch==[^ ]*' "$locks/torch.txt")"
wheel=$(basename "$fetched"/torch-*.whl)
own=
for folder in ${PIP_FIND_LINKS:-}; do
    [[ -f "$folder/$wheel" ]] && own=$folder/$wheel
done
if [[ -n "$own" ]]; then  # somebody has put it there, perhaps built it
    echo "PyTorch from $own, whatever its hash"
    "$python" -m pip install --quiet --no-deps --no-index "$own"
else
    "${install[@]}" --no-index --find-links "$fetched" -r "$locks/torch.txt"
fi
if "$python" -c "$needs_cuda"; then
    "${install[@]}" -r "$locks/cuda.txt"
fi
"${install[@]}" --no-build-isolation -r "$locks/$list.txt"
