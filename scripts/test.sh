#!/usr/bin/env bash
# What must hold before a commit: formatting, lint, types and the fast tests (a few minutes).
# Use: scripts/test.sh [--all] [PYTEST_ARGUMENT...]    --all runs the tests marked slow as well, as CI does
set -euo pipefail
. "$(dirname "$0")/environment.sh"

marked=(-m "not slow") which="fast tests"
if [ "${1:-}" = --all ]; then
    shift
    marked=() which="all tests"
fi

use_environment dev

stage "formatting"
ruff format --check .

stage "lint"
ruff check .

stage "types"
mypy

stage "$which"
python -m pytest ${marked[@]+"${marked[@]}"} "$@"
