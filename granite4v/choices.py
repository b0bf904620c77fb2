"""The words that arguments choose from, as types: a type checker and the command line find a misspelled one.

The tables these words stand in have more to say of each; tests hold the two together.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Device: TypeAlias = Literal["auto", "cpu", "cuda", "metal"]
Task: TypeAlias = Literal[
    "chart2csv", "chart2code", "chart2summary", "tables_html", "tables_json", "tables_otsl", "kvp"
]  # the tasks of `runtime.outputs`, and a question of one's own
Format: TypeAlias = Literal["csv", "html", "json", "otsl", "md", "docling"]

MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS; more end the process
