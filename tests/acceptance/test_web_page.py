"""The server's own page in headless Chromium, and the screenshot of it in the README."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.acceptance import web_page


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, web_page.BROWSERS)), reason="needs a Chromium on the path")
def test_the_page_does_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    assert web_page.main([]) == 0, capsys.readouterr().out
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["checks"] > 10
