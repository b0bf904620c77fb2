"""Reading single values out of config.json, with messages that say what is wrong, and bounds that hold everywhere.

Shared by the family files; knows no model. GGUF metadata have accessors of their own (`GgufMetadata`).
"""

from __future__ import annotations

import numpy as np

from granite4v.errors import CheckpointError


def short(value: float) -> float:
    """The shortest decimal that float32 stores as this value: 1e-06 instead of 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def hidden_state_index(index: int, n_layers: int) -> int:
    """A hidden state of a tower with so many layers, negative indices resolved; raises CheckpointError outside it."""
    resolved = index + n_layers + 1 if index < 0 else index
    if not 0 <= resolved <= n_layers:
        raise CheckpointError(f"config.json takes vision hidden state {index}; the tower has {n_layers + 1} of them.")
    return resolved
