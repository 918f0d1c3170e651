"""In: jobs as worker.py reads them, or windows of tokens. Out: times and tokens, or losses.

All of them are those of llama.cpp.

Runs in the environment that has llama-cpp-python:

    python llama_worker.py MODEL.gguf THREADS
"""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from worker import serve

BATCH_TOKENS = 512
CELLS = 256  # llama.cpp pads a sequence's K/V to a multiple of this


class Worker:
    """One model, and a context for each number of sequences."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._context = cache(self._new_context)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def _new_context(self, sequences: int, cells: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * cells
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        # A K/V buffer for each sequence: in one buffer, each would be masked against all others.
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit("llama.cpp cannot make a context")
        return context

    def run(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Seconds of the prompts up to their last logits' argmax, then of the steps."""
        length = len(prompts[0])
        cells = -(-(length + steps) // CELLS) * CELLS
        context = self._context(len(prompts), cells)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        started_s = time.perf_counter()
        last = self._decode(context, rows, len(prompts)).argmax(1)
        prefill_s = time.perf_counter() - started_s
        tokens = [last]
        started_s = time.perf_counter()
        for position in range(length, length + steps):
            rows = [(int(token), position, i, True) for i, token in enumerate(last)]
            last = self._decode(context, rows, len(prompts)).argmax(1)
            tokens.append(last)
        decode_s = time.perf_counter() - started_s
        return {
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "tokens": np.stack(tokens, axis=1).tolist(),
        }

    def losses(self, windows: list[list[int]]) -> dict[str, Any]:
        """-ln of the softmax at each next token of each window, which has nothing before it."""
        context = self._context(1, -(-max(map(len, windows)) // CELLS) * CELLS)
        found: list[float] = []
        for window in windows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            for start in range(0, len(window) - 1, BATCH_TOKENS):
                stop = min(start + BATCH_TOKENS, len(window) - 1)
                rows = [(window[at], at, 0, True) for at in range(start, stop)]
                logits = self._decode(context, rows, len(rows)).astype(np.float64)
                top = logits.max(axis=1)
                sums = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
                chosen = logits[np.arange(len(rows)), window[start + 1 : stop + 1]]
                found += (sums - chosen).tolist()
        return {"losses": found}

    def answer(self, **job: Any) -> dict[str, Any]:
        """Either of them."""
        return self.losses(**job) if "windows" in job else self.run(**job)

    def _decode(
        self, context: Any, rows: list[tuple[int, int, int, bool]], wanted: int
    ) -> NDArray[np.float32]:
        """One llama_decode of rows (token, position, sequence, logits?): logits [wanted, V], until
        the next one."""
        batch = self._batch
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        found = llama_cpp.llama_get_logits(context)  # waits for the result
        address = ctypes.addressof(found.contents)
        buffer = (ctypes.c_float * (wanted * self._vocab_size)).from_address(address)
        return np.frombuffer(buffer, np.float32).reshape(wanted, -1)


def main() -> None:
    """Answer the lines of standard input; leave when it ends."""
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    about = {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }
    serve(about, worker.answer)


if __name__ == "__main__":
    main()
