#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the MONAI Label server needs, into an environment of its own: bash label/install.sh PYTHON PACKAGE
# PYTHON is that environment's. PACKAGE is what pip installs volta_components from, such as its wheel.
set -euo pipefail
python=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
install=("$python" -m pip install --quiet)
if [ -d "$here/../locks" ]; then  # a checkout
    bash "$here/../tools/install.sh" "$python" label
else
    "${install[@]}" --upgrade -c "$here/constraints.txt" pip setuptools wheel
    "${install[@]}" "$(grep '^torch==' "$here/requirements.txt")"
    "${install[@]}" -r "$here/requirements.txt"
    "${install[@]}" --no-deps -r "$here/requirements-nodeps.txt"
fi
"${install[@]}" --no-deps "$@"
# No release of torchvision may fit the installed PyTorch; MONAI Label needs two names of it.
"$python" -c "import torchvision.utils" 2>/dev/null ||
    cp -r "$here/standin/torchvision" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
