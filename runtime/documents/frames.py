"""What the reader process and its owner say to each other: a header as JSON, then bytes as they are.

Nothing that the reader sends is executed or unpickled: it handles files from anywhere.
"""

from __future__ import annotations

import json
import struct
from typing import Any

PREFIX = struct.Struct(">IQ")  # lengths in bytes of the header and of what follows it


def packed(header: dict[str, Any], n_bytes: int) -> bytes:
    """The beginning of a frame; `n_bytes` of payload come after it. File names may hold any bytes (surrogates)."""
    text = json.dumps(header).encode("ascii")
    return PREFIX.pack(len(text), n_bytes) + text
