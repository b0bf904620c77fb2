"""schemathesis sends the server what its OpenAPI document allows, and much that it does not.

    python -m tests.acceptance.openapi --examples 60

No reply may have a status of 500 or more, and every reply must match the document: status, headers, content type, and
schema. What the document forbids must be refused. A request that fits the schema may still be refused: a schema cannot
express that a URL contains an image, or that a schema has an instance.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.acceptance.harness import Json, Result
from tests.helpers.serving import Server


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; by default the embedded one")
    parser.add_argument("--examples", type=int, default=60, help="of each operation (60)")
    parser.add_argument("--seed", type=int, default=0)
    return check(parser.parse_args(arguments)).print()


def check(options: argparse.Namespace) -> Result:
    chosen = [] if options.model is None else ["--model", str(options.model)]
    # short contexts keep answers short, because generated requests do not limit them
    with Server(*chosen, "--ctx-size", "256", "--api-key", "key") as server:
        command = [
            str(Path(sysconfig.get_path("scripts")) / "schemathesis"),
            "run",
            f"http://127.0.0.1:{server.port}/openapi.json",
            "--header=Authorization: Bearer key",
            "--exclude-checks=positive_data_acceptance",
            f"--max-examples={options.examples}",
            f"--seed={options.seed}",
            "--request-timeout=60",  # a loaded machine may need more than the default of 10 seconds
            "--continue-on-failure",
            "--no-color",
        ]
        with tempfile.TemporaryDirectory() as folder:  # it leaves files in its working directory
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        log = server.log
    print(done.stdout, file=sys.stderr)
    counts = re.search(r"^Test cases:\n +(.+)$", done.stdout, re.MULTILINE)
    figures: Json = {"status": done.returncode, "cases": counts[1] if counts else None}
    problems = [] if done.returncode == 0 else [f"schemathesis ends with status {done.returncode}; see above"]
    problems += ["the server's log has a traceback"] if "Traceback" in log else []
    return Result("openapi", figures, [], problems)


if __name__ == "__main__":
    sys.exit(main())
