#!/usr/bin/env bash
# From a clean clone to a page to look at: install clipkit with the demo's packages, pretrain on
# emoji drawings, then classify, index and search. Needs Python 3.11 or newer and a package registry.
#
# Uses the active virtual environment, else makes .venv; CLIPKIT_VENV names another place.
# Arguments go to `clipkit demo`, for example: --out DIR --minutes 2
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
started_in="$PWD"
cd "$project"

source scripts/environment.sh
prepare_environment ".[demo]"

# Back, so that --out is taken from where the script was called.
cd "$started_in"
clipkit demo "$@"
echo "open the page named above in a browser; it needs neither a server nor a network"
