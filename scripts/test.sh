#!/usr/bin/env bash
# Install clipkit with what its checks need, then run them all: format, lint, types, tests
# (among them the layer contract and the README's command blocks).
#
# Uses the active virtual environment, else makes .venv; CLIPKIT_VENV names another place.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/environment.sh
prepare_environment ".[demo,dev,tensorboard]"

step() { printf '\n== %s\n' "$*"; "$@"; }

step ruff format --check .
step ruff check .
step mypy
step pytest -m "not slow and not gpu" "$@"
