"""In: what `run` opened. Out: Service, what all endpoints share, as app.state.service."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from openlpu.engine.model import Model
from openlpu.engine.sequence import token_ids
from openlpu.errors import LpuError, RequestError
from openlpu.load.template import ChatTemplate
from openlpu.numerics import CONTRACT
from openlpu.serve.errors import ApiError, api_error
from openlpu.serve.keys import KeyStore
from openlpu.serve.limits import Limits
from openlpu.serve.metrics import Metrics
from openlpu.serve.settings import Settings
from openlpu.serve.structured import Grammars
from openlpu.serve.tools import ToolPrompts
from openlpu.serve.usage import UsageStore
from openlpu.serve.worker import Worker

_LETTERS_PER_TOKEN = 64  # of nearly every vocabulary, a token has fewer


@dataclass
class Service:
    """One model, who runs it, and who counts."""

    model: Model
    worker: Worker
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    keys: KeyStore | None = None
    usage: UsageStore | None = None
    limits: Limits | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""

    def __post_init__(self) -> None:
        self.grammars = Grammars(
            self.model.tokenizer, vocab_size=self.model.compiled.config.vocab_size
        )
        # Beside the loop's own threads: compilations wait for each other, and prompts must not.
        self.compilers = ThreadPoolExecutor(4, thread_name_prefix="grammar")
        self.fingerprint = f"{CONTRACT}-{self.model.identity[:32]}"
        self.worker.observe_step = self.metrics.observe_step
        self.worker.observe_tokens = self.metrics.observe_tokens

    @property
    def names(self) -> tuple[str, ...]:
        """What the model may be called, its own name first."""
        return tuple(dict.fromkeys((self.model.name, *self.settings.aliases)))

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not here."""
        if name not in self.names:
            message = f"the model {name[:100]!r} does not exist here; see /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")

    @functools.cached_property
    def prompts(self) -> ToolPrompts:
        """Renders conversations. Raises RequestError for a model without a chat template."""
        source = self.model.checkpoint.chat_template
        if source is None:
            raise RequestError(f"{self.model.name} has no chat template; use /v1/completions")
        tokenizer = self.model.tokenizer
        bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
        eos = tokenizer.token_text(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
        return ToolPrompts(ChatTemplate(source, bos=bos, eos=eos))

    @functools.cached_property
    def _most_letters(self) -> int:
        """No text that is longer can be spelled by the tokens of one context."""
        tokenizer = self.model.tokenizer
        longest = max(
            (len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)), default=1
        )
        return self.model.context * longest

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a prompt. special: names of control tokens are these tokens, and the text
        has its beginning; else the model's first token is put before it, where it wants one.
        Raises RequestError, for a text so long that counting its tokens would take long, too."""
        model = self.model
        if len(text) > model.context * _LETTERS_PER_TOKEN and len(text) > self._most_letters:
            raise RequestError(_too_long(f"{len(text):,} characters", model.context))
        if special:
            return model.tokenizer.encode(text, special=True)
        return model.tokenize(text)

    async def prompts_of(self, make: Callable[[], list[list[int]]], param: str) -> list[list[int]]:
        """Prompts that a function makes, in a thread, for it may take long. param: which part of
        the request they come from. Raises ApiError for those that have no answer."""
        vocab_size, context = self.model.compiled.config.vocab_size, self.model.context
        try:
            prompts = await asyncio.to_thread(make)
            for prompt in prompts:
                token_ids(prompt, vocab_size=vocab_size)
        except LpuError as error:
            raise api_error(error, param) from None
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, f"{param} holds an empty prompt", param=param)
            if len(prompt) >= context:
                message = _too_long(f"{len(prompt):,} tokens", context)
                raise ApiError(400, message, param=param, code="context_length_exceeded")
        return prompts

    def close(self) -> None:
        """End what it started itself."""
        self.compilers.shutdown(cancel_futures=True)
        self.grammars.close()


def _too_long(what: str, context: int) -> str:
    return f"a prompt of {what} leaves no room in the context of {context:,} tokens; shorten it"
