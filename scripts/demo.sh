#!/usr/bin/env bash
# The whole path on a fresh machine: install, make a small checkpoint with random weights, convert it, and ask it
# about a document. The words it answers with mean nothing (nobody trained it); the way they are made is the real one.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

use_environment

work=build/demo
rm -rf "$work"

stage "a checkpoint with random weights: $work/checkpoint"
python scripts/make_checkpoint.py "$work/checkpoint" --preset tiny-real-tiles --dtype bfloat16

stage "convert it: $work/model"
granite4v convert "$work/checkpoint" "$work/model" --text-type Q8_0 --vision-type F16

stage "what is in the files"
granite4v inspect "$work/model"

stage "ask it about tests/data/invoice.png"
granite4v ask tests/data/invoice.png "What is the total amount?" --model "$work/model" --max-tokens 48
