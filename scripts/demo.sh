#!/usr/bin/env bash
# The whole path on a fresh machine: install, draw a table, a chart and a form with values nobody knew before, and
# have the embedded model read them. Arguments go to scripts/nano/show.py (--seed N, --model DIR).
set -euo pipefail
. "$(dirname "$0")/environment.sh"

use_environment

stage "a table, a chart and a form, drawn now and read: build/demo"
python scripts/nano/show.py build/demo "$@"
