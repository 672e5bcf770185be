#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The quick start: the real pipeline, every step by the command that a user would type, with the tiny overlays.
# Finished steps are not done again; `rm -r data runs bundles/*/runs` starts anew.
# With ANATOMIES=DIR, heads grow from that folder's label maps instead of the template; ten of them are scored on.
set -euo pipefail
cd "$(dirname "$0")/.."
export TQDM_MININTERVAL="${TQDM_MININTERVAL:-2}"
# One thread a process: networks this small gain little from more, wait long for one that another program holds up, and
# give the same numbers whatever the number of cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$SECONDS

step() {
    printf '\n\033[1m[%3d s] %s\033[0m\n' "$((SECONDS - started))" "$1"
    shift
    for word in "$@"; do printf '%q ' "$word"; done
    printf '\n'
    "$@"
}

run=(python -m monai.bundle run --config_file)
pretrain=bundles/pretrain/configs
encoder=bundles/pretrain/models/encoder_phantom_tiny.safetensors
cohort=data/phantom/datalist.json

pretrain_heads=(--subjects 240 --seed 1 --spacing 3 --prefix PT)
scored_heads=(--subjects 120 --seed 2 --spacing 3 --prefix PL)
classification=(--folds 2 --overlays tiny --output runs/demo)
if [[ -n "${ANATOMIES:-}" ]]; then
    left_out=$(python benchmarks/demo_anatomies.py "$ANATOMIES")
    pretrain_heads+=(--anatomies "$ANATOMIES" --leave-out "$(sed -n 1p <<<"$left_out")")
    scored_heads+=(--anatomies "$ANATOMIES" --leave-out "$(sed -n 2p <<<"$left_out")")
    classification+=(--set sessions=all) # an anatomy is one patient, and its heads are that patient's sessions
fi
step "Phantoms to pretrain on" volta3d phantom --output data/raw/phantom_pretrain "${pretrain_heads[@]}"
step "Those to be scored on" volta3d phantom --output data/raw/phantom "${scored_heads[@]}"

step "Preparation: RAS, window of 144 x 192 x 192 mm, [0, 1]" \
    volta3d prepare --layout bids --source data/raw/phantom_pretrain --output data/phantom_pretrain \
    --spacing 3 --shape 48,64,64
step "Preparation of those to be scored on" volta3d prepare --layout bids --source data/raw/phantom --output data/phantom \
    --spacing 3 --shape 48,64,64
step "No subject is in both" volta3d check data/phantom_pretrain/datalist.json "$cohort"

# Baselines need no encoder: a second core trains them while it is trained. What is not done when it is, the
# comparisons below go on with.
baselines() {
    volta3d crossval --bundle bundles/ixi_sex --datalist "$cohort" --inits vit_scratch,swin_scratch \
        --fractions 0.4,1.0 "${classification[@]}"
    volta3d crossval --bundle bundles/aibl_ad --datalist "$cohort" --inits vit_scratch,swin_scratch "${classification[@]}"
    volta3d crossval --bundle bundles/harp_hippocampus --datalist "$cohort" --inits unetr_scratch,unet_scratch \
        --folds 1 --overlays tiny --output runs/demo
}
mkdir -p runs/demo
set -m # in a process group of its own, to be ended as one
baselines >runs/demo/baselines.log 2>&1 &
beside=$!
set +m
end_baselines() {
    kill -- "-$beside" 2>/dev/null || true
    wait "$beside" 2>/dev/null || true
}
trap end_baselines EXIT

step "Tiny pretraining (and on another core, scratch baselines: runs/demo/baselines.log)" \
    "${run[@]}" "['$pretrain/train.json','$pretrain/koleo.json','$pretrain/tiny.json']" \
    --tracking mlflow
step "What the frozen encoder knows, beside the same network with random weights" \
    "${run[@]}" "$pretrain/evaluate.json" --run_name phantom_tiny --encoder_path "$encoder" \
    --dataset_dir data/phantom --num_workers 0
end_baselines

# The three tasks with their baselines, two runs at a time: small settings, fewer folds than the paper. The model of
# fold 0 becomes the bundle's own, for segment, pack and make label.
step "Sex: VolTA init and scratch baselines, two folds, two fractions of the training part" \
    volta3d crossval --bundle bundles/ixi_sex --datalist "$cohort" --inits volta,vit_scratch,swin_scratch \
    --fractions 0.4,1.0 "${classification[@]}" --jobs 2 --adopt 0
step "Alzheimer's disease: two folds" \
    volta3d crossval --bundle bundles/aibl_ad --datalist "$cohort" --inits volta,vit_scratch,swin_scratch \
    "${classification[@]}" --jobs 2 --adopt 0
step "Hippocampus: one hold-out" \
    volta3d crossval --bundle bundles/harp_hippocampus --datalist "$cohort" --inits volta,unetr_scratch,unet_scratch \
    --folds 1 --overlays tiny --jobs 2 --output runs/demo --adopt 0
step "Report: tables and figures of the paper, from MLflow alone" \
    volta3d report --output runs/demo/report --tracking_uri "sqlite:///$PWD/runs/demo/mlruns.db" \
    --pretraining bundles/pretrain/runs/phantom_tiny,bundles/pretrain/eval/phantom_tiny

step "Summary" python benchmarks/demo_summary.py
printf '\nOpen this in a browser: %s\n' "$PWD/runs/demo/report/index.html"
printf 'All of it took %d s.\n' "$((SECONDS - started))"
