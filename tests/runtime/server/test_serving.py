"""Tests of where a server listens."""

from __future__ import annotations

import pytest

from granite4v.errors import DeviceError
from granite4v.runtime.server.serving import listen


@pytest.mark.parametrize("host", ["x" * 70, "..", "caf\udce9", "a b", "1.2.3.4.5.6"])
def test_names_that_no_host_can_have(host: str) -> None:
    with pytest.raises(DeviceError, match=r"cannot listen at .*, port 0: .*; choose another one with --host"):
        listen(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "localhost"])
def test_spellings_of_this_machine(host: str) -> None:
    with listen(host, 0) as listening:
        assert listening.getsockname()[0] in ("127.0.0.1", "::1")
