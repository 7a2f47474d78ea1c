#!/usr/bin/env bash
# Train three times on aerial photos whose captions recur: equal captions masked, taken as targets,
# counted as negatives. Prints held-out recall, as it is and with equal captions counted as right.
# Usage, from anywhere: bash scripts/recipes/ucm_duplicates.sh OUT [SEED]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:?name a directory for what is made}" seed="${2:-0}"
held_out=../shared/data/ucm-val.parquet

if [[ ! -f "$held_out" ]]; then
    echo "error: $held_out is not there; put UCM captions as Parquet (key, image, captions) beside the project" >&2
    exit 1
fi
for duplicates in mask positive ignore; do
    clipkit train scripts/recipes/ucm_duplicates.toml --out "$out/$duplicates-$seed" \
        --set "train.duplicates=$duplicates" --set "train.seed=$seed"
    python scripts/recipes/recall_of_equal_captions.py "$held_out" "$out/$duplicates-$seed"
done
