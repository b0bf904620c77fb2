#!/usr/bin/env bash
# The whole path on a fresh machine: install, draw a table, a chart and a form with values that nobody knew before, and
# have the embedded model read them. Arguments go to scripts.nano.show, for instance --seed 5.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

use_environment

stage "three documents, drawn now and read: build/demo"
python -m scripts.nano.show build/demo "$@"
