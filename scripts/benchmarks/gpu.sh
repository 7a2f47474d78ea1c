#!/usr/bin/env bash
# Run the tests and benchmarks that need a GPU, in under 12 minutes on one with 80 GB of memory.
#
#   bash scripts/benchmarks/gpu.sh [PAIRS]
#
# PAIRS is a Parquet file of photos and captions. Uses the active environment, which needs the `dev`
# and `bench` extras. If a part fails or exceeds its time limit, the rest still runs.
set -uo pipefail
cd "$(dirname "$0")/../.."
pairs=${1:-../shared/data/flickr8k-224-train.parquet}
failed=0

part() {
    local seconds=$1
    shift
    printf '\n== %s\n' "$*"
    timeout "$seconds" "$@" || failed=1
}

train() {
    part 250 python -m scripts.benchmarks.training.speed "$pairs" --device cuda --batch-size 4096 \
        --steps 7 --epochs 2 --rounds 1 --workers "$(nproc)" \
        --only clipkit "open_clip amp_bf16" "$@"
}

part 90 python -m pytest -q -m gpu
part 50 python -m scripts.benchmarks.training.loss --device cuda --pairs 8192
part 50 python -m scripts.benchmarks.training.loss --device cuda --pairs 32768 --rounds 3
train --model ViT-B-32 --chunk-size 2048 --their-chunk-size 1024
train --model ViT-B-16 --chunk-size 512 --their-chunk-size 256
exit "$failed"
