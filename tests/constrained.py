"""In: constraints and random numbers. Out: texts said under their masks; random JSON schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
from hypothesis import strategies as st

from openlpu.load.tokenizer import Tokenizer
from openlpu.serve.structured import GrammarConstraint

CHECKED = jsonschema.Draft202012Validator


def json_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def nested(depth: int, make: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A schema within a schema within a schema."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = make(schema)
    return schema


def spoken(
    rule: GrammarConstraint, tokenizer: Tokenizer, rng: np.random.Generator, *, most: int = 400
) -> tuple[str, bool]:
    """Random text under the masks, and whether it came to its end. Ends are likelier than chance,
    and quotes and brackets that close, too, or most texts would never end."""
    ids: list[int] = []
    closing = {i for t in ('"', "}", "]", "1") if (i := tokenizer.encode(t)[0]) is not None}
    for _ in range(most):
        mask = rule.allowed()
        assert mask.any()
        ends = [i for i in tokenizer.eos_ids if mask[i]]
        choices = np.flatnonzero(mask)
        near = [i for i in closing if mask[i]]
        if ends and (rng.random() < 0.3 or len(choices) == len(ends)):
            return tokenizer.decode(ids), True
        token = int(rng.choice(near if near and rng.random() < 0.5 else choices))
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids), True
        assert not tokenizer.is_control(token)
        ids.append(token)
        rule.advance(token)
        if rule.done:
            assert rule.failure is None
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


def accepts(rule: GrammarConstraint, tokenizer: Tokenizer, text: str) -> bool:
    """Whether this text may be said, byte by byte, and may end there."""
    for token in tokenizer.encode(text):
        if rule.done or not rule.allowed()[token]:
            return False
        rule.advance(token)
    return rule.done or bool(rule.allowed()[list(tokenizer.eos_ids)].all())


NAMES = st.text("abcxyz_ äß", min_size=1, max_size=5)
LEAVES = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": ["string", "null"]}),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b},
              st.integers(0, 3), st.integers(0, 4)),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}-[0-9]+$"}),
    st.sampled_from([{"type": "string", "format": f} for f in ("date", "uuid", "ipv4")]),
    st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b},
              st.integers(-99, 99), st.integers(0, 999)),
    st.just({"type": "number"}),
    st.just({"type": "integer", "multipleOf": 7}),
    st.builds(lambda values: {"enum": values},
              st.lists(st.one_of(NAMES, st.integers(-9, 9), st.none()), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, st.one_of(NAMES, st.just({"a": [1, "b"]}))),
)  # fmt: skip


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def of_object(parts: dict[str, Any], needed: set[str], closed: bool) -> dict[str, Any]:
        required = sorted(needed & set(parts))
        extra = {"additionalProperties": False} if closed else {}
        return {"type": "object", "properties": parts, "required": required, **extra}

    return st.one_of(
        st.builds(
            of_object, st.dictionaries(NAMES, inner, max_size=3), st.sets(NAMES), st.booleans()
        ),
        st.builds(
            lambda items, low, more: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": low + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
    )


PARTS = st.recursive(LEAVES, larger, max_leaves=6)
SCHEMAS = PARTS | st.builds(
    lambda part: {
        "$defs": {"part": part},
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/part"}},
        "required": ["p"],
    },
    PARTS,
)
