#!/usr/bin/env bash
# Train on Flickr8k from random weights, evaluate on the dev photos, index and search them.
# Usage, from any directory: bash scripts/recipes/flickr8k.sh OUT
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:?give an output directory}"
dev=../shared/data/flickr8k-112-dev.parquet

if [[ ! -f "$dev" ]]; then
    echo "error: $dev not found; convert Flickr8k to Parquet (key, image, captions) and put it there" >&2
    exit 1
fi
clipkit train scripts/recipes/flickr8k.toml --out "$out/run"
clipkit eval retrieval "$dev" --model "$out/run"
clipkit embed "$dev" --out "$out/store" --model "$out/run"
clipkit index build "$out/store" --out "$out/index"
clipkit search "$out/index" "a dog runs through the grass" -k 5
clipkit search "$out/index" "a man on a snowy mountain" -k 5
