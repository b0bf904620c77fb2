#!/usr/bin/env bash
# Everything that must hold before a commit: formatting, lint, types, tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

use_environment dev

stage "formatting"
ruff format --check .

stage "lint"
ruff check .

stage "types"
mypy

stage "tests"
python -m pytest "$@"
