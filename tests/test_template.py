"""In: real chat templates and hostile ones. Out: proof that the first render as transformers does
and that the second end quickly in TemplateError."""

from __future__ import annotations

import importlib.util
import random
import resource
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlpu.errors import LpuError, RequestError, TemplateError
from openlpu.load.template import MAX_SOURCE_CHARS, ChatTemplate

CLOCK = datetime(2025, 3, 14, 15, 9, 26)
USER = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Weather of a "city" <b>&</b> däy',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "名"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": USER,
    "system": [{"role": "system", "content": "Be  kind.\n"}, *USER],
    "turns": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " q1 <|im_end|>"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na1"},
        {"role": "user", "content": "q2 {{ 7*7 }}\n"},
        {"role": "assistant", "content": "a2 🙂", "reasoning_content": "r"},
        {"role": "user", "content": "q3"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": '{"t": 3}'},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}]}],
    "odd": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "assistant last": [*USER, {"role": "assistant", "content": "Hello"}],
}


def _trl_templates() -> dict[str, str]:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = _trl_templates()


def test_templates_are_found() -> None:
    assert len(TEMPLATES) >= 63


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    """Same text, or a refusal by both, for each conversation, with tools and without."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    source = TEMPLATES[name]
    reference = _cached_compile_jinja_template(source)
    reference.environment.globals["strftime_now"] = CLOCK.strftime
    # Globals are copied into a template when it is made.
    reference.globals["strftime_now"] = CLOCK.strftime
    ours = ChatTemplate(source, bos="<s>", eos="</s>", clock=lambda: CLOCK)
    rendered = 0
    for messages in CONVERSATIONS.values():
        for tools, prompt in ((None, True), ([TOOL], False)):
            given_here: dict[str, Any] = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": prompt,
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
            try:
                expected = reference.render(**given_here)
            except Exception:
                with pytest.raises(TemplateError):
                    ours.render(messages, tools=tools, add_generation_prompt=prompt)
                continue
            assert ours.render(messages, tools=tools, add_generation_prompt=prompt) == expected
            rendered += 1
    assert rendered


SMALL = [
    "{{ [1,2]|map('string')|join('-') }} {{ messages|selectattr('role','equalto','x')|list }}",
    "{% if messages|selectattr('role','equalto','x') %}lazy is true{% endif %}",
    "{% macro m(a, b=2) %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}",
    "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}x{% endcall %}",
    "{% set ns = namespace(n=0) %}{% for i in range(9) if i % 2 %}{% set ns.n = ns.n + i %}"
    "{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{% endfor %}{{ ns.n }}",
    "{% for a, b in {'x': 1, 'y': [1, (2, 3)]}|dictsort %}{{ a ~ b }}{% else %}-{% endfor %}",
    "{% for x in [1,[2,[3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% elif i > 5 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}",
    "{{ 'abcdef'[1:4] }}{{ [1,2,3][::-1] }}{{ 'a,b'.split(',') }}{{ 'x' * 3 }}{{ [0] * 2 }}",
    "{{ '%s is %05.1f %%' % ('a', 2) }}{{ '{:>5}|{k}'.format(3, k=4) }}{{ '%d'|format(7) }}",
    "{{ {'a': [1, 'é', none, true]}|tojson }}",
    "{{ {'b': 1, 'a': 2}|tojson(indent=2, sort_keys=true, separators=(',', ':')) }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x|upper }}{% filter lower %}ABC{% endfilter %}",
    "{{ missing }}{{ missing is defined }}{{ missing|default('d') }}{{ messages[0].nope }}",
    "{{ ' a '|trim }}{{ 'a\nb'|indent(2) }}{{ 'a b'|replace('b', 'x') }}{{ 'hello world'|title }}",
    "{{ [3,1,2]|sort|first }}{{ [3,1]|max }}{{ [1,1,2]|unique|list }}{{ [1,2,3]|batch(2)|list }}",
    "{{ [1,2]|sum }}{{ [{'a': 1},{'a': 2}]|sum(attribute='a') }}{{ [{'a': 1}]|join(',', 'a') }}",
    "{{ messages|groupby('role') }}{{ 'a<b'|e }}{{ ('a'|safe) ~ '<' }}{{ 3.7|round|int }}",
    "{%- generation %} g {% endgeneration -%} \n {# c #}{{ strftime_now('%d %b %Y') }}",
    "{{ dict(a=1).items()|list }}{{ messages == messages }}{{ 'H' in messages[0].content }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}",
    "{% set j = joiner(',') %}{{ j() }}{{ j() }}",
    "  {% if true %}\n  kept\n  {% endif %}\n{% raw %}{{ raw }}{% endraw %}",
    "{{ -2 ** 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 1 if false }}{{ not 1 and 2 or 3 }}",
]


@pytest.mark.parametrize("source", SMALL)
def test_language_as_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    reference = _cached_compile_jinja_template(source)
    reference.globals["strftime_now"] = CLOCK.strftime
    expected = reference.render(
        messages=USER, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(source, bos="<s>", eos="", clock=lambda: CLOCK).render(USER) == expected


GROW = "{% set ns = namespace(x=X) %}{% for i in range(60) %}{% set ns.x = Y %}{% endfor %}"


def _grow(start: str, step: str, after: str = "") -> str:
    return GROW.replace("X", start).replace("Y", step) + after


HOSTILE = {
    "text times": "{{ 'x' * 10**9 }}",
    "times text": "{{ 10**9 * 'x' }}",
    "list times": "{{ [1] * 10**9 }}",
    "power": "{{ 9**(9**9) }}",
    "negative power": "{{ 9**(-(9**9)) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loop filter": "{% for a in range(9999) %}{% for b in range(9999) if 0 %}{% endfor %}"
    "{% endfor %}",
    "print in loops": "{% for a in range(9999) %}" + "y" * 9999 + "{% endfor %}",
    "big body": "{% for a in range(99999) %}" + "{% set z = 1 %}" * 5000 + "{% endfor %}",
    "percent width": "{{ '%999999999d' % 1 }}",
    "percent precision": "{{ '%.999999999f' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent key": "{{ '%(a)999999999d' % {'a': 1} }}",
    "percent arabic": "{{ '%٩٩٩٩٩٩٩٩٩d' % 1 }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "format escaped": "{{ '{{{:{}}'.format(1, 999999999) }}",
    "format map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "format repeated": "{% set b = 'x' * 99999 %}{{ ('{0}' * 9999).format(b) }}",
    "format walk": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format attr": "{{ ''|attr('format')(1) }}{{ ('{:99999999}'|attr('format'))(1) }}",
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class item": "{{ ''['__class__']['__mro__'] }}",
    "attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "map attribute": "{{ [1]|map(attribute='__class__')|first()() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "macro globals": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "function globals": "{{ raise_exception.__globals__['os'] }}",
    "loop walk": "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "namespace class": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace under": "{{ namespace(_x=1) }}",
    "namespace init": "{{ namespace.__init__.__globals__ }}",
    "tick refund": "{{ [-10**9]|map('a tick')|list }}{{ 'x' * 10**9 }}",
    "center": "{{ 'x'|center(10**9) }}",
    "center method": "{{ 'x'.center(10**9) }}",
    "ljust": "{{ 'x'.ljust(width=10**9) }}{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'x\n'|indent(10**9) }}",
    "indent text": "{{ ('\n' * 99999)|indent('x' * 4000) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "round": "{{ 1.5|round(10**9, 'floor') }}",
    "tojson": "{{ [[[1]]]|tojson(indent=10**9) }}",
    "tojson separators": "{{ ([1] * 99999)|tojson(separators=('x' * 99999, ':')) }}",
    "join": "{{ (['y'] * 99999)|join('x' * 99999) }}",
    "join method": "{{ ('x' * 99999).join(['y'] * 99999) }}",
    "join lazy": "{% set b = 'x' * 99999 %}{{ ''.join(range(99999)|map('default', b, true)) }}"
    "{{ ''.join(messages * 9999|map(attribute='none', default=b)) }}",
    "join attribute": "{% set ns = namespace(b='x' * 99999) %}{{ ([ns] * 99999)|join('', 'b') }}",
    "replace": "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
    "replace keywords": "{{ ('x' * 99999)|replace(new='y' * 99999, old='x') }}",
    "replace method": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "pprint": "{{ messages|pprint }}",
    "add": _grow("'x'", "ns.x + ns.x"),
    "add list": _grow("[1]", "ns.x + ns.x"),
    "concat": _grow("'x'", "ns.x ~ ns.x"),
    "block set": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "nested lists": _grow("[]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "nested compare": _grow("[]", "[ns.x, ns.x]", "{{ ns.x == ns.x }}"),
    "nested dicts": _grow("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"),
    "nested dict()": _grow("1", "dict(a=ns.x, b=ns.x)", "{{ ns.x }}"),
    "nested tuples": _grow("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "tuple sums": _grow("(1,)", "((ns.x,) + (ns.x,))", "{{ {ns.x: 1} }}"),
    "deep list": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "equal texts": "{% set a = 'x' * 999999 %}{% set b = 'xx' * 499999 ~ 'x' %}"
    "{{ [a] * 99999 == [b] * 99999 }}",
    "int growth": _grow("99999", "ns.x * ns.x"),
    "macro recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(40) }}",
    "loop recursion": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "sum lists": "{{ ([[1] * 999] * 9999)|sum(start=[])|length }}",
    "sort attribute": "{% set a = namespace(b=[1] * 50000) %}{% set c = namespace(b=[1] * 50000) %}"
    "{{ ([a, c] * 5000)|sort(attribute='b')|length }}",
    "string filter": "{{ ([('x' * 99999)] * 9999)|string|length }}",
    "lower test": "{{ ([('x' * 99999)] * 9999) is lower }}",
    "quoted key": "{% set t = ('x' * 99999,) * 99999 %}{{ {}[t].x }}",
    "quoted filter": "{% set t = ('x' * 99999,) * 99999 %}{{ messages|map(t)|list }}",
    "quoted index": "{% set t = ['x' * 99999] * 99999 %}{{ [].index(t) }}",
    "quoted reason": "{% set t = ['x' * 99999] * 99999 %}{{ raise_exception(t) }}",
    "quoted attribute": "{% set t = ('x' * 99999,) * 99999 %}{{ namespace({t: 1}) }}",
    "hashed": "{% set t = (1,) * 99999 %}{{ dict([[t, 1]] * 99999)|length }}",
    "hashed literals": "{% set t = (1,) * 99999 %}{% for i in range(99999) %}"
    "{% if {t: 1} %}{% endif %}{% endfor %}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "autoescape": "{% autoescape 'x'|center(10**9) %}{% endautoescape %}",
    "append": "{{ messages.append(1) }}",
    "call none": "{{ none() }}",
    "to_bytes": "{{ (1).to_bytes(10**9) }}",
    "fromkeys": "{{ dict.fromkeys(range(99999)) }}",
    "many prints": "{{ a }}" * (MAX_SOURCE_CHARS // 7) + "{% endif %}",
    "many sets": "{% set a = [1,2,3] %}" * (MAX_SOURCE_CHARS // 23) + "{{ 1 // 0 }}",
    "many spaces": "{%" + " " * (MAX_SOURCE_CHARS - 10) + "x",
    "many braces": "{%- " * (MAX_SOURCE_CHARS // 4),
    "many comments": "{#" * (MAX_SOURCE_CHARS // 2),
    "syntax": "{% for %}",
    "unclosed": "{% if x %}",
    "many parens": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many nots": "{{ " + "not " * 20000 + "1 }}",
    "many ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "many dots": "{{ a" + ".b" * 20000 + " }}",
    "many terms": "{{ 1" + "+1" * 20000 + " }}",
    "digits": "{{ " + "1" * 5000 + " }}",
    "raises": "{{ raise_exception('roles\nmust alternate') }}",
    "raises escapes": "{{ raise_exception('\x1b[2J\x9b1m\u202e') }}",
    "fails with escapes": "{{ '\x1b[2J'|int + '\x1b[2J' }}{{ {}['\x1b[2J'].x }}",
    "escapes in a tag": "{% \x1b[2J %}",
    "zero": "{{ 1 // 0 }}",
    "too long": "x" * (MAX_SOURCE_CHARS + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_in_template_error(name: str) -> None:
    """Quickly, in one line, and without much memory."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(HOSTILE[name], bos="", eos="").render(USER)
    assert time.thread_time() - start < 3
    assert str(caught.value).isprintable()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 250 << 10


def test_messages_are_checked() -> None:
    template = ChatTemplate("{{ messages }}", bos="", eos="")
    nested: Any = "x"
    for _ in range(99):
        nested = [nested]
    bad: list[Any] = [
        "text",
        {"role": "user"},
        ["text"],
        [{}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": b"x"}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "user", "content": "x", "extra": object()}],
        [{"role": "user", "content": "x", "extra": nested}],
    ]
    for messages in bad:
        with pytest.raises(RequestError):
            template.render(messages)
    with pytest.raises(RequestError):
        template.render(USER, tools=[{"f": print}])


def test_long_conversation_fits_the_grant() -> None:
    """The grant grows with the input: 400 turns of 2 kB through the longest real template."""
    source = max(TEMPLATES.values(), key=len)
    turn = [{"role": "user", "content": "ü" * 2000}, {"role": "assistant", "content": "b" * 2000}]
    text = ChatTemplate(source, bos="", eos="").render([*(turn * 200), *USER])
    assert text.count("ü") == 400_000


def test_threads_share_a_template() -> None:
    template = ChatTemplate(
        "{% for i in range(200) %}{{ messages[0].content }}{% endfor %}", bos="", eos=""
    )
    results: list[bool] = []

    def work(word: str) -> None:
        messages = [{"role": "user", "content": word}]
        results.append(all(template.render(messages) == word * 200 for _ in range(20)))

    threads = [threading.Thread(target=work, args=(word,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@given(st.integers(0, 2**32), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_damaged_templates(seed: int, cuts: int) -> None:
    """Real templates, spliced and damaged: they render or they end in LpuError."""
    rng = random.Random(seed)
    sources = list(TEMPLATES.values())
    text = rng.choice(sources)[:3000]
    for _ in range(cuts):
        other = rng.choice(sources)
        at, take = rng.randrange(len(text) + 1), rng.randrange(len(other))
        drop = rng.randrange(40)
        text = text[:at] + other[take : take + rng.randrange(60)] + text[at + drop :]
    start = time.thread_time()
    try:
        ChatTemplate(text, bos="<s>", eos="</s>").render(CONVERSATIONS["tools"], tools=[TOOL])
    except LpuError as error:
        assert "\n" not in str(error)
    assert time.thread_time() - start < 2.5
