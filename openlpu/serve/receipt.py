"""In: answers that were given. Out: a receipt that repeats them; from a receipt: whether every bit
agrees.

A receipt is plain JSON: the contract, the model's identity, and for each answer the prompt's
tokens, the sampling with its seed, what constrained it, its tokens and log probabilities; a sha256
over all of it in canonical form (sorted keys, no spaces, ASCII) tells a damaged one. Receipts come
from strangers: every field is typed and bounded, and none of them is a path or code.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from itertools import zip_longest
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json, to_json

from openlpu.engine import Model
from openlpu.engine.embed import embed
from openlpu.engine.logprobs import MOST, TokenLogprob
from openlpu.engine.sampling import Sampling, sampling_from
from openlpu.engine.sequence import Answer, FinishReason, Request
from openlpu.engine.text import AnswerText
from openlpu.errors import RequestError
from openlpu.numerics import CONTRACT
from openlpu.serve.structured import GrammarConstraint, Grammars
from openlpu.serve.tools import read_tools

MOST_BYTES = 32 << 20
"""Of a receipt: the log probabilities of 32,000 tokens with 20 others each."""
_MOST_TOKENS = 1 << 20
_MOST_TEXT = 8 << 20  # letters; more than a request can have
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[tuple[_Token, ...], Field(max_length=_MOST_TOKENS)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(max_length=_MOST_TEXT)]
CONSTRAINTS = (
    "response_format",
    "regex",
    "grammar",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
)
"""Fields of a request that constrain its answer."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Claim(_Part):
    """Which model answered."""

    name: Annotated[str, Field(max_length=255)]
    precision: Annotated[str, Field(max_length=16)]
    identity: _Sha256
    context: Annotated[int, Field(gt=0, lt=2**31)]


class Options(_Part):
    """The fields of Sampling; its own checks come when it is made of them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Annotated[tuple[tuple[_Token, float], ...], Field(max_length=1 << 20)]
    seed: Annotated[int | None, Field(ge=0, lt=2**64)]
    stop: Annotated[tuple[_Text, ...], Field(max_length=1 << 16)]
    max_tokens: int
    ignore_eos: bool

    def sampling(self) -> Sampling:
        """Raises RequestError for what is out of range, or if the seed of a draw is missing."""
        found = sampling_from(dict(self))
        if found.seed is None and not found.greedy:
            raise RequestError("the receipt holds no seed, so nothing can be repeated")
        return found


class Answered(_Part):
    """One answer. logprobs: how many others were told with each token, None for none at all."""

    prompt: Annotated[_Tokens, Field(min_length=1)]
    sampling: Options
    end_ids: Annotated[tuple[_Token, ...], Field(max_length=1024)]
    logprobs: Annotated[int | None, Field(ge=0, le=MOST)]
    constraint: _Text | None
    """JSON text of what the request asked for, of CONSTRAINTS. Text, because the order of a
    schema's parts and the form of its numbers count, which readers of JSON may change."""
    tokens: _Tokens
    token_logprobs: Annotated[
        tuple[tuple[_Token, float, tuple[tuple[_Token, float], ...]], ...],
        Field(max_length=_MOST_TOKENS),
    ]
    finish_reason: FinishReason

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if len(self.token_logprobs) != (0 if self.logprobs is None else len(self.tokens)):
            raise PydanticCustomError("incomplete", "there is no log probability for each token")
        return self


class Embedded(_Part):
    """One embedding: float32, little-endian, in base64."""

    prompt: Annotated[_Tokens, Field(min_length=1)]
    vector: Annotated[str, Field(max_length=1 << 20)]


class Receipt(_Part):
    """Everything that is needed to repeat the answers of one request."""

    format: Literal["lpu-receipt-1"]
    contract: Annotated[str, Field(max_length=64)]
    model: Claim
    answers: Annotated[tuple[Answered, ...], Field(max_length=4096)]
    embeddings: Annotated[tuple[Embedded, ...], Field(max_length=4096)]
    sha256: _Sha256

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if not (self.answers or self.embeddings):
            raise PydanticCustomError("empty", "it holds no answer")
        return self

    def digest(self) -> str:
        """Hex sha256 over the canonical form of all other fields."""
        value = self.model_dump(mode="json", exclude={"sha256"})
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


# -- making one -------------------------------------------------------------------------------


def answered(
    prompt: Items[int],
    answer: Answer,
    *,
    constraint: Mapping[str, Any] | None = None,
    told: int | None = None,
    finish_reason: FinishReason | None = None,
) -> Answered:
    """The record of an answer that has ended. prompt: its tokens. constraint: the request's own
    fields of CONSTRAINTS, in plain JSON values. told and finish_reason: how many of its tokens are
    the answer and what ended it, where a stop string did; else the engine says it."""
    request, tokens = answer.request, answer.generated[:told]
    kept = answer.logprobs[: len(tokens)]
    asked = {name: value for name, value in (constraint or {}).items() if value is not None}
    return Answered(
        prompt=tuple(prompt),
        sampling=Options(**dataclasses.asdict(answer.sampling)),
        end_ids=tuple(sorted(request.end_ids)),
        logprobs=request.logprobs,
        constraint=json.dumps(asked, allow_nan=False) if asked else None,
        tokens=tuple(tokens),
        token_logprobs=tuple((t.token, t.logprob, t.top) for t in kept),
        finish_reason=finish_reason or answer.finish_reason or "cancelled",
    )


def embedded(prompt: Items[int], vector: Any) -> Embedded:
    """The record of an embedding float32 [D]."""
    data = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return Embedded(prompt=tuple(prompt), vector=data)


def receipt_of(
    model: Model, answers: Iterable[Answered] = (), embeddings: Iterable[Embedded] = ()
) -> dict[str, Any]:
    """The receipt as plain JSON values, its sha256 included."""
    claim = Claim(
        name=model.name,
        precision=model.compiled.precision,
        identity=model.identity,
        context=model.context,
    )
    receipt = Receipt(
        format="lpu-receipt-1",
        contract=CONTRACT,
        model=claim,
        answers=tuple(answers),
        embeddings=tuple(embeddings),
        sha256="0" * 64,
    )
    return {**receipt.model_dump(mode="json"), "sha256": receipt.digest()}


# -- reading and repeating one ----------------------------------------------------------------


def _inner(data: bytes | str) -> bytes | str:
    """The receipt in a whole answer; else what was given."""
    try:
        document = from_json(data)
    except ValueError:
        return data  # the reader says what is wrong with it
    answer = document if isinstance(document, dict) else {}
    return to_json(answer["lpu_receipt"]) if "lpu_receipt" in answer else data


def read_receipt(data: bytes | str) -> Receipt:
    """A receipt out of JSON, or of an answer that has one. Raises RequestError for one that is too
    large, malformed, damaged, or of another contract."""
    if len(data) > MOST_BYTES:
        raise RequestError(f"the receipt is larger than {MOST_BYTES >> 20} MiB")
    try:
        receipt = Receipt.model_validate_json(_inner(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        told = f"{place}: {first['msg']}" if place else first["msg"]
        raise RequestError(f"not a receipt: {told}"[:300]) from None
    if receipt.digest() != receipt.sha256:
        raise RequestError("the receipt is damaged: its sha256 is another one")
    if receipt.contract != CONTRACT:
        raise RequestError(
            f"the receipt is of contract {receipt.contract!r}; this version computes {CONTRACT}"
        )
    return receipt


@dataclasses.dataclass(frozen=True, slots=True)
class Repeated:
    """One answer compared with its repetition."""

    kind: Literal["answer", "embedding"]
    tokens: int
    """Tokens of the answer; of the prompt, for an embedding."""
    first_difference: int | None
    """The first token (or number of the vector) that differs; None if they are the same."""
    differing_logprobs: int
    """Tokens, up to there, whose log probabilities differ."""
    finish_reason: str
    repeated_finish_reason: str
    text: str
    """The text of the repeated answer, to be compared with what was delivered."""

    @property
    def same(self) -> bool:
        """Whether every bit agrees."""
        return (
            self.first_difference is None
            and not self.differing_logprobs
            and self.finish_reason == self.repeated_finish_reason
        )


def replay(model: Model, receipt: Receipt) -> list[Repeated]:
    """Run everything in a receipt again. Raises RequestError for what this model cannot run."""
    grammars = Grammars(model.tokenizer, vocab_size=model.compiled.config.vocab_size)
    try:
        found = [_repeat(model, record, grammars) for record in receipt.answers]
    finally:
        grammars.close()
    return found + [_embed_again(model, record) for record in receipt.embeddings]


def _constraint(text: str, grammars: Grammars) -> GrammarConstraint | None:
    """The constraint that the fields of a request ask for. Raises RequestError."""
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict) or not set(asked) <= set(CONSTRAINTS):
        raise RequestError("the receipt's constraint cannot be read")
    tool_fields = ("tools", "tool_choice", "parallel_tool_calls")
    use = read_tools(*(asked.get(name) for name in tool_fields))
    if use is not None:
        return use.constraint(grammars, asked.get("response_format"))
    sources = {name: asked.get(name) for name in ("regex", "grammar")}
    if any(value is not None and not isinstance(value, str) for value in sources.values()):
        raise RequestError("the receipt's constraint is no text")
    return grammars.constraint_for(asked.get("response_format"), **sources)


def _repeat(model: Model, record: Answered, grammars: Grammars) -> Repeated:
    text_of = record.constraint
    constraint = None if text_of is None else _constraint(text_of, grammars)
    request = Request(
        end_ids=frozenset(record.end_ids), logprobs=record.logprobs, constraint=constraint
    )
    sampling = record.sampling.sampling()
    answer = model.engine.submit(record.prompt, sampling, request)
    text = AnswerText(model.tokenizer.stream(), stop=sampling.stop)
    parts: list[str] = []
    told = 0
    try:
        while True:
            done = answer.done
            while told < len(answer.generated) and not text.stopped:
                parts.append(text.push(answer.generated[told]))
                told += 1
            if done or text.stopped or told > len(record.tokens):
                break
            if record.finish_reason == "cancelled" and told == len(record.tokens):
                break
            model.engine.step()
    finally:
        answer.cancel()
    if answer.error is not None:
        raise answer.error
    if constraint is not None and constraint.failure is not None:
        raise RequestError(f"the receipt's constraint: {constraint.failure}")
    reason = "stop" if text.stopped else str(answer.finish_reason)
    parts.append(text.flush())
    tokens = tuple(answer.generated[:told])
    difference = _first_difference(record.tokens, tokens)
    length = len(tokens) if difference is None else difference
    theirs, ours = record.token_logprobs[:length], answer.logprobs[:length]
    return Repeated(
        kind="answer",
        tokens=len(record.tokens),
        first_difference=difference,
        differing_logprobs=sum(
            a is None or b is None or _bits(*a) != _bits_of(b) for a, b in zip_longest(theirs, ours)
        ),
        finish_reason=record.finish_reason,
        repeated_finish_reason=reason,
        text="".join(parts),
    )


def _first_difference(theirs: Items[object], ours: Items[object]) -> int | None:
    if theirs == ours:
        return None
    pairs = zip(theirs, ours, strict=False)
    shorter = min(len(theirs), len(ours))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _bits_of(found: TokenLogprob) -> bytes:
    return _bits(found.token, found.logprob, found.top)


def _bits(token: int, logprob: float, top: Items[tuple[int, float]]) -> bytes:
    pairs = [(token, logprob), *top]
    return b"".join(struct.pack("<qd", *pair) for pair in pairs)


def _embed_again(model: Model, record: Embedded) -> Repeated:
    try:
        theirs = base64.b64decode(record.vector, validate=True)
    except binascii.Error:
        raise RequestError("the receipt's vector is no base64") from None
    ours = embed(model, [record.prompt])[0].astype("<f4").tobytes()
    numbers = [[data[i : i + 4] for i in range(0, len(data), 4)] for data in (theirs, ours)]
    return Repeated(
        kind="embedding",
        tokens=len(record.prompt),
        first_difference=_first_difference(*numbers),
        differing_logprobs=0,
        finish_reason="stop",
        repeated_finish_reason="stop",
        text="",
    )
