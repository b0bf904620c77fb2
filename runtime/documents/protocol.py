"""Messages between the reader process and its parent: a header as JSON, then a payload of raw bytes.

Nothing that the reader sends is executed or unpickled, since it handles files from anywhere.
"""

from __future__ import annotations

import json
import struct
from typing import Any

PREFIX = struct.Struct(">IQ")  # lengths in bytes of the header and of the payload


def packed(header: dict[str, Any], n_bytes: int) -> bytes:
    """Returns the beginning of a message, to be followed by `n_bytes` of payload.

    The header is ASCII, because file names may contain bytes that are not UTF-8 (surrogates in Python), which only
    JSON escapes can represent.
    """
    text = json.dumps(header).encode("ascii")
    return PREFIX.pack(len(text), n_bytes) + text
