"""Sends requests with OpenAI's client. Run by `clients` in an interpreter that has openai and pydantic.

    python openai_client.py URL DIRECTORY

The directory has table.png, form.png and template.json. Prints one JSON object.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import openai
import pydantic


def main(url: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", max_retries=0)  # the key is in the environment
    name = client.models.list().data[0].id
    table, form = (data_url(folder / f"{kind}.png") for kind in ("table", "form"))
    schema = json.loads((folder / "template.json").read_text(encoding="utf-8"))
    fields: dict[str, Any] = dict.fromkeys(schema["properties"], (str | None, ...))
    model = pydantic.create_model("Form", **fields)
    page: Any = {"type": "image_url", "image_url": {"url": table}}
    messages: Any = [{"role": "user", "content": [page, {"type": "text", "text": "<tables_html>"}]}]
    whole = client.chat.completions.create(model=name, messages=messages)
    pieces = client.chat.completions.create(model=name, messages=messages, stream=True)
    filled: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": form}}]}]
    parsed = client.chat.completions.parse(model=name, messages=filled, response_format=model)
    item: Any = {"role": "user", "content": [{"type": "input_image", "image_url": form, "detail": "auto"}]}
    response = client.responses.parse(model=name, input=[item], text_format=model)
    found = {
        "chat": whole.choices[0].message.content,
        "stream": "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices),
        "parsed": dumped(parsed.choices[0].message.parsed),
        "response": dumped(response.output_parsed),
    }
    print(json.dumps(found))


def dumped(value: pydantic.BaseModel | None) -> Any:
    return value and value.model_dump()


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
