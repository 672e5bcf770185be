#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a GPU can tell, in one run of about ten minutes, written to benchmarks/results/gpu.md with the card's name:
# tests (none of which may wait for the GPU within a mini-batch), a step at the paper's size in float32, bfloat16 and
# compiled, with its memory, how fast the loader is, and five minutes of pretraining with their curve.
#
#   benchmarks/gpu.sh [--tiny] [--wheels FOLDER] [--output FILE]
#
# --tiny: small sizes and a few seconds of pretraining, on a CPU where there is no GPU.
# --wheels: for a machine with PyTorch but neither MONAI nor a network: wheels from this folder are unpacked and used.
set -euo pipefail
cd "$(dirname "$0")/.."
size=paper minutes=5 subjects=64 epochs=200 wheels="" output=benchmarks/results/gpu.md
while [ $# -gt 0 ]; do
    case "$1" in
        --tiny) size=tiny minutes=1 subjects=10 epochs=2 ;;
        --wheels) wheels=$2; shift ;;
        --output) output=$2; shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
    shift
done
python=$(command -v python || command -v python3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD
if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/packages"; done
    export PYTHONPATH=$PWD:$work/packages
fi
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a CPU")')
if [ "$device" = cpu ] && [ "$size" != tiny ]; then
    echo "there is no GPU; benchmarks/gpu.sh --tiny runs the same on a CPU at small sizes" >&2
    exit 1
fi
report=$work/report.md
part() { printf '\n## %s\n\n' "$1" | tee -a "$report"; }
# What fails is part of the report, and does not keep the rest from running.
try() { "$@" 2>"$work/errors.txt" | tee -a "$report" || { echo; echo "failed:"; tail -n 5 "$work/errors.txt"; } | tee -a "$report"; }

printf '# On %s\n\n`benchmarks/gpu.sh`, sizes: %s, %s, torch %s\n' "$card" "$size" "$(date -u +%F)" \
    "$("$python" -c 'import torch; print(torch.__version__)')" >"$report"

part "Tests"
if [ "$device" = cuda ]; then
    VOLTA_TEST_GPU=1 try "$python" -m pytest -q -p no:cacheprovider tests/integration/test_gpu.py
else
    echo "no GPU was to be had: the tests were not run" | tee -a "$report"
fi

part "A step"
try "$python" benchmarks/step.py --size "$size" --device "$device" --turns 1 --repeats 3

part "The loader"
try "$python" benchmarks/loader.py --size "$size"

part "Pretraining, $minutes minutes"
{
    "$python" -m volta_components.cli phantom --output "$work/raw" --subjects "$subjects" --seed 1 --spacing 3
    "$python" -m volta_components.cli prepare --layout bids --source "$work/raw" --output "$work/data" \
        --spacing 3 --shape 48,64,64
} >"$work/data.txt" 2>&1 || tail -n 5 "$work/data.txt" | tee -a "$report"
# Ends by itself after the last epoch, or by the signal after which nothing is lost.
timeout --signal=TERM "${minutes}m" "$python" -m monai.bundle run \
    --config_file "['bundles/pretrain/configs/train.json','bundles/pretrain/configs/tiny.json']" \
    --dataset_dir "$work/data" --output_dir "$work/run" --encoder_path "$work/encoder.safetensors" \
    --epochs "$epochs" --warmup_epochs 1 >"$work/run.txt" 2>&1 || true
if ! grep -oE 'epoch [0-9]+ of [0-9]+: .*' "$work/run.txt" | awk 'NR <= 3 || NR % 10 == 0 { print "    " $0 }' |
    tee -a "$report" | grep -q .; then
    { echo "no epoch was finished:"; tail -n 5 "$work/run.txt"; } | tee -a "$report"
fi

mkdir -p "$(dirname "$output")"
cp "$report" "$output"
echo "written to $output"
