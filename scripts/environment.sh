# Sourced by the other scripts: a virtual environment in .venv with this package in it.
# Use: . scripts/environment.sh [EXTRA]

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

stage() { printf '\n== %s\n' "$*"; }

use_environment() {  # [EXTRA]
    stage "environment: .venv${1:+ with the extra '$1'} (llama-cpp-python is compiled the first time: about ten minutes)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable ".${1:+[$1]}"
    PATH="$root/.venv/bin:$PATH"
    python --version
}
