#!/usr/bin/env bash
# The complete path on a fresh machine: installs the package, draws a table, a chart and a form with new random values,
# and has the embedded model read them. Arguments are passed to scripts.nano.show, for instance --seed 5.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

use_environment

stage "three documents, drawn now and read: build/demo"
python -m scripts.nano.show build/demo "$@"
