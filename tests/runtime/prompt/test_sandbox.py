"""Tests of untrusted templates: what would take all time or memory is stopped, what chat templates do is not."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from granite4v.errors import ModelFileError, PromptError
from granite4v.runtime.prompt import sandbox
from granite4v.runtime.prompt.template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = OP %}{% endfor %}{{ ns.s|length }}"
BIG = "{% set s = 'abcdefgh' * 100000 %}"

TOO_MUCH = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "product, reversed": "{{ 10**10 * 'a' }}",
    "list product": "{{ ([0] * 10**9)|length }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "integers": "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "sums": DOUBLING.replace("OP", "ns.s + ns.s"),
    "joins": DOUBLING.replace("OP", "ns.s ~ ns.s"),
    "lists": DOUBLING.replace("'ab'", "[1]").replace("OP", "ns.s + ns.s"),
    "nested lists": DOUBLING.replace("OP", "[ns.s, ns.s]").replace("|length", ""),
    "nested lists, joined": DOUBLING.replace("OP", "[ns.s, ns.s]").replace("|length", " ~ 'x'"),
    "output": BIG + "{% for i in range(9999) %}{{ s }}{% endfor %}",
    "a macro's output": BIG
    + "{% macro m() %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endmacro %}{{ m()|length }}",
    "a block's output": BIG + "{% set b %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endset %}{{ b|length }}",
    "replace": BIG + "{{ s.replace('a', s)|length }}",
    "replace nothing": BIG + "{{ s.replace('', s)|length }}",
    "replace filter": BIG + "{{ s|replace('a', s)|length }}",
    "join": BIG + "{{ s.join(range(9999)|map('string')|list)|length }}",
    "join filter": BIG + "{{ range(9999)|map('string')|join(s)|length }}",
    "join of an iterator": "{{ range(99999)|map('center', 99999)|join|length }}",
    "a list of an iterator": "{{ range(99999)|map('center', 99999)|list|length }}",
    "joined again": BIG + "{{ ([s] * 9999)|join|length }}",
    "printed list": BIG + "{{ [s] * 9999 }}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10**7)|length }}",
    "indent": BIG + "{{ s.replace('a', '\\n')|indent(10**6)|length }}",
    "tojson": "{{ (range(999)|list)|tojson(indent=10**6)|length }}",
    "tojson of much": BIG + "{{ ([s] * 9999)|tojson|length }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "percent of much": BIG + "{{ ('%s' * 9999) % ((s,) * 9999) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format nested": "{{ '{:>{}}'.format(1, 10**10) }}",
    "format of much": BIG + "{{ ('{0}' * 9999).format(s)|length }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "translate": BIG + "{{ s.translate({97: s})|length }}",
    "words": "{{ lipsum(n=10**6)|length }}",
    "slices": "{{ [1]|slice(10**9)|list|length }}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "itself often": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_takes_all_time_or_memory_is_stopped(name: str) -> None:
    with pytest.raises(PromptError, match="the model's chat template (was stopped|fails on these messages|refuses)"):
        ChatTemplate(TOO_MUCH[name]).render(MESSAGES)
    assert sys.gettrace() is None or "sandbox" not in repr(sys.gettrace())


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 'x' }}", "TypeError"),
        ("{{ 'a'.index('b') }}", "ValueError"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ 'x'.encode('no-such') }}", "LookupError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('no system') }}", "no system"),
    ],
)
def test_every_error_of_a_template_is_ours(source: str, error: str) -> None:
    with pytest.raises(PromptError, match=error):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{" * 10_000,
        "{% for i in x %}" * 200 + "{% endfor %}" * 200,
        "{{ " + "(" * 5_000 + ")" * 5_000 + " }}",
        "{{ " + "1 + " * 20_000 + "1 }}",
        "a" * (sandbox.MAX_SOURCE + 1),
        "{% if %}",
        "{{ x | no_such_filter }}",
    ],
)
def test_a_template_that_cannot_be_compiled_is_a_model_file_error(source: str) -> None:
    with pytest.raises(ModelFileError, match="chat template cannot be compiled"):
        ChatTemplate(source)


def test_constants_are_not_computed_while_compiling() -> None:
    ChatTemplate("{% if false %}{{ 'a' * 10**12 }}{{ 'a'|center(10**12) }}{% endif %}")


ORDINARY = {
    "{{ messages|length ~ '-' ~ 1.5 ~ none ~ undefined_name }}": "1-1.5None",
    "{{ 'a,b'.split(',')|join('+') }}": "a+b",
    "{{ ['b', 'a']|sort|join }}{{ [3, 1]|max }}": "ab3",
    "{{ {'a': [1, {'b': 'é'}]}|tojson }}": '{"a": [1, {"b": "é"}]}',
    "{{ {'a': 1}|tojson(indent=2) }}": '{\n  "a": 1\n}',
    "{{ 'Hi %s, %d' % ('you', 2) }}{{ '{} {:>3}'.format('a', 1) }}{{ '%05.1f'|format(2.25) }}": "Hi you, 2a   1002.2",
    "{{ 2 ** 10 }}{{ 7 % 3 }}{{ 'ab' * 2 }}{{ [1] + [2] }}": "10241abab[1, 2]",
    "{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}": "x=1",
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}": "10",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}{{ m('b')|upper }}": "<a><B>",
    "{% set b %}x{{ 1 }}{% endset %}{{ b|replace('x', 'yy') }}": "yy1",
    "{{ messages|map(attribute='role')|list }}": "['user']",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "1",
    "{{ 'a\nb'|indent(2) }}{{ 'x'.ljust(3) }}{{ 'abc'[::-1] }}{{ ' a '|trim }}": "a\n  bx  cbaa",
}


@pytest.mark.parametrize("source", ORDINARY)
def test_what_chat_templates_do_gives_what_jinja_gives(source: str) -> None:
    import jinja2.sandbox

    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    no_text: list[dict[str, Any]] = [{"role": "user", "content": []}]  # a template that drops text is refused
    text = ChatTemplate(source).render(no_text)
    assert text == ORDINARY[source]
    if "tojson" not in source:  # ours writes as json.dumps does
        assert text == plain.from_string(source).render(messages=no_text)


def test_a_long_conversation_is_within_the_bounds() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
    messages = [{"role": "user", "content": [{"type": "text", "text": "word " * 400}]}] * 1000
    assert ChatTemplate(source).render(messages).count("word ") == 400_000
