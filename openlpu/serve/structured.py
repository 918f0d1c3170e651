"""In: a response_format, a regular expression or a grammar. Out: Constraint: what may come next.

llguidance computes the masks. Around it stand bounds, for schemas are strangers': on size and depth
here, on work in `parser_limits`, and on time and memory by compiling in a process apart first
(probe.py). Compiled grammars are kept, so that the next request with the same one starts at once.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from openlpu.errors import CheckpointError, RequestError
from openlpu.load.fields import one_line
from openlpu.load.tokenizer import Tokenizer
from openlpu.serve.probe import Probe, parser_limits

Bools = NDArray[np.bool_]

MAX_SOURCE_BYTES: Final = 256 << 10
"""Of a whole grammar, with its schemas as compact JSON."""
MAX_DEPTH: Final = 64
"""llguidance's reader ends at 128, of which a tool's schema loses a few."""
MAX_LITERAL_CHARS: Final = 4096
"""Each byte of an answer costs time in proportion to the text that a grammar demands in one."""
KEPT: Final = 32
"""Compiled grammars; most take well below a megabyte."""
_SPARE_S, _TOKEN_S = 0.5, 0.01  # processor time of masks; serious grammars take 0.0003 a token
# Answers in JSON are compact or indented; more white space is where weak models lose themselves.
_GUIDANCE: Final = {
    "whitespace_flexible": False,
    "whitespace_pattern": r" ?|\n {0,24}",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
_PROSE: Final = frozenset({"$comment", "default", "description", "examples", "title"})
_BY_NAME: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_FORMATS: Final = {"text", "json_object", "json_schema"}


class StructureError(RequestError):
    """A constraint cannot be had; `param` names the part of the request that asks for it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Grammars:
    """Compiles what requests ask for, for one model.

    Any thread may call it, but no event loop should: a first compilation can take seconds.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int | None = None) -> None:
        """vocab_size: of the model's logits, which may be padded; None: the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._vocabulary: Vocabulary | None = None
        self._probe = Probe()
        self._kept: OrderedDict[bytes, Compiled | str] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def constraint_for(
        self,
        response_format: Mapping[str, Any] | None,
        *,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> GrammarConstraint | None:
        """The constraint of one answer, or None for free text.

        response_format: {"type": "text" | "json_object"} or {"type": "json_schema", "json_schema":
        {"schema": ...}}. regex: of the whole answer. grammar: in llguidance's dialect of Lark. At
        most one of them. Raises StructureError.
        """
        schema = schema_of(response_format)
        wanted = {"response_format": schema, "regex": regex, "grammar": grammar}
        given = [name for name, value in wanted.items() if value is not None]
        if len(given) > 1:
            raise StructureError(f"{given[0]} and {given[1]} exclude each other", given[1])
        if schema is not None:
            text = schema_text(schema, "response_format")
            source = f'{{"grammars":[{{"json_schema":{text}}}]}}'
            return self._constraint(source, "response_format")
        if regex is not None:
            check_literal(regex, "regex")
            return self._constraint(_encoded(LLMatcher.grammar_from_regex, regex, "regex"), "regex")
        if grammar is not None:
            return self.of_lark(grammar, "grammar")
        return None

    def of_lark(self, source: str, param: str) -> GrammarConstraint:
        """The constraint that a grammar in llguidance's dialect of Lark makes."""
        return self._constraint(_encoded(LLMatcher.grammar_from_lark, source, param), param)

    def close(self) -> None:
        """End the process that tries grammars out; the next grammar starts another."""
        with self._compiling:
            self._probe.close()

    def _constraint(self, source: str, param: str) -> GrammarConstraint:
        if len(source) > MAX_SOURCE_BYTES:
            raise StructureError(
                f"{param} has {len(source):,} bytes, more than {MAX_SOURCE_BYTES:,}", param
            )
        key = hashlib.sha256(source.encode()).digest()
        found = self._find(key)
        if found is None:
            with self._compiling:
                found = self._find(key) or self._compile(source)
                self._keep(key, found)
        if isinstance(found, str):
            raise StructureError(f"{param} cannot be used: {found}", param)
        return GrammarConstraint(found)

    def _find(self, key: bytes) -> Compiled | str | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: bytes, found: Compiled | str) -> None:
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)

    def _compile(self, source: str) -> Compiled | str:
        """The compiled grammar, or why there is none."""
        complaint = self._probe.complaint(source)
        if complaint is None:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
            compiled = Compiled.of(source, self._vocabulary)
            complaint = compiled.complaint
            if complaint is None:
                return compiled
        return _reworded(complaint)


class Spelling:
    """Tokens and what each says, for llguidance; those that say nothing are never allowed."""

    # What LLTokenizer asks of a tokenizer. Its end is a token that the model does not have.
    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, texts: list[bytes], tokenizer: Tokenizer) -> None:
        self.texts = texts
        self.tokens = [*texts, b"\xff<end>"]
        self.eos_token_id = len(texts)
        self.special_token_ids = [len(texts)]
        self._tokenizer = tokenizer
        self._ids = {text: i for i, text in reversed([*enumerate(texts)]) if text}
        self._longest = max(map(len, self._ids), default=0)
        wrapper: Any = self
        self.library = LLTokenizer(wrapper, len(texts) + 1, len(texts))

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens that say `text`: the model's own way if that is exact, else the longest first.

        llguidance asks for what a grammar demands, and prefers these tokens to other spellings.
        """
        said = text.encode() if isinstance(text, str) else text
        try:
            ids = self._tokenizer.encode(said.decode())
        except (UnicodeDecodeError, RequestError, CheckpointError):
            ids = []
        if all(i < len(self.texts) for i in ids) and b"".join(self.texts[i] for i in ids) == said:
            return ids
        ids, at = [], 0
        while at < len(said):
            for length in range(min(self._longest, len(said) - at), 0, -1):
                if (token := self._ids.get(said[at : at + length])) is not None:
                    break
            else:
                return []  # no token begins so; the mask will be empty
            ids.append(token)
            at += length
        return ids


class Vocabulary:
    """The model's tokens, and what they say within an answer and at its beginning."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.size = vocab_size
        self.end_ids = [i for i in tokenizer.eos_ids if i < vocab_size]
        ids = range(min(vocab_size, tokenizer.vocab_size))
        # Control tokens say nothing, nor do bytes that UTF-8 lacks.
        silent = {i for i in ids if i in self.end_ids or tokenizer.is_control(i)}
        texts = [b"" if i in silent else tokenizer.token_bytes(i) for i in ids]
        texts = [b"" if b"\xff" in text else text for text in texts]
        self.sayable = np.zeros(vocab_size, np.bool_)
        self.sayable[: len(texts)] = [text != b"" for text in texts]
        self.within = Spelling(texts, tokenizer)
        self.first = self.within
        if tokenizer.space_prefix:
            # Decoding drops one space from the beginning of an answer.
            self.first = Spelling([text.removeprefix(b" ") for text in texts], tokenizer)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar at its beginning, never advanced: constraints begin with copies of it."""

    matcher: LLMatcher
    vocabulary: Vocabulary
    first: Bools
    """[V]: the first mask."""
    complaint: str | None

    @classmethod
    def of(cls, source: str, vocabulary: Vocabulary) -> Compiled:
        matcher = beginning = _matcher(vocabulary.within, source)
        if vocabulary.first is not vocabulary.within:
            beginning = _matcher(vocabulary.first, source)
        first, complaint = next_mask(beginning, vocabulary)
        first.flags.writeable = False
        return cls(matcher, vocabulary, first, complaint or matcher.get_error() or None)


class GrammarConstraint:
    """What one answer may say; see openlpu.engine.sequence.Constraint.

    The same tokens always meet the same masks. Where the grammar proves too costly in the middle of
    an answer, the answer ends and `failure` says why; None otherwise.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._matcher = compiled.matcher.deep_copy()
        self._vocabulary = compiled.vocabulary
        self._mask = compiled.first
        self._tokens = 0
        self._spent_s = 0.0
        self._ended = False
        self.failure: str | None = None

    def allowed(self) -> Bools:
        """[V]: which tokens may come next; the end where the grammar may end."""
        return self._mask

    def advance(self, token: int) -> None:
        """The token came; the next mask is made at once, so that `done` is known."""
        if self.done:
            return
        if token in self._vocabulary.end_ids:
            self._ended = True
            return
        began_s = time.thread_time()
        self._matcher.consume_tokens(self._said(token))
        self._tokens += 1
        if self._matcher.is_stopped() and not self._matcher.is_error():
            self._ended = True
            return
        self._mask, self.failure = next_mask(self._matcher, self._vocabulary)
        self._spent_s += time.thread_time() - began_s
        if self._spent_s > _SPARE_S + _TOKEN_S * self._tokens:
            self.failure = "the grammar takes too long to follow"

    def _said(self, token: int) -> list[int]:
        """Tokens for the library, which say what this one adds to the text."""
        within, first = self._vocabulary.within, self._vocabulary.first
        if self._tokens == 0 and first.texts[token] != within.texts[token]:
            return within(first.texts[token])
        return [token]

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return self._ended or self.failure is not None


def next_mask(matcher: LLMatcher, vocabulary: Vocabulary) -> tuple[Bools, str | None]:
    """[V] of what may follow, and why nothing can."""
    packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    bits = np.unpackbits(packed, bitorder="little")[: len(vocabulary.within.texts)]
    mask = np.zeros(vocabulary.size, np.bool_)
    mask[: bits.size] = bits
    mask &= vocabulary.sayable
    if matcher.is_error():
        return mask, _reworded(matcher.get_error())
    if matcher.is_accepting():
        mask[vocabulary.end_ids] = True
    return mask, None if mask.any() else "no token of this model can follow where it leads"


def _reworded(complaint: str) -> str:
    """One line of the library's complaint, without advice that only its caller could follow."""
    if complaint.startswith("NoExtension"):
        return "no finite text fits it"
    if complaint.startswith("oneOf constraints"):
        return "oneOf with alternatives that may overlap is not supported; use anyOf"
    return one_line(complaint.replace("<non-verbose/>", ""), 200)


def schema_of(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema that a response_format asks for; None for text."""
    where = "response_format"
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping) or response_format.get("type") not in _FORMATS:
        raise StructureError(f"{where}.type must be text, json_object or json_schema", where)
    kind = response_format["type"]
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if unknown := set(response_format) - known:
        raise StructureError(f"{where} has an unknown part {one_line(min(unknown), 40)!r}", where)
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    asked = response_format.get("json_schema")
    if not isinstance(asked, Mapping) or not isinstance(asked.get("schema"), Mapping):
        raise StructureError(f"{where}.json_schema.schema must be a JSON schema", where)
    schema: Mapping[str, Any] = asked["schema"]
    return schema


def schema_text(schema: Mapping[str, Any], param: str, *, strict: bool = True) -> str:
    """Compact JSON of a schema, without its prose, with our choice of white space. strict: what
    cannot be enforced is refused; else it is left to the model.

    Raises StructureError for schemas that are too deep or demand too long texts.
    """
    guidance = _GUIDANCE if strict else {**_GUIDANCE, "lenient": True, "coerce_one_of": True}
    plain = {**_plain_schema(schema, param, 0), "x-guidance": guidance}
    return _encoded(lambda value: json.dumps(value, separators=(",", ":")), plain, param)


def _plain_schema(value: Any, param: str, depth: int) -> Any:
    """A schema, or a list of schemas, without prose."""
    if isinstance(value, (list, tuple)):
        return [_plain_schema(entry, param, _deeper(depth, param)) for entry in value]
    if not isinstance(value, Mapping):
        return _plain_value(value, param, depth)
    plain = {}
    for key, below in value.items():
        if key in _BY_NAME and isinstance(below, Mapping):
            plain[key] = {
                check_literal(name, param): _plain_schema(entry, param, _deeper(depth, param))
                for name, entry in below.items()
            }
        elif key in ("const", "enum"):
            plain[key] = _plain_value(below, param, _deeper(depth, param))
        elif key == "$ref" and not str(below).startswith("#"):
            raise StructureError(
                f"{param} refers to {one_line(below, 40)!r}, outside itself", param
            )
        elif key not in _PROSE:
            plain[check_literal(key, param)] = _plain_schema(below, param, _deeper(depth, param))
    return plain


def _plain_value(value: Any, param: str, depth: int) -> Any:
    if isinstance(value, str):
        return check_literal(value, param)
    if isinstance(value, Mapping):
        return {
            check_literal(key, param): _plain_value(below, param, _deeper(depth, param))
            for key, below in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain_value(entry, param, _deeper(depth, param)) for entry in value]
    return value


def _deeper(depth: int, param: str) -> int:
    if depth >= MAX_DEPTH:
        raise StructureError(f"{param} is nested more than {MAX_DEPTH} levels deep", param)
    return depth + 1


def check_literal(text: Any, param: str) -> str:
    """The text, unless it is too long to be part of a grammar."""
    if not isinstance(text, str):
        raise StructureError(f"{param} must be a text, or a schema of JSON values", param)
    if len(text) > MAX_LITERAL_CHARS:
        raise StructureError(
            f"{param} has a text of {len(text):,} characters, more than {MAX_LITERAL_CHARS:,}",
            param,
        )
    return text


def _encoded(encode: Any, value: Any, param: str) -> str:
    """What an encoder of ours or of the library makes of a value; its complaints by name."""
    try:
        return str(encode(value))
    except (TypeError, ValueError) as error:
        raise StructureError(f"{param} cannot be used: {one_line(error, 200)}", param) from None


def _matcher(spelling: Spelling, source: str) -> LLMatcher:
    return LLMatcher(spelling.library, source, log_level=0, limits=parser_limits())
