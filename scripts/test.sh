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

# Two processes, each with a file at a time, in the order of the folders: what fixtures of a file or a folder make is made
# once. Threads that wait sleep, since the core may be the other process's.
stage "$which"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-passive}"
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder ${marked[@]+"${marked[@]}"} "$@"
