"""Tests of the chat template: rendered as by transformers, sandboxed, and no text of the user is silently lost."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from granite4v.errors import ModelFileError, PromptError
from granite4v.runtime.prompt.messages import normalize
from granite4v.runtime.prompt.template import ChatTemplate
from tests.toy.language import CHAT_TEMPLATE, END_OF_TEXT, TASK_PROMPTS
from tests.toy.spec import PRESETS

IMAGE = {"type": "image"}


def turn(role: str, *parts: str | dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


CONVERSATIONS = {
    "plain": [turn("user", "Hello")],
    "system": [turn("system", "Be brief."), turn("user", "Hello")],
    "picture": [turn("user", IMAGE, "What is <b>this</b>?")],
    "picture last": [turn("user", "What is this?", IMAGE)],
    "two pictures": [turn("user", IMAGE, IMAGE, "Compare.")],
    "tag": [turn("user", IMAGE, "<tables_json>")],
    "turns": [turn("user", IMAGE, "<chart2csv>"), turn("assistant", "a,b\n1,2"), turn("user", "And now?")],
}


@pytest.fixture(scope="module")
def reference_render(make_checkpoint: Any) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(make_checkpoint(PRESETS["tiny"]))

    def render(messages: list[dict[str, Any]], template: str | None = None, **variables: Any) -> str:
        return processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, **variables)

    return render


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_what_transformers_renders(reference_render: Any, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert ChatTemplate(CHAT_TEMPLATE).render(messages) == reference_render(messages)


FEATURES = """\
  {% set found = namespace(n=0) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% continue %}{% endif %}
    {%- set found.n = found.n + 1 %}
    {% generation %}{{ message.content[0].text }}{% endgeneration %}
    {%- if found.n == 2 %}{% break %}{% endif %}
{% endfor %}
{{ bos_token }}|{{ messages | tojson }}|{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}|{{ extra }}|{{ 'abc'.index('c') }}
"""


def test_has_what_templates_rely_on(reference_render: Any) -> None:
    messages = [turn("user", "<one>"), turn("assistant", "x"), turn("user", "two"), turn("user", "three")]
    template = ChatTemplate(FEATURES, {"bos_token": END_OF_TEXT})
    assert template.render(messages, extra="e") == reference_render(messages, FEATURES, extra="e")


def test_strftime_now_gives_the_date() -> None:
    today = datetime.datetime.now().strftime("%Y-%m-%d")
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([]) == today


@pytest.mark.parametrize(
    "attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for i in range(10**9) %}{% endfor %}"]
)
def test_a_template_is_kept_in_its_sandbox(attack: str) -> None:
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(attack).render([turn("user", "x")])


def test_a_refusal_is_quoted() -> None:
    with pytest.raises(PromptError, match="refuses these messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([])


def test_a_failure_inside_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="fails on these messages: ValueError"):
        ChatTemplate("{{ 'abc'.index('x') }}").render([])


def test_a_broken_template_is_a_model_file_error() -> None:
    with pytest.raises(ModelFileError, match="cannot be compiled"):
        ChatTemplate("{% if %}")


def test_a_tag_alone_is_expanded() -> None:
    text = ChatTemplate(CHAT_TEMPLATE).render([turn("user", IMAGE, " <tables_json>\n")])
    assert TASK_PROMPTS["<tables_json>"] in text and "<tables_json>" not in text


@pytest.mark.parametrize(
    "parts",
    [
        ["<tables_json> but only the first table"],
        ["only the first table: <tables_json>"],
        [IMAGE, "<tables_json>", "only the first table"],
    ],
)
def test_text_that_a_tag_would_throw_away_is_an_error(parts: list[Any]) -> None:
    with pytest.raises(PromptError, match="message 1 has the task tag '<tables_json>' beside other text .*first table"):
        ChatTemplate(CHAT_TEMPLATE).render([turn("user", *parts)])


def test_the_error_names_the_message() -> None:
    messages = [turn("user", "hi"), turn("assistant", "yes"), turn("user", "<chart2csv> please")]
    with pytest.raises(PromptError, match="message 3 has the task tag '<chart2csv>'"):
        ChatTemplate(CHAT_TEMPLATE).render(messages)


def test_markup_that_is_no_tag_is_left_alone() -> None:
    schema = json.dumps({"title": "<invoice>"}, indent=2)
    assert schema in ChatTemplate(CHAT_TEMPLATE).render([turn("user", f"Fill this: {schema}")])


def test_text_that_the_template_leaves_out_is_an_error() -> None:
    template = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(PromptError, match=r"drops text of message 1 \(system\): 'Be brief.'"):
        template.render([turn("system", "Be brief."), turn("user", "hi")])


def test_strings_do_not_gain_the_indentation_of_the_string_branch() -> None:
    messages = normalize([{"role": "user", "content": "Hello"}]).messages
    assert "<|end_of_role|>Hello<" in ChatTemplate(CHAT_TEMPLATE).render(messages)


def test_variables_of_any_name_but_one() -> None:
    names = ("text", "source", "variables", "template", "images", "tokenizer")
    source = " ".join(f"{{{{ {name} }}}}" for name in names)
    text = ChatTemplate(source).render([], **{name: name for name in names})
    assert text.split() == list(names)
    with pytest.raises(PromptError, match="cannot be a variable"):
        ChatTemplate(source).render([turn("user", "x")], messages=[])
