"""In: schemas and grammars, sound and hostile. Out: proof that answers under their masks are valid,
that masks are quick and repeatable, and that what explodes is refused in bounded time."""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constrained import CHECKED, SCHEMAS, accepts, json_format, nested, spoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_chat import write_tiny_chat

from openlpu.engine.model import load
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Request
from openlpu.load.checkpoint import open_checkpoint
from openlpu.load.source import TokenizerSource
from openlpu.load.tokenizer import Tokenizer
from openlpu.serve import structured
from openlpu.serve.structured import Grammars, StructureError
from openlpu.serve.tools import read_tools

PADDED = 300  # the vocabulary of a model whose tables are padded


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny")
    return Tokenizer.from_source(open_checkpoint(str(folder)).tokenizer)


@pytest.fixture(scope="module")
def tiny(bytes_tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(bytes_tokenizer, vocab_size=PADDED)
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_source(open_checkpoint(str(smollm2_path)).tokenizer)


@pytest.fixture(scope="module")
def smollm2(smollm2_tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(smollm2_tokenizer)
    yield grammars
    grammars.close()


# -- schemas ------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32 - 1))
@example(schema={"type": "object"}, seed=1)
def test_random_text_under_a_schemas_masks_is_valid(
    tiny: Grammars, bytes_tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    check_schema(tiny, bytes_tokenizer, schema, seed)


@settings(max_examples=100)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32 - 1))
def test_so_it_is_with_the_tokens_of_a_real_model(
    smollm2: Grammars, smollm2_tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    check_schema(smollm2, smollm2_tokenizer, schema, seed)


def check_schema(grammars: Grammars, tokenizer: Tokenizer, schema: Any, seed: int) -> None:
    rule = grammars.constraint_for(json_format(schema))
    assert rule is not None
    text, whole = spoken(rule, tokenizer, np.random.default_rng(seed))
    if whole:
        CHECKED(schema).validate(json.loads(text))


def test_most_random_texts_come_to_their_end(
    smollm2: Grammars, smollm2_tokenizer: Tokenizer
) -> None:
    """Or the two tests above would show little."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    ended = 0
    for seed in range(40):
        rule = smollm2.constraint_for(json_format(schema))
        assert rule is not None
        text, whole = spoken(rule, smollm2_tokenizer, np.random.default_rng(seed))
        ended += whole
        if whole:
            CHECKED(schema).validate(json.loads(text))
    assert ended >= 30


def test_valid_texts_can_be_said(tiny: Grammars, bytes_tokenizer: Tokenizer) -> None:
    """Compact, and indented as Python and JavaScript do it; prose in a schema changes nothing."""
    schema = {
        "title": "T",
        "description": "x" * 10_000,
        "type": "object",
        "properties": {
            "description": {"type": "string", "description": "the text", "examples": [{}]},
            "title": {"$ref": "#/$defs/n"},
        },
        "required": ["description"],
        "$defs": {"n": {"type": "integer", "default": 3}},
    }
    value = {"description": 'a "quoted" \\ ü 🙂\n', "title": -12, "more": [{"x": None}, 1.5e3]}
    # Letters are themselves: escapes such as \u00fc, which may come in halves, are not allowed.
    for text in (
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        json.dumps(value, indent=2, ensure_ascii=False),
        json.dumps(value, indent=4, ensure_ascii=False),
    ):
        rule = tiny.constraint_for(json_format(schema))
        assert rule is not None
        assert accepts(rule, bytes_tokenizer, text), text
    for text in ('{"title": 1}', '{"description": 1}', "[]", json.dumps(value) + "\n", '{"de'):
        rule = tiny.constraint_for(json_format(schema))
        assert rule is not None
        assert not accepts(rule, bytes_tokenizer, text), text


def test_forms_of_a_constraint(tiny: Grammars, bytes_tokenizer: Tokenizer) -> None:
    assert tiny.constraint_for(None) is None
    assert tiny.constraint_for({"type": "text"}) is None
    said = functools.partial(accepts, tokenizer=bytes_tokenizer)
    for text, sound in (('{"a": [1, {}]}', True), ("{}", True), ("[1]", False), ("", False)):
        rule = tiny.constraint_for({"type": "json_object"})
        assert rule is not None
        assert said(rule, text=text) is sound
    for text, sound in (("ab/12", True), ("ab/", False), ("1ab/1", False)):
        rule = tiny.constraint_for(None, regex=r"[a-z]+/\d+")
        assert rule is not None
        assert said(rule, text=text) is sound
    for text, sound in (("((x))", True), ("((x)", False)):
        rule = tiny.constraint_for(None, grammar='start: "x" | "(" start ")"')
        assert rule is not None
        assert said(rule, text=text) is sound


# -- masks --------------------------------------------------------------------------------------


def test_control_tokens_and_padding_are_never_allowed(
    tiny: Grammars, bytes_tokenizer: Tokenizer
) -> None:
    """Not in a string, nor where a grammar asks for them by name or number, nor a byte 0xff."""
    rule = tiny.constraint_for(None, regex="(.|\n)*")
    assert rule is not None
    mask = rule.allowed()
    assert mask.shape == (PADDED,)
    assert set(np.flatnonzero(mask)) == {*range(128), *range(0xC2, 0xF5), 257}
    assert bytes_tokenizer.eos_ids == (257,)
    for grammar in ("start: <|start|> /a/", "start: <[256]> /a/", "start: <[280]>"):
        with pytest.raises(StructureError):
            tiny.constraint_for(None, grammar=grammar)
    anything_but = tiny.constraint_for(None, grammar="start: <[^65]>")
    assert anything_but is not None
    assert not anything_but.allowed()[256:].any()


def test_the_end_is_allowed_exactly_where_the_grammar_may_end(tiny: Grammars) -> None:
    rule = tiny.constraint_for(None, regex="a(bc)*")
    assert rule is not None
    ends = []
    for letter in b"abcbc":
        ends.append(bool(rule.allowed()[257]))
        rule.advance(letter)
    ends.append(bool(rule.allowed()[257]))
    assert ends == [False, True, False, True, False, True]
    assert not rule.done
    rule.advance(257)
    assert rule.done
    bounded = tiny.constraint_for(None, regex="ab")
    assert bounded is not None
    bounded.advance(ord("a"))
    assert not bounded.done
    bounded.advance(ord("b"))
    assert bounded.done
    assert bounded.failure is None


def test_equal_tokens_meet_equal_masks(smollm2: Grammars, smollm2_tokenizer: Tokenizer) -> None:
    """Whatever was compiled or said meanwhile, by this grammar's other constraints too."""
    text = '{"name": "Zoë 🙂", "tags": ["a b", "c"], "n": -1.5e3}'
    ids = smollm2_tokenizer.encode(text)

    def masks(grammars: Grammars) -> list[bytes]:
        rule = grammars.constraint_for({"type": "json_object"})
        assert rule is not None
        found = []
        for token in ids:
            found.append(rule.allowed().tobytes())
            rule.advance(token)
        return found

    first = masks(smollm2)
    for seed in range(3):
        rule = smollm2.constraint_for({"type": "json_object"})
        assert rule is not None
        spoken(rule, smollm2_tokenizer, np.random.default_rng(seed), most=100)
    assert masks(smollm2) == first
    fresh = Grammars(smollm2_tokenizer)
    assert masks(fresh) == first
    fresh.close()


def test_masks_are_quick(smollm2: Grammars, smollm2_tokenizer: Tokenizer) -> None:
    """Of processor time, on the vocabulary of the default model, per token."""
    text = json.dumps({f"key {i}": ["some words of text", i, None, {"x": 1.5}] for i in range(20)})
    function = {"name": "f", "parameters": {"type": "object"}}
    tools = read_tools([{"type": "function", "function": function}])
    assert tools is not None
    for rule in (
        smollm2.constraint_for({"type": "json_object"}),
        smollm2.constraint_for(None, regex="(.|\n)*"),
        tools.constraint(smollm2),
    ):
        assert rule is not None
        ids = smollm2_tokenizer.encode(text)
        began_s = time.thread_time()
        for token in ids:
            assert rule.allowed()[token]
            rule.advance(token)
        assert (time.thread_time() - began_s) / len(ids) < 1e-3


def test_sentencepiece_drops_the_first_space(tmp_path: Path) -> None:
    """Decoding takes one space away, so what may come first is meant without it."""
    tokenizer = sentencepiece(["a", "b", "ab", "▁", "▁a", "▁▁", "▁▁a"])
    assert tokenizer.space_prefix
    grammars = Grammars(tokenizer)

    def begins(regex: str) -> set[str]:
        rule = grammars.constraint_for(None, regex=regex)
        assert rule is not None
        return {tokenizer.token_text(int(i)) for i in np.flatnonzero(rule.allowed())}

    assert begins("ab?") == {"a", "ab", " a"}
    assert begins(" a") == {"  a"}
    assert begins(" [ab]") == {"  ", "  a"}
    for first in (" a", "a"):
        rule = grammars.constraint_for(None, regex="ab")
        assert rule is not None
        rule.advance(named(tokenizer, first))
        assert np.flatnonzero(rule.allowed()).tolist() == [named(tokenizer, "b")]
        rule.advance(named(tokenizer, "b"))
        assert rule.done
        assert rule.failure is None
    grammars.close()


def sentencepiece(pieces: list[str]) -> Tokenizer:
    known = ["<unk>", "<s>", "</s>", *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": known,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(known))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * len(pieces)],
    }
    return Tokenizer.from_source(TokenizerSource("gguf", None, metadata, 1, (2,), True))


def named(tokenizer: Tokenizer, text: str) -> int:
    ids = range(tokenizer.vocab_size)
    return next(i for i in ids if tokenizer.token_bytes(i) == text.encode())


def test_an_engine_keeps_to_the_constraint(tmp_path: Path) -> None:
    """Greedy and sampled, with proposals and without: valid each time, and the same each time."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    with load(str(write_tiny_chat(tmp_path / "tiny")), precision="w8") as model:
        grammars = Grammars(model.tokenizer, vocab_size=model.compiled.config.vocab_size)
        said = {}
        for temperature in (0.0, 1.5):
            for speculate in (True, False):
                answer = model.engine.submit(
                    model.tokenize("abab"),
                    Sampling(temperature=temperature, seed=5, max_tokens=100),
                    Request(
                        end_ids=frozenset(model.tokenizer.eos_ids),
                        constraint=grammars.constraint_for(json_format(schema)),
                        speculate=speculate,
                    ),
                )
                while not answer.done:
                    model.engine.step()
                assert answer.finish_reason == "stop"
                CHECKED(schema).validate(json.loads(model.detokenize(answer.generated)))
                before = said.setdefault(temperature, answer.generated)
                assert before == answer.generated
        grammars.close()


# -- what explodes ------------------------------------------------------------------------------


def bomb(depth: int, make: Any) -> dict[str, Any]:
    """10 ** depth strings, if references were written out."""
    defs = {f"a{i}": make({"$ref": f"#/$defs/a{i + 1}"}) for i in range(depth)}
    return {"$defs": {**defs, f"a{depth}": {"type": "string"}}, "$ref": "#/$defs/a0"}


REFUSED_SCHEMAS: dict[str, Any] = {
    "deep items": nested(5000, lambda s: {"items": s}),
    "deep anyOf": nested(5000, lambda s: {"anyOf": [s]}),
    "product of anyOf": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {}}} for j in range(6)]}
            for i in range(20)
        ]
    },
    "multiples of primes": {
        "type": "integer",
        "allOf": [{"multipleOf": p} for p in (97, 89, 83, 79)],
    },
    "multiple of a large prime": {"type": "integer", "multipleOf": 982451653},
    "itself": {"$ref": "#"},
    "a ring": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "the network": {"$ref": "http://127.0.0.1:9/x.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a file by way of $id": {"$id": "file:///etc/", "$ref": "#/passwd"},
    "long const": {"const": "x" * 10**6},
    "many values": {"enum": [f"value {i} of many" for i in range(50_000)]},
    "many properties": {
        "type": "object",
        "properties": {f"property {i}": {} for i in range(50_000)},
    },
    "groups": {"type": "string", "pattern": "(" * 2000 + "a" + ")" * 2000},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "huge number": {"type": "integer", "minimum": -(10**400)},
    "number beyond Python's": {"type": "integer", "minimum": -(10**5000)},
    "not a number": {"type": "number", "minimum": float("nan")},
    "an object": {"const": {1, 2}},
    "lone surrogate": {"const": "\ud800"},
    "not": {"not": {"type": "string"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "told to be lenient": {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
    "unknown format": {"type": "string", "format": "zzz"},
    "overlapping oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "impossible": {"type": "integer", "minimum": 3, "maximum": 2},
}
REFUSED_REGEXES = {
    "groups": "(" * 100_000 + "a" + ")" * 100_000,
    "repeats of repeats": "(((a{1000}){1000}){1000})",
    "open": "(a",
    "back reference": r"(a)\1",
    "surrogate": "\ud800",
}
REFUSED_GRAMMARS = {
    "groups": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "lexeme doubled 40 times": "start: A0\n"
    + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40))
    + '\nA40: "a"',
    "conjunction": "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}.*/" for i in range(1, 40)),
    "ring of lexemes": "start: A\nA: B\nB: A",
    "ring of rules": "start: a\na: b\nb: a",
    "left recursion only": 'start: start "a"',
    "a file": "%import /etc/passwd\nstart: A",
    "long": f'start: "{"x" * 400_000}"',
    "nothing": "",
}


@pytest.mark.parametrize("name", REFUSED_SCHEMAS)
def test_a_schema_that_explodes_is_refused(tiny: Grammars, name: str) -> None:
    refused(
        functools.partial(tiny.constraint_for, json_format(REFUSED_SCHEMAS[name])),
        "response_format",
    )


@pytest.mark.parametrize("name", REFUSED_REGEXES)
def test_so_is_a_regex(tiny: Grammars, name: str) -> None:
    refused(functools.partial(tiny.constraint_for, None, regex=REFUSED_REGEXES[name]), "regex")


@pytest.mark.parametrize("name", REFUSED_GRAMMARS)
def test_so_is_a_grammar(tiny: Grammars, name: str) -> None:
    refused(functools.partial(tiny.constraint_for, None, grammar=REFUSED_GRAMMARS[name]), "grammar")


def refused(ask: Any, param: str) -> None:
    """In one line that names the parameter, with little work of this process; the second time at
    once."""
    for used_s in (1.0, 0.3):
        began_s = time.thread_time()
        with pytest.raises(StructureError) as caught:
            ask()
        assert time.thread_time() - began_s < used_s
        assert caught.value.param == param
        assert param in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


LARGE: dict[str, Any] = {
    "references": bomb(20, lambda ref: {"anyOf": [ref] * 10}),
    "objects": bomb(
        20, lambda ref: {"type": "object", "properties": {f"p{j}": ref for j in range(10)}}
    ),
    "repeats": {"type": "array", "maxItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "lengths": {"type": "string", "minLength": 10**9},
    "200 alternatives": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": f"kind {i}"}, f"p{i}": {"type": "string"}},
                "required": ["kind"],
                "additionalProperties": False,
            }
            for i in range(200)
        ]
    },
    "200 records": {
        "type": "object",
        "properties": {
            f"p{i}": {
                "type": "object",
                "properties": {
                    "kind": {"enum": [f"k{j}" for j in range(20)]},
                    "when": {"type": "string", "format": "date-time"},
                    "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}},
                },
            }
            for i in range(200)
        },
    },
    "2000 values": {"enum": [f"value {i}" for i in range(2000)]},
    "letters": {"type": "string", "pattern": r"^\p{L}{1,40}( \w{1,40}){0,9}$"},
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_only_large_is_followed(
    smollm2: Grammars, smollm2_tokenizer: Tokenizer, name: str
) -> None:
    rule = smollm2.constraint_for(json_format(LARGE[name]))
    assert rule is not None
    began_s = time.thread_time()
    text, whole = spoken(rule, smollm2_tokenizer, np.random.default_rng(3), most=100)
    assert rule.failure is None
    if whole and name != "letters":  # Python has no \p
        CHECKED(LARGE[name]).validate(json.loads(text))
    assert time.thread_time() - began_s < 1.0


@pytest.mark.parametrize(
    "grammar",
    [
        # A rule doubled 40 times, an ambiguous one, and one that needs 2**200 states of the lexer.
        'start: "y" a0\n' + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "a"',
        'start: "y" s\ns: s s | "a" | s s s',
        'start: "y" /.*a.{200}.*b.{200}/',
        'start: "y" A\nA: ~(~(/.*a.{20}/)) & ~/.*b.{20}/',
        'start: "y" %json {"type": "string", "pattern": "^(((a{1000}){1000}){1000}b|c)$"}',
        'start: "y" /((((a|b){1,999}){1,999}){1,999}){1,999}/',
    ],
)
def test_what_explodes_later_ends_its_answer_alone(
    smollm2: Grammars, smollm2_tokenizer: Tokenizer, grammar: str
) -> None:
    """Some grammars are cheap to begin with; whatever they are up to, it ends soon."""
    try:
        rule = smollm2.constraint_for(None, grammar=grammar)
    except StructureError:
        return
    assert rule is not None
    rng, began_s, slowest_s = np.random.default_rng(1), time.thread_time(), 0.0
    rule.advance(named(smollm2_tokenizer, "y"))
    for _ in range(200):
        if rule.done:
            break
        at_s = time.thread_time()
        mask = rule.allowed().copy()
        mask[list(smollm2_tokenizer.eos_ids)] = False
        if mask.any():
            rule.advance(int(rng.choice(np.flatnonzero(mask))))
        slowest_s = max(slowest_s, time.thread_time() - at_s)
    assert slowest_s < 0.5
    assert time.thread_time() - began_s < 0.5 + 200 * 0.01 + 0.5
    if rule.failure is not None:
        assert "\n" not in rule.failure
        assert rule.done


def test_time_is_limited(tiny: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = tiny.constraint_for(None, regex="a*")
    assert rule is not None
    monkeypatch.setattr(structured, "_SPARE_S", -1.0)
    rule.advance(ord("a"))
    assert rule.done
    assert rule.failure == "the grammar takes too long to follow"


def test_a_killed_probe_is_started_again(tiny: Grammars) -> None:
    assert tiny.constraint_for(None, regex="killed1") is not None
    process = tiny._probe._process
    assert process is not None
    process.kill()
    process.wait()
    assert tiny.constraint_for(None, regex="killed2") is not None


def test_few_grammars_are_kept(bytes_tokenizer: Tokenizer) -> None:
    grammars = Grammars(bytes_tokenizer)
    first = grammars.constraint_for(None, regex="x0")
    assert first is not None
    for i in range(2 * structured.KEPT):
        grammars.constraint_for(None, regex=f"x{i}")
    assert len(grammars._kept) == structured.KEPT
    grammars.close()
    gc.collect()
    first.advance(ord("x"))
    assert np.flatnonzero(first.allowed()).tolist() == [ord("0")]


@pytest.mark.parametrize(
    ("response_format", "others"),
    [
        ({"type": "xml"}, {}),
        ({}, {}),
        ({"type": "json_schema"}, {}),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, {}),
        ({"type": "json_schema", "json_schema": {"schema": [1]}}, {}),
        ({"type": "json_object", "schema": {}}, {}),
        ({"type": "json_object"}, {"regex": "a"}),
        (None, {"regex": "a", "grammar": "start: /a/"}),
    ],
)
def test_what_is_no_constraint_is_refused(
    tiny: Grammars, response_format: Mapping[str, Any] | None, others: dict[str, str]
) -> None:
    with pytest.raises(StructureError):
        tiny.constraint_for(response_format, **others)
