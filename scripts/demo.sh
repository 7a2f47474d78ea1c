#!/usr/bin/env bash
# Install clipkit with the packages of the demo, pretrain on emoji drawings, then classify, index and
# search them, and write an HTML page. Needs Python 3.11 or newer and a package index.
#
# Uses the active virtual environment, or else creates .venv (set CLIPKIT_VENV for another path).
# Arguments are passed to `clipkit demo`, for example: --out DIR --minutes 2
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
started_in="$PWD"
cd "$project"

source scripts/environment.sh
prepare_environment ".[demo]"

# Resolve --out relative to the caller's directory.
cd "$started_in"
clipkit demo "$@"
echo "open the page above in a browser; it needs neither a server nor a network connection"
