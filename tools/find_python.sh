#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Print the path of a Python from 3.11 on that can make virtual environments. Everything else goes to standard error.
# usage: tools/find_python.sh [PYTHON]   with PYTHON, no other is tried
set -uo pipefail

# The first is the version that most checks run with.
candidates=(python3.11 python3.12 python3.13 python3)
if [ -n "${1:-}" ]; then
    candidates=("$1")
fi

# Any Python can run this, Python 2 too. Debian's has venv without ensurepip until python3-venv is installed.
question='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info < (3, 11):
    sys.exit("Python " + version + ", older than 3.11")
try:
    import ensurepip, venv
except ImportError as error:
    remedy = "on Debian and Ubuntu: apt install python%d.%d-venv" % sys.version_info[:2]
    sys.exit("Python " + version + " without " + error.name + " (" + remedy + ")")
print(version)
'

report=""
for name in "${candidates[@]}"; do
    if ! path=$(command -v "$name"); then
        report+="  $name: not found"$'\n'
    elif version=$("$path" -c "$question" 2>/dev/null); then
        echo "Found Python $version: $path" >&2
        echo "$path"
        exit 0
    else
        # The first line says why: the question's own answer, or that of a pyenv shim whose version is not active.
        reason=$("$path" -c "$question" 2>&1)
        report+="  $path: ${reason%%$'\n'*}"$'\n'
    fi
done

if [ -n "${1:-}" ]; then
    printf 'PYTHON cannot be used. Python 3.11 or later with venv is needed.\n%s' "$report" >&2
else
    cat >&2 <<END
No Python 3.11 or later with venv was found. These were tried:
$report
Install one, then run make again:
  Debian 12, Ubuntu 24.04 or later   apt install python3 python3-venv
  macOS                              brew install python@3.13
  conda                              conda create -n volta python=3.13 && conda activate volta
Or say where one is:
  make PYTHON=/path/to/python3.13 TARGET
END
fi
exit 1
