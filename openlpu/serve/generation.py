"""In: prompts and a Sampling. Out: Generation: the choices of one request, as their text grows.

Tokens become text here, in the event loop's thread, while the worker's thread makes the next ones.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from openlpu.engine.logprobs import TokenLogprob
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Request
from openlpu.engine.text import AnswerText
from openlpu.serve.errors import ApiError
from openlpu.serve.receipt import answered, receipt_of
from openlpu.serve.service import Service
from openlpu.serve.structured import GrammarConstraint, Grammars, StructureError
from openlpu.serve.tools import ToolUse
from openlpu.serve.worker import Feed

if TYPE_CHECKING:
    from openlpu.serve.endpoint import Anybody
    from openlpu.serve.guard import Caller

MOST_ANSWERS = 2048  # of one request
_SEED_BITS = 53  # any reader of JSON keeps so many
Ended = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Structure:
    """What an answer must look like."""

    response_format: Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    use: ToolUse | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The request's own words for it, for receipts."""

    def __post_init__(self) -> None:
        if self.use is not None:
            for name in ("regex", "grammar"):
                if getattr(self, name) is not None:
                    raise StructureError(f"tools and {name} exclude each other", name)

    def constraint(self, grammars: Grammars) -> GrammarConstraint | None:
        """A new one for each choice. May take seconds. Raises StructureError."""
        if self.use is not None:
            return self.use.constraint(grammars, self.response_format)
        return grammars.constraint_for(self.response_format, regex=self.regex, grammar=self.grammar)

    @property
    def free(self) -> bool:
        """Whether the answer may be any text."""
        kind = "text" if self.response_format is None else self.response_format.get("type")
        wanted = (self.regex, self.grammar, self.use)
        return kind == "text" and all(one is None for one in wanted)


@dataclass(frozen=True, slots=True)
class Piece:
    """Certain text with the tokens that made it. A control token has no text."""

    texts: list[str]
    """What each token made certain, and at the end what was held back."""
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One for each token, if they were asked for."""

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Choice:
    """One answer under way. `take` gives what came since the last time."""

    def __init__(self, index: int, prompt: list[int], feed: Feed, text: AnswerText) -> None:
        self.index = index
        self.prompt = prompt
        self.feed = feed
        self.told = 0
        """Tokens that are the answer: the engine may have gone beyond a stop string."""
        self.finish_reason: Ended | None = None
        """None while there may be more."""
        self._text = text
        self._said: list[str] = []  # not given yet
        self._given = 0

    def take(self) -> Piece | None:
        """The next piece, with whatever has come; None if nothing is certain. Raises ApiError and
        LpuError if there is no answer."""
        answer, text = self.feed.answer, self._text
        done = answer.done  # before the tokens, or the last ones could be missed
        generated = answer.generated
        said = self._said
        while self.told < len(generated) and not text.stopped:
            said.append(text.push(generated[self.told]))
            self.told += 1
        if text.stopped:
            self.finish_reason = "stop"
            self.feed.cancel()
        elif done:
            self._check()
            said.append(text.flush())
            self.finish_reason = "length" if answer.finish_reason == "length" else "stop"
        elif not any(said):
            return None
        start, self._given, self._said = self._given, self.told, []
        return Piece(said, generated[start : self.told], answer.logprobs[start : self.told])

    def _check(self) -> None:
        answer = self.feed.answer
        if self.feed.failure is not None:
            raise self.feed.failure
        if answer.error is not None:
            raise answer.error
        constraint = answer.request.constraint
        if isinstance(constraint, GrammarConstraint) and constraint.failure is not None:
            message = f"the answer was cut: {constraint.failure}"
            raise ApiError(400, message, code="constraint_failed")
        if answer.finish_reason == "cancelled":
            raise ApiError(503, "the answer was cut", type="server_error", code="unavailable")


class Generation:
    """The choices of one request. `close` it, whether it has ended or is left early."""

    def __init__(self, service: Service, structure: Structure, caller: Caller | Anybody) -> None:
        self.choices: list[Choice] = []
        self._service = service
        self._structure = structure
        self._caller = caller
        self._changed = asyncio.Event()
        self._closed = False

    async def start(
        self,
        prompts: Items[list[int]],
        sampling: Sampling,
        *,
        n: int = 1,
        logprobs: int | None = None,
        priority: int = 0,
    ) -> None:
        """Submit n choices for each prompt. Raises ApiError and LpuError."""
        service = self._service
        if n * len(prompts) > MOST_ANSWERS:
            message = f"{n} choices for {len(prompts)} prompts are more than {MOST_ANSWERS:,}"
            raise ApiError(400, message, param="n")
        sampling = sampling.seeded(secrets.randbits(_SEED_BITS))
        assert sampling.seed is not None
        request = Request(
            end_ids=frozenset(service.model.tokenizer.eos_ids),
            priority=priority,
            logprobs=logprobs,
            speculate=service.settings.speculate,
        )
        loop = asyncio.get_running_loop()
        for prompt in prompts:
            for i in range(n):
                if not self._structure.free:
                    constraint = await loop.run_in_executor(
                        service.compilers, self._structure.constraint, service.grammars
                    )
                    request = replace(request, constraint=constraint)
                seeded = replace(sampling, seed=(sampling.seed + i) % 2**64)
                feed = await service.worker.submit(prompt, seeded, request, changed=self._changed)
                text = AnswerText(service.model.tokenizer.stream(), stop=sampling.stop)
                self.choices.append(Choice(len(self.choices), prompt, feed, text))

    async def pieces(self) -> AsyncIterator[list[tuple[Choice, Piece]]]:
        """What has come of all choices, whenever something has. Raises ApiError and LpuError."""
        open_choices = self.choices
        while open_choices:
            self._changed.clear()
            found = [(c, piece) for c in open_choices if (piece := c.take()) is not None]
            open_choices = [c for c in open_choices if c.finish_reason is None]
            if found:
                yield found
            if open_choices:
                await self._changed.wait()

    # -- counts ---------------------------------------------------------------------------------

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, whatever the number of its choices."""
        return sum(len(c.prompt) for c in self._first_choices)

    @property
    def cached_tokens(self) -> int:
        return sum(c.feed.answer.reused for c in self._first_choices)

    @property
    def completion_tokens(self) -> int:
        return sum(c.told for c in self.choices)

    @property
    def _first_choices(self) -> list[Choice]:
        """The first choice of each prompt."""
        return list({id(c.prompt): c for c in reversed(self.choices)}.values())

    def usage(self, *, timed: bool = False) -> dict[str, Any]:
        """As chat completions tell it; timed: with Groq's times."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **(self.timing() if timed else {}),
        }

    def timing(self) -> dict[str, float]:
        """Groq's times in seconds, from the first choice's start to the last one's end."""
        answers = [c.feed.answer for c in self.choices]
        start = min(a.started_s for a in answers)
        worked = min((a.first_step_s for a in answers if a.first_step_s is not None), default=start)
        first = min(
            (a.first_token_s for a in answers if a.first_token_s is not None), default=worked
        )
        last = max((a.last_token_s for a in answers if a.last_token_s is not None), default=first)
        return {
            "queue_time": round(worked - start, 9),
            "prompt_time": round(first - worked, 9),
            "completion_time": round(last - first, 9),
            "total_time": round(last - worked, 9),
        }

    def receipt(self) -> dict[str, Any]:
        """What repeats the answers."""
        asked = self._structure.asked
        return receipt_of(
            self._service.model,
            [
                answered(
                    c.prompt,
                    c.feed.answer,
                    constraint=asked,
                    told=c.told,
                    finish_reason=c.finish_reason,
                )
                for c in self.choices
            ],
        )

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what is under way and count what was used; before the last part is sent."""
        if self._closed:
            return
        self._closed = True
        firsts = {choice.index for choice in self._first_choices}
        for choice in self.choices:
            choice.feed.cancel()
            self._service.metrics.observe_answer(
                choice.feed.answer, choice.finish_reason, counts_prompt=choice.index in firsts
            )
        if self.choices:
            counts = (self.prompt_tokens, self.cached_tokens, self.completion_tokens)
            self._caller.charge(self._service.model.name, *counts)
