"""In: a seed. Out: requests of all kinds for a service, with equal beginnings among them.

Each says with a seed of its own what it wants, so that its answer is one and the same for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openlpu.graph.step import PAGE

_TEXT = """
The old cat sat on a red stone by the river and asked the bird one question: is a slow cloud more
than a quick one? Two dogs ran over the bridge, three letters lay under the lamp, and the number of
each page was written in blue. Nobody wrote an answer, so the model took a token, then another.
"""
_WORDS = _TEXT.split()
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["colour", "count"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "next": {"type": "null"}},
        "required": ["name"],
    },
)
_REGEXES = ("[a-z]{3,40}", "(ab|cd|ef)+", "-?[0-9]{1,3}([.][0-9]{2})?", "[a-e ]{5,60}")
_GRAMMARS = (
    'start: WORD (", " WORD)*\nWORD: /[a-z]{1,6}/',
    'start: "yes" | "no" | "perhaps" /[.!]{0,9}/',
)
_FUNCTIONS: tuple[dict[str, Any], ...] = (
    {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 8}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
    {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request. body: without `stream`; may_stream: whether it can be asked for."""

    path: str
    body: dict[str, Any]
    may_stream: bool = True


def mixed_requests(
    count: int, seed: int, *, model: str, letters: int = 400, tokens: int = 60
) -> list[Asked]:
    """The same ones for the same seed. letters: of the longest prompts. tokens: of answers."""
    return [_Maker(seed, model, letters, tokens).make(i) for i in range(count)]


class _Maker:
    """Makes request after request; each depends on its own number alone."""

    def __init__(self, seed: int, model: str, letters: int, tokens: int) -> None:
        self._seed = seed
        self._model = model
        self._letters = letters
        self._tokens = tokens
        rng = random.Random(seed)
        lengths = (letters // 6, letters // 3, letters // 2, letters * 3 // 4)
        self._beginnings = [_words(rng, n) for n in lengths]
        self._pages = [[rng.randrange(256) for _ in range(PAGE)] for _ in range(2)]

    def make(self, number: int) -> Asked:
        """The request with this number."""
        self._rng = rng = random.Random(f"{self._seed} {number}")
        kinds: list[Callable[[], tuple[str, dict[str, Any]]]]
        kinds = [self._chat, self._completion, self._response, self._embedding]
        (kind,) = rng.choices(kinds, (10, 7, 4, 1))
        name, body = kind()
        prefix = rng.choice(("/v1", "/v1", "/openai/v1"))
        streams = kind != self._embedding and body.get("best_of") is None
        return Asked(f"{prefix}/{name}", {"model": self._model, **body}, streams)

    # -- endpoints ------------------------------------------------------------------------------

    def _chat(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        body: dict[str, Any] = {"messages": self._messages(), **self._sampling()}
        body |= self._structure(tools=True)
        most = self._most(body)
        body[rng.choice(("max_tokens", "max_completion_tokens"))] = most
        if rng.random() < 0.25:
            body["n"] = rng.randint(2, 3)
        return "chat/completions", {**body, "logprobs": True, "top_logprobs": rng.randint(0, 5)}

    def _completion(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        prompt: Any = self._prompt()
        if (form := rng.random()) < 0.15:
            prompt = [prompt, self._prompt()]
        elif form < 0.25:
            prompt = [rng.randrange(256) for _ in range(rng.randint(1, self._letters))]
        elif form < 0.4:  # equal pages, but not after equal ones
            prompt = [token for _ in range(4) for token in rng.choice(self._pages)] + [65]
        body = {"prompt": prompt, **self._sampling(), **self._structure(tools=False)}
        body["max_tokens"] = self._most(body)
        if (form := rng.random()) < 0.2:
            return "completions", {**body, "echo": True}  # without log probabilities
        if form < 0.4:
            body |= {"n": 2, "best_of": 3}
        elif form < 0.6:
            body["n"] = 2
        return "completions", {**body, "logprobs": rng.randint(0, 5)}

    def _response(self) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"input": self._messages(), **self._sampling()}
        given = self._structure(tools=True)
        if "response_format" in given:
            form = given.pop("response_format")
            schema = form.pop("json_schema", {})
            body["text"] = {"format": {**form, **schema}}
        if "tools" in given:
            given["tools"] = [{"type": "function", **t["function"]} for t in given["tools"]]
            if isinstance(choice := given.get("tool_choice"), dict):
                given["tool_choice"] = {"type": "function", **choice["function"]}
        body |= {**given, "max_output_tokens": self._most(given)}
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        return "responses", body

    def _embedding(self) -> tuple[str, dict[str, Any]]:
        return "embeddings", {"input": [self._prompt() for _ in range(self._rng.randint(1, 3))]}

    # -- parts ----------------------------------------------------------------------------------

    def _most(self, body: dict[str, Any]) -> int:
        """Of an answer's tokens; where each letter is one, calls are long."""
        if "tools" in body:
            return self._rng.randint(1, 3 * self._tokens)
        return self._rng.randint(1, self._rng.choice((8, self._tokens // 2, self._tokens)))

    def _prompt(self) -> str:
        """From one letter on; many begin alike, some are one phrase again and again."""
        rng = self._rng
        if (form := rng.random()) < 0.1:
            return rng.choice("abcdef")
        if form < 0.25:
            return f"{_words(rng, 12)}. " * rng.randint(2, self._letters // 14)
        beginning = rng.choice(self._beginnings) if form < 0.75 else ""
        return beginning + _words(rng, rng.randint(1, self._letters // 2))

    def _messages(self) -> list[dict[str, Any]]:
        rng = self._rng
        messages = [{"role": "user", "content": self._prompt()}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": rng.choice(self._beginnings)})
        if rng.random() < 0.2:
            messages.append({"role": "assistant", "content": _words(rng, 30)})
            messages.append({"role": "user", "content": "and then?"})
        return messages

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        found: dict[str, Any] = {"seed": rng.randrange(-(2**63), 2**64)}
        found["temperature"] = rng.choice((0, 0, 0.3, 0.7, 1, 1.5))
        if rng.random() < 0.4:
            name, value = rng.choice((("top_p", 0.8), ("top_k", 7), ("min_p", 0.05)))
            found[name] = value
        if rng.random() < 0.3:
            found["presence_penalty"] = rng.uniform(-1, 1)
            found["frequency_penalty"] = rng.uniform(-1, 1)
        if rng.random() < 0.2:
            found["repetition_penalty"] = rng.uniform(0.8, 1.5)
        if rng.random() < 0.2:
            found["logit_bias"] = {str(rng.randrange(256)): rng.uniform(-5, 5) for _ in range(4)}
        if rng.random() < 0.25:
            found["stop"] = rng.choice((["e", "qu"], "ab", [", ", "}"], list("aeiou")))
        if rng.random() < 0.3:
            found["priority"] = rng.randint(-2, 2)
        return found

    def _structure(self, *, tools: bool) -> dict[str, Any]:
        """Half of the answers must have a form."""
        rng = self._rng
        form = rng.choice(("free",) * 6 + ("schema", "schema", "object", "regex", "regex", "lark"))
        if tools and rng.random() < 0.15:
            functions = [{"type": "function", "function": f} for f in _FUNCTIONS]
            named = {"type": "function", "function": {"name": rng.choice(_FUNCTIONS)["name"]}}
            choice = rng.choice(("auto", "required", "none", named))
            return {"tools": functions, "tool_choice": choice}
        if form == "schema":
            schema = {"name": "x", "strict": True, "schema": rng.choice(_SCHEMAS)}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        if form == "object":
            return {"response_format": {"type": "json_object"}}
        if form == "regex":
            return {"regex": rng.choice(_REGEXES)}
        return {"grammar": rng.choice(_GRAMMARS)} if form == "lark" else {}


def _words(rng: random.Random, letters: int) -> str:
    """A text of so many letters, or a few more."""
    text = ""
    while len(text) < letters:
        text += rng.choice(_WORDS) + " "
    return text
