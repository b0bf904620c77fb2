#!/usr/bin/env bash
# Ray: a dead worker is reported on the driver's standard output, with log_to_driver=False as well
#
# Expected: log_to_driver=False keeps what workers and nodes say out of the driver's output, and what
#   Ray itself has to report goes to its logger, or to standard error. The driver's standard output
#   holds what the driver prints.
# Observed (Ray 2.60.0): when a worker process dies, a thread of the driver prints the raylet's message,
#   coloured, to standard output. configure_logging=False changes nothing either.
# Output:
#   ray 2.60.0
#   result of the task: 1
#   on standard output besides: "(raylet) A worker died or was killed while executing a task ..."
# Why it matters: a program that prints JSON lines or a table for the next program in a pipe gets lines
#   of prose between them, at random places, on the day a worker runs out of memory.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'ray==2.60.0'
cat > "$work/driver.py" <<'PYTHON'
import os
import sys
import time

import ray

flag = sys.argv[1]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)


@ray.remote(max_retries=1)
def once_killed():
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), 9)
    return 1


print("result of the task:", ray.get(once_killed.remote()), flush=True)
time.sleep(10)  # the message comes from another thread
ray.shutdown()
PYTHON
RAY_USAGE_STATS_ENABLED=0 "$work/venv/bin/python" "$work/driver.py" "$work/flag" > "$work/out" 2> "$work/err"
echo "ray $("$work/venv/bin/python" -c 'import ray; print(ray.__version__)')"
grep -x "result of the task: 1" "$work/out"
grep -q "raylet.*A worker died or was killed while executing a task" "$work/out"
echo 'on standard output besides: "(raylet) A worker died or was killed while executing a task ..."'
