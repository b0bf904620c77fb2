"""The product as the cases use it: its command line, run in this process."""

from __future__ import annotations

import sys

# modules that the parent of all cases imports before it forks; none of them may start a thread
IMPORTS = (
    "granite4v.cli.main",
    "granite4v.converter",
    "granite4v.default_model",
    "granite4v.summary",
    "granite4v.runtime",
    "granite4v.runtime.model",
    "granite4v.runtime.documents",
    "granite4v.runtime.formats",
    "granite4v.runtime.extract",
    "granite4v.runtime.extract.report",
    "granite4v.runtime.extract.docling_export",
    "jinja2.sandbox",
    "jsonschema.validators",
    "llama_cpp",
    "llguidance",
    "ml_dtypes",
    "numpy",
    "PIL.Image",
    "pypdfium2",
    "referencing",
    "tokenizers",
)


def command_line(command: list[str]) -> int | None:
    """Runs what the console script `granite4v` runs."""
    from granite4v.cli.entry import entry

    sys.argv = ["granite4v", *command]
    entry()
    return 0
