"""Messages between the reader process and its owner: a header as JSON, then a payload of raw bytes.

Nothing that the reader sends is executed or unpickled, since it handles files from anywhere.
"""

from __future__ import annotations

import json
import struct
from typing import Any

PREFIX = struct.Struct(">IQ")  # lengths in bytes of the header and of the payload


def packed(header: dict[str, Any], n_bytes: int) -> bytes:
    """The beginning of a message, which `n_bytes` of payload follow.

    ASCII, because file names may hold bytes that are not UTF-8 (surrogates in Python), which only escapes can carry.
    """
    text = json.dumps(header).encode("ascii")
    return PREFIX.pack(len(text), n_bytes) + text
