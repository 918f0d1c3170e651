"""In: a TokenizerSource, and text or token ids. Out: token ids, or text, whole or as a stream.

Encoding is the `tokenizers` library's. Decoding is ours, by the bytes of each token, so that a
stream of tokens and the whole list give the same text, cut UTF-8 sequences included.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from openlpu.errors import CheckpointError, RequestError, UnsupportedModel
from openlpu.load.fields import one_line
from openlpu.load.source import TokenizerSource
from openlpu.load.vocab import MAX_TOKEN_CHARS, SPACE, GgufVocab, read_gguf_vocab

if TYPE_CHECKING:
    import tokenizers

MAX_FILE_BYTES: Final = 128 << 20


class Tokenizer:
    """Text to token ids and back. Safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        add_bos: bool,
        byte_level: bool,
        space_prefix: bool,
    ) -> None:
        """`byte_level`: tokens spell bytes as GPT-2 does, else as SentencePiece does.

        `space_prefix`: decoding drops one leading space, which encoding had put there.
        """
        self._backend = backend
        self._lock = threading.Lock()
        self._byte_level = byte_level
        self._added = backend.get_added_tokens_decoder()
        self.space_prefix = space_prefix
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.add_bos = add_bos and bos_id is not None
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_source(cls, source: TokenizerSource) -> Tokenizer:
        """Read the tokenizer of a checkpoint. Raises CheckpointError, UnsupportedModel."""
        if source.kind == "gguf":
            vocab = read_gguf_vocab(source.metadata)
            byte_level = source.metadata["tokenizer.ggml.model"] == "gpt2"
        else:
            assert source.folder is not None
            vocab, byte_level = _read_folder(source.folder, source)
        return cls(
            vocab.backend,
            bos_id=source.bos_id,
            eos_ids=source.eos_ids,
            add_bos=vocab.add_bos,
            byte_level=byte_level,
            space_prefix=vocab.space_prefix,
        )

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, BOS not added.

        Control tokens written out in the text, such as <|im_end|>, are recognized only with
        `special`; without it they are encoded letter by letter, as text of a user should be.
        Raises RequestError for text with lone surrogates, which has no UTF-8 form, and
        CheckpointError if the model's own regular expressions cannot cope with the text.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the text has lone surrogates, which UTF-8 cannot express") from None
        with self._lock, _explained("the model's tokenizer fails on this text"):
            self._backend.encode_special_tokens = not special
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a whole prompt: BOS comes first if the model wants it, but never twice."""
        ids = self.encode(text, special=special)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`; control tokens are left out unless `special`.

        Bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary (models pad their
        embedding tables) decode to nothing.
        """
        stream = Stream(self, special=special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, special: bool = False) -> Stream:
        """A decoder for tokens that come one by one."""
        return Stream(self, special=special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a control token stands for its name."""
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode()
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._byte_level:
            spelled = _byte_of_letter()
            try:
                return bytes([spelled[letter] for letter in token])
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(SPACE, " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token as text for people and templates; '' if there is none."""
        return self.token_bytes(token_id).decode(errors="replace")

    def is_control(self, token_id: int) -> bool:
        """Whether decoding leaves this token out."""
        added = self._added.get(token_id)
        return added is not None and bool(added.special)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, such as '<|im_end|>'."""
        found: int | None = self._backend.token_to_id(token)
        return found


class Stream:
    """Decodes tokens one by one. All pushes and the flush joined equal Tokenizer.decode."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.space_prefix

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; bytes of a cut character wait."""
        if not self._special and self._tokenizer.is_control(token_id):
            return ""
        return self._strip(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What was still waiting: U+FFFD for a character that never came whole."""
        return self._strip(self._utf8.decode(b"", True))

    def _strip(self, text: str) -> str:
        if not (text and self._at_start):
            return text
        self._at_start = False
        return text.removeprefix(" ")


def _read_folder(folder: Path, source: TokenizerSource) -> tuple[GgufVocab, bool]:
    """Read a tokenizer.json; returns it and whether it is byte-level."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; this model needs it") from None
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is too large for a tokenizer; fetch it again")
    with _explained(f"{path} is not a sound tokenizer"):
        backend = Backend.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
        # Llama 3 says that prompts start with BOS only here, in its post-processor.
        framed = backend.encode("a", add_special_tokens=True).ids
        added = backend.get_added_tokens_decoder().values()
    # Listing the other tokens would take longer than reading them; their length harms nobody.
    if any(len(token.content) > MAX_TOKEN_CHARS for token in added):
        raise CheckpointError(
            f"{path} has an added token of more than {MAX_TOKEN_CHARS:,} characters; it is damaged"
        )
    add_bos = source.add_bos or (source.bos_id is not None and framed[0] == source.bos_id)
    byte_level, space_prefix = _decoding(backend, path)
    return GgufVocab(backend, add_bos, space_prefix), byte_level


@contextlib.contextmanager
def _explained(complaint: str) -> Iterator[None]:
    """Turn what the library raises into one line of CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        # The library raises bare Exceptions, and panics that are not even Exceptions.
        raise CheckpointError(f"{complaint}: {one_line(error, 200)}") from None


def _decoding(backend: tokenizers.Tokenizer, path: Path) -> tuple[bool, bool]:
    """How tokens spell bytes, from the decoder: (byte-level?, drops a leading space?)."""
    decoder: Any = backend.decoder
    if decoder is None:
        raise UnsupportedModel(f"{path} has no decoder")
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return False, any(step["type"] == "Strip" and step["start"] for step in steps)
    if kinds == {"Metaspace"}:
        return False, state.get("prepend_scheme") != "never"
    names = ", ".join(sorted(kinds))
    raise UnsupportedModel(f"{path} decodes by {names}; supported are ByteLevel and SentencePiece")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
