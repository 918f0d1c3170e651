"""In: grammars by strangers. Out: for each why it cannot be compiled, or None; in bounded time.

Some grammars take for ever or all memory to compile, whatever limits the library is given. So a
process apart compiles each one first, with the service's limits of work and the system's limits of
memory and processor time. Where one is too much for it, the system ends that process, and the
service starts another. This file is also its program, run by path: it needs nothing of the package.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from typing import IO, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MEMORY_BYTES = 768 << 20
COMPILE_S = 2  # of processor time, at least; serious schemas take 0.1
WAIT_S = 30.0  # should the machine be so busy that the process gets no processor time
_TOO_MUCH = "it takes too long or too much memory to compile"


def parser_limits() -> LLParserLimits:
    """Work that a grammar may cause: a fraction of what the library allows by itself.

    Schemas of hundreds of alternatives and thousands of properties keep well below.
    """
    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=50_000,
        step_max_items=10_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        # Compiling then takes the same time with every vocabulary, so that this process can tell.
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


class Probe:
    """The service's end. Not thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def complaint(self, grammar: str) -> str | None:
        """Why the grammar cannot be compiled; None if it can. At most a few seconds."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process.stdout, time.monotonic() + WAIT_S)
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            self.close()
            return _TOO_MUCH
        complaint: str | None = json.loads(answer)
        return complaint

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __del__(self) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            # -P: the files beside this one are no modules for the program.
            self._process = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process


def _line(stream: IO[bytes], ends_s: float) -> bytes:
    """A line, or what came of it before the stream or the time ended."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, ends_s - time.monotonic()))
        piece = os.read(stream.fileno(), 1 << 16) if ready else b""
        if not piece:
            break
        line += piece
    return line


class _Bytes:
    """What LLTokenizer asks of a tokenizer: 256 tokens of one byte each, and an end."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256
    # To the library a leading 0xff marks a token that is no text; UTF-8 has no such byte.
    tokens = (*(bytes([byte]) for byte in range(255)), b"", b"\xff<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Answer each line, a grammar, with a line, the complaint, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary: Any = _Bytes()
    tokenizer = LLTokenizer(vocabulary, n_vocab=257, eos_token=256, slices=[])
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        ends_s = int(used.ru_utime + used.ru_stime) + COMPILE_S + 1
        resource.setrlimit(resource.RLIMIT_CPU, (ends_s, resource.RLIM_INFINITY))
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=parser_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        sys.stdout.write(json.dumps(matcher.get_error() or None) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
