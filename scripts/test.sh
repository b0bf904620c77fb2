#!/usr/bin/env bash
# Checks to pass before a commit: formatting, lint, types and the fast tests (a few minutes).
# Use: scripts/test.sh [--all] [PYTEST_ARGUMENT...]    --all also runs the tests marked slow, as CI does
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

# Two processes, each running one file at a time, in folder order, so that fixtures of a file or a folder run once.
# Waiting threads sleep, since the other process may need the core.
stage "$which"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-passive}"
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder ${marked[@]+"${marked[@]}"} "$@"
