"""In: a model's name or path. Out: Model: prompts to text, tokens to logits.

model = openlpu.load("smollm2")
print(model.generate("Why is the sky blue?"))
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.calibrate import has_blocks, in_blocks
from openlpu.engine.answer import Result, Stream
from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import (
    Compiled,
    Progress,
    as_precision,
    as_threads,
    compile_weights,
)
from openlpu.engine.evaluate import DEFAULT_WINDOW, Perplexity, perplexity
from openlpu.engine.runner import Runner
from openlpu.engine.sampling import Sampling, sampling_from
from openlpu.engine.sequence import Request, Sequence, token_ids
from openlpu.errors import NumericOverflow, RequestError
from openlpu.jit import select
from openlpu.load.checkpoint import Checkpoint, open_checkpoint
from openlpu.load.template import ChatTemplate
from openlpu.load.tokenizer import Tokenizer
from openlpu.store import Store

F32 = NDArray[np.float32]
Messages = Items[Mapping[str, Any]]
_SEED_BITS = 53  # any reader of JSON keeps so many
_LETTERS_PER_TOKEN = 64  # of nearly every vocabulary, a token has fewer


class Model:
    """A loaded model with one engine. Python threads may share it, each with streams of its own.

    Use it as a context manager, or call `close`, to give its memory back.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        compiled: Compiled,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        *,
        context: int | None = None,
    ) -> None:
        """context: most tokens of prompt and answer together; None means the model's own.
        tokenizer: made from the checkpoint if not given."""
        self.name = checkpoint.name
        self.checkpoint = checkpoint
        self.compiled = compiled
        self.runner = runner
        self.context = as_context(context, compiled)
        self.tokenizer = tokenizer or Tokenizer.from_source(checkpoint.tokenizer)
        self.engine = Engine(runner, context=self.context, vocab_size=compiled.config.vocab_size)
        self._template: ChatTemplate | None = None

    # -- text ---------------------------------------------------------------------------------

    def generate(self, prompt: str | Messages, *, raw: bool = False, **sampling: Any) -> Result:
        """The answer to a prompt, whole.

        prompt: text, which becomes a user's message if the model has a chat template, or messages
        ({"role": ..., "content": ...}). raw=True takes text as it is. sampling: see Sampling.
        Raises RequestError (unknown option, prompt too long), TemplateError, NumericOverflow.
        """
        return self.stream(prompt, raw=raw, **sampling).result()

    def stream(self, prompt: str | Messages, *, raw: bool = False, **sampling: Any) -> Stream:
        """The answer piece by piece: an iterator of str. See `generate`.

        Nothing is computed before the first piece is asked for; what is wrong with the request is
        raised here. Streams may run at the same time; each step serves all of them.
        """
        return self.answer(self.prompt_tokens(prompt, raw=raw), sampling_from(sampling))

    def answer(
        self, tokens: Items[int], sampling: Sampling, *, keep: Sequence | None = None
    ) -> Stream:
        """A stream of the answer to prompt tokens. keep: an open sequence to go on with."""
        sampling = sampling.seeded(secrets.randbits(_SEED_BITS))
        sequence = keep or self.engine.open()
        try:
            state = self.engine.ask(
                sequence, tokens, sampling, Request(end_ids=frozenset(self.tokenizer.eos_ids))
            )
        except BaseException:
            if keep is None:
                self.engine.close(sequence)
            raise
        return Stream(self.engine, sequence, state, self.tokenizer.stream(), closes=keep is None)

    def chat(self, messages: Messages) -> str:
        """The prompt text that the model's chat template makes of messages.

        Raises RequestError if the model has no template, TemplateError if the template fails.
        """
        if self._template is None:
            source = self.checkpoint.chat_template
            if source is None:
                raise RequestError(
                    f"{self.name} has no chat template; give a plain text prompt (raw)"
                )
            bos, *eos = (
                -1 if i is None else i for i in (self.tokenizer.bos_id, *self.tokenizer.eos_ids)
            )
            text = self.tokenizer.token_text
            self._template = ChatTemplate(source, bos=text(bos), eos=text(eos[0] if eos else -1))
        return self._template.render(messages)

    # -- tokens -------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: str | Messages, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt as `generate` sees it."""
        if isinstance(prompt, str):
            if raw or self.checkpoint.chat_template is None:
                return self.tokenize(self._bounded(prompt))
            messages: Messages = [{"role": "user", "content": prompt}]
        elif raw:
            raise RequestError("raw needs a text prompt; messages go through the chat template")
        else:
            messages = _as_messages(prompt)
        return self.tokenizer.encode(self._bounded(self.chat(messages)), special=True)

    def _bounded(self, text: str) -> str:
        """The text, unless so long that no tokens within the context can spell it: a hostile
        template makes megabytes, which would take the tokenizer long to refuse."""
        if len(text) > self.context * _LETTERS_PER_TOKEN:
            ids = range(self.tokenizer.vocab_size)
            longest = max((len(self.tokenizer.token_bytes(i)) for i in ids), default=1)
            if len(text) > self.context * max(longest, _LETTERS_PER_TOKEN):
                raise RequestError(
                    f"a prompt of {len(text):,} characters cannot fit the context of "
                    f"{self.context:,} tokens; shorten the prompt"
                )
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, begun with the model's first token where it wants one.

        Names of control tokens in the text are text.
        """
        if not isinstance(text, str):
            raise RequestError(f"the text is of type {type(text).__name__}; give a str")
        return self.tokenizer.encode_prompt(text, special=False)

    def detokenize(self, tokens: Items[int]) -> str:
        """The text of token ids. Raises RequestError for ids outside the vocabulary."""
        return self.tokenizer.decode(self._ids(tokens))

    def _ids(self, tokens: Items[int]) -> list[int]:
        return token_ids(tokens, vocab_size=self.compiled.config.vocab_size)

    def logits(self, tokens: Items[int], *, all_rows: bool = False) -> F32:
        """Logits after `tokens`: float32 [V] of the last one, or [T, V] of all.

        The same bits as at that position of any answer. Raises RequestError for ids outside the
        vocabulary or more tokens than the context, NumericOverflow for logits without bits.
        """
        sequence = self.engine.open()
        try:
            if all_rows:
                rows = np.concatenate(list(self.engine.score(sequence, tokens)))
            else:
                rows = self.engine.last_logits(sequence, tokens)
        finally:
            self.engine.close(sequence)
        if not np.isfinite(rows).all():
            raise NumericOverflow(f"{self.name}: logits are not finite; is the checkpoint damaged?")
        return rows

    def perplexity(self, text: str | Items[int], *, window: int = DEFAULT_WINDOW) -> Perplexity:
        """How well the model predicts text or tokens; see openlpu.engine.evaluate."""
        tokens = self.tokenize(text) if isinstance(text, str) else self._ids(text)
        return perplexity(self.engine, tokens, window=window)

    # -- life ---------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """Hex sha256 over contract, weights and graph: equal identities give equal bits."""
        return str(getattr(self.runner, "identity", ""))

    def close(self) -> None:
        """Give the engine's memory back. The model cannot be used afterwards."""
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _as_messages(prompt: object) -> Messages:
    if isinstance(prompt, Items) and all(isinstance(message, Mapping) for message in prompt):
        return prompt
    raise RequestError(
        f"the prompt is of type {type(prompt).__name__}; give text or a list of messages"
    )


def as_context(context: int | None, compiled: Compiled) -> int:
    """Most tokens of a sequence: as asked, or the model's own for None; RequestError if bad."""
    trained = compiled.graph.context
    if context is None:
        return trained
    if not isinstance(context, int) or not 1 < context <= trained:
        raise RequestError(f"context is {context!r}; give 2 to {trained:,}, the model's own")
    return context


def open_model(
    name_or_path: str,
    *,
    precision: str = "w8",
    stop: str = "",
    progress: Progress | None = None,
) -> tuple[Checkpoint, Compiled]:
    """Open a checkpoint, fetched if need be, and run the passes, all or up to `stop`.

    No tensor is read, but for w4 of a checkpoint without blocks, which are made once.
    """
    wanted = as_precision(precision)
    if not str(name_or_path or "").strip():
        raise RequestError("the model's name is empty; give a name such as smollm2, or a path")
    checkpoint = open_checkpoint(name_or_path, progress=progress)
    if wanted == "w4" and not has_blocks(checkpoint.weights):
        checkpoint = replace(checkpoint, weights=in_blocks(checkpoint, progress=progress))
    compiled = compile_weights(checkpoint.config, checkpoint.weights, precision=wanted, stop=stop)
    return checkpoint, compiled


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: it would look again and again at the 10**5 objects of a
    vocabulary, all of which stay, and that is a tenth of a start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def load(
    name_or_path: str = "smollm2",
    *,
    precision: str = "w8",
    threads: int | None = None,
    kernels: str | None = None,
    context: int | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model on the host engine: fetch, compile and pack it, or find it in the cache.

    name_or_path: `smollm2`, a .gguf file, a Hugging Face folder, or org/name of the hub.
    precision: w8 (8 bits, rotated) or w4 (the checkpoint's own blocks of 32). threads: None or 0
    means one per usable core. kernels: amx, avx512, avx2, neon, rvv or plain; None means the best
    there is; none of these changes a bit. context: most tokens of prompt and answer. progress:
    called with (stage, done, in all). Raises CheckpointError, DownloadError, StoreError,
    UnsupportedTarget, RequestError.
    """
    threads = as_threads(threads)
    select(kernels)
    checkpoint, compiled = open_model(name_or_path, precision=precision, progress=progress)
    context = as_context(context, compiled)
    with ThreadPoolExecutor(1) as pool:
        # The vocabulary is built while the weights are read: a start is some 30 ms shorter.
        tokenizer = pool.submit(Tokenizer.from_source, checkpoint.tokenizer)
        if not compiled.packed(Store()):
            tokenizer.result()  # a tokenizer that is not sound is told before minutes of packing
        runner = compiled.host(threads=threads, kernels=kernels, progress=progress)
        try:
            return Model(checkpoint, compiled, runner, tokenizer.result(), context=context)
        except BaseException:
            runner.close()
            raise
