#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a GPU can tell, in one run of about twenty minutes, written to benchmarks/results/gpu.md with the card's name:
# whether anything waits for the GPU, the tests, a step at the paper's size in bfloat16 and compiled with its memory, the
# same beside stock forms and in float32, how fast the loader is, some minutes of pretraining by train.json on synthetic
# heads with their curve, fine-tuning and inference. Each part has a time limit, and each form of a step; what fails says
# so in the report, and the others are measured. The report grows as the parts end: a run that is cut short leaves what
# it has.
#
#   benchmarks/gpu.sh [--tiny] [--parts "waits tests ..."] [--epochs N] [--wheels FOLDER] [--output FILE]
#
# --tiny: small sizes and a few seconds of pretraining, on a CPU where there is no GPU: a test of this script.
# --parts: only some of waits, tests, step, beside, loader, pretrain, tasks.
# --epochs: of pretraining on 24 heads, 300 by default.
# --wheels (or the variable WHEELS): for a machine with PyTorch but neither MONAI nor a network: wheels from this folder
# are unpacked and used. They are fetched elsewhere, for the Python of that machine:
#   grep -E '^[A-Za-z].*==' constraints.txt | grep -vE '^(torch|nvidia|triton|cuda)' >names.txt
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest FOLDER -r names.txt
set -euo pipefail
cd "$(dirname "$0")/.."
size=paper output=benchmarks/results/gpu.md
seconds=400 subjects=24 epochs=300 warmup=20 spacing=1 shape=144,192,192 overlay="" # of pretraining
wheels=${WHEELS:-} slack=1 parts="waits tests step beside loader pretrain tasks"
while [ $# -gt 0 ]; do
    case "$1" in
        --tiny) size=tiny seconds=20 subjects=10 epochs=2 warmup=1 spacing=3 shape=48,64,64
            overlay=",'bundles/pretrain/configs/tiny.json'" ;;
        --parts) parts=$2; shift ;;
        --epochs) epochs=$2; shift ;;
        --wheels) wheels=$2; shift ;;
        --output) output=$2; shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
    shift
done
python=$(command -v python || command -v python3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
    "$python" -c 'import sys, zipfile
for wheel in sys.argv[2:]: zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$work/packages" "$wheels"/*.whl
    PYTHONPATH=$PYTHONPATH:$work/packages
fi
{ read -r device; read -r card; read -r torch; } < <("$python" -c '
import torch
found = torch.cuda.is_available()
print("cuda" if found else "cpu", torch.cuda.get_device_name() if found else "no GPU: a CPU", torch.__version__, sep="\n")')
[ "$device" = cuda ] || slack=20
if [ "$device" = cpu ] && [ "$size" != tiny ]; then
    echo "there is no GPU; benchmarks/gpu.sh --tiny runs the same on a CPU at small sizes" >&2
    exit 1
fi
mkdir -p "$(dirname "$output")"
report=$output
part() { printf '\n## %s\n\n' "$1" | tee -a "$report"; }
wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac; }
# A command with a time limit in seconds (longer on a CPU); what fails is part of the report, and the rest goes on.
try() {
    timeout --kill-after=10 "$(($1 * slack))" "${@:2}" 2> >(tee "$work/errors.txt" >&2) | tee -a "$report" && return
    { printf '\nnot finished within %s seconds, or failed:\n' "$(($1 * slack))"; tail -n 12 "$work/errors.txt"; } | tee -a "$report"
}
step() {
    try "$1" "$python" benchmarks/step.py --size "$size" --device "$device" --turns 1 --limit "$((120 * slack))" "${@:2}"
}

printf '# On %s\n\n`benchmarks/gpu.sh`, sizes: %s, %s, torch %s\n' "$card" "$size" "$(date -u +%F)" "$torch" >"$report"
if [ "$device" = cpu ]; then
    printf '\n**No GPU was to be had.** These figures test the script, at small sizes on a CPU; they say nothing of a GPU.\n' >>"$report"
fi

tests() {
    if [ "$device" = cpu ]; then
        echo "not run: they need a GPU" | tee -a "$report"
        return
    fi
    # Several at a time: most of a test's time goes into starting processes.
    VOLTA_TEST_GPU=1 try "$1" "$python" -m pytest -v --tb=short -p no:cacheprovider -n 6 tests/integration/test_gpu.py \
        "${@:2}"
}
in_process="nothing_waits or a_graph"
if wanted waits; then
    part "Does anything wait for the GPU within a mini-batch? Does a recorded one compute the same?"
    tests 120 -k "$in_process"
fi
if wanted tests; then
    part "Each training and each inference on the GPU (make test-gpu)"
    tests 300 -k "not ($in_process)"
fi
if wanted step; then
    part "A step: compiled, kernel by kernel, of eight volumes, with data from disk; its memory"
    step 400 --repeats 3 --rows "plain / compiled" "kernel by kernel" "8 volumes" crops_96 "from disk"
fi
if wanted beside; then
    part "A step beside stock MONAI and a peer, and in float32; memory; views"
    step 600 --repeats 3 --rows "peak memory" "the same in float32" "stock MONAI / this" "a second" "DINOv2" "the same with"
fi
if wanted loader; then
    part "The loader"
    try 90 "$python" benchmarks/loader.py --size "$size"
fi
if wanted pretrain; then
    part "Pretraining on $subjects synthetic heads, $epochs epochs or $((seconds * slack)) seconds at most"
    {
        timeout "$((180 * slack))" "$python" -m volta_components.cli phantom --output "$work/raw" --subjects "$subjects" \
            --seed 1 --spacing "$spacing"
        timeout "$((120 * slack))" "$python" -m volta_components.cli prepare --layout bids --source "$work/raw" \
            --output "$work/data" --spacing "$spacing" --shape "$shape"
    } >"$work/data.txt" 2>&1 || tail -n 5 "$work/data.txt" | tee -a "$report"
    # Ends by itself after the last epoch, or by the signal after which nothing is lost.
    timeout --signal=TERM --kill-after=60 "$((seconds * slack))" "$python" -m monai.bundle run \
        --config_file "['bundles/pretrain/configs/train.json'$overlay]" \
        --dataset_dir "$work/data" --output_dir "$work/run" --encoder_path "$work/encoder.safetensors" \
        --epochs "$epochs" --warmup_epochs "$warmup" >"$work/run.txt" 2>&1 || true
    # Not through grep -q, which ends before a long curve is written.
    curve=$(grep -oE 'epoch [0-9]+ of [0-9]+: .*' "$work/run.txt" | awk 'NR <= 3 || NR % 10 == 0 { print "    " $0 }' || true)
    { [ -n "$curve" ] && echo "$curve" || { echo "no epoch was finished:"; tail -n 5 "$work/run.txt"; }; } | tee -a "$report"
fi
if wanted tasks; then
    part "Fine-tuning and inference"
    step 300 --repeats 2 --rows hippocampus fine-tuning
fi

echo "written to $output"
