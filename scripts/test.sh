#!/usr/bin/env bash
# Install clipkit with its development tools and run all checks: format, lint, types and tests
# (including the layer order and the commands in the README).
#
# Uses the active virtual environment, or else creates .venv (set CLIPKIT_VENV for another path).
# Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/environment.sh
prepare_environment ".[demo,dev,tensorboard]"

step() { printf '\n== %s\n' "$*"; "$@"; }

step ruff format --check .
step ruff check .
step mypy
step pytest -n auto -m "not slow and not gpu" "$@"
