"""Shared by the checkpoints of Llama 3.2 Vision and Llama 4: template, rotary scaling, kinds of tensors.

The template is ours; with images it behaves like the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
Drawn = tuple[str, tuple[int, ...], float, str]  # name, shape, standard deviation, kind of draw

SCALED = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>AFTER_ROLE' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|image|>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|end_of_text|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>AFTER_ROLE' }}{%- endif -%}
"""


def template(after_role: str) -> str:
    """Returns a chat template. `after_role`: the text after a role, escaped as in a Jinja string."""
    return _TEMPLATE.replace("AFTER_ROLE", after_role)


def matrix(name: str, n_out: int, n_in: int) -> Drawn:
    return name, (n_out, n_in), 1.2 / math.sqrt(n_in), "normal"


def linear(name: str, n_out: int, n_in: int) -> Iterator[Drawn]:
    """Yields the weight and the bias of a linear layer."""
    yield matrix(f"{name}.weight", n_out, n_in)
    yield f"{name}.bias", (n_out,), 0.3, "normal"


def layer_norm(name: str, width: int) -> Iterator[Drawn]:
    yield f"{name}.weight", (width,), 0.0, "norm"
    yield f"{name}.bias", (width,), 0.3, "normal"


def feed_forward(prefix: str, ffn: int, width: int) -> Iterator[Drawn]:
    """Yields the gate, up and down matrices of a decoder layer."""
    for part in ("gate", "up"):
        yield matrix(f"{prefix}{part}_proj.weight", ffn, width)
    yield matrix(f"{prefix}down_proj.weight", width, ffn)
