"""In: the tokenizer.ggml.* metadata of a GGUF file. Out: a tokenizers.Tokenizer with the same ids.

Two kinds exist here. `gpt2` is byte-level BPE: the file holds the merges, and names its
pre-tokenizer, whose regular expression is not in the file but in the table below. `llama` is
SentencePiece BPE: the file holds a score per piece, from which the order of merges follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from openlpu.errors import CheckpointError, UnsupportedModel
from openlpu.load.fields import one_line

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENS: Final = 1 << 22
MAX_TOKEN_CHARS: Final = 1 << 10
"""Real vocabularies end at a few hundred, for runs of spaces."""
_MAX_SPLIT_CHARS = 1 << 28  # real ones copy 2**21 to 2**25 when their merges are sought
SPACE: Final = "\u2581"
"""SentencePiece writes a space as this character."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDING
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
) + _ENDING
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _ENDING,
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut into words before merging."""

    patterns: tuple[str, ...] = ()
    """Applied one after another; each match becomes a word of its own."""
    digits_alone: bool = False
    gpt2: bool = False
    """End with GPT-2's own expression, which the library has built in."""
    whole_words: bool = False
    """A word that is a token is taken as it is, whatever the merges say."""
    composed: bool = False
    """Text is brought to Unicode form NFC first."""
    add_bos: bool = False
    """Prompts start with BOS if the file does not say."""


_GPT2 = _Splitting(gpt2=True)
_GPT2_DIGITS = _Splitting(gpt2=True, digits_alone=True)
_LLAMA3_WORDS = _Splitting((_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2 = _Splitting((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), composed=True)
_GPT4O = _Splitting((_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"),))
_SPLITTINGS: Final = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _GPT2_DIGITS,
    "starcoder": _GPT2_DIGITS,
    "refact": _GPT2_DIGITS,
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "falcon3": _LLAMA3_WORDS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": _Splitting((_CASED % ("", "", ""),), whole_words=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "deepseek-v3": _Splitting(_DEEPSEEK3),
}


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """A tokenizer and what the file says about its use."""

    backend: tokenizers.Tokenizer
    add_bos: bool
    space_prefix: bool
    """SentencePiece: encoding puts a space first, and decoding takes it away."""


def read_gguf_vocab(metadata: Mapping[str, Any]) -> GgufVocab:
    """Build the tokenizer that GGUF metadata describes.

    Raises UnsupportedModel for a kind or a pre-tokenizer that is not implemented, CheckpointError
    for metadata that contradicts itself.
    """
    kind = _entry(metadata, "model", str, "")
    tokens = _list(metadata, "tokens", str)
    if len(tokens) > MAX_TOKENS:
        raise CheckpointError(f"tokenizer.ggml.tokens has {len(tokens):,} entries; the file is bad")
    if (longest := max(map(len, tokens), default=0)) > MAX_TOKEN_CHARS:
        raise CheckpointError(
            f"tokenizer.ggml.tokens has a token of {longest:,} characters, more than "
            f"{MAX_TOKEN_CHARS:,}; the file is bad"
        )
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
        space_prefix = False
    elif kind == "llama":
        space_prefix = _entry(metadata, "add_space_prefix", bool, True)
        backend, add_bos = _sentencepiece(metadata, tokens, space_prefix), True
    else:
        raise UnsupportedModel(
            f"tokenizer.ggml.model {kind[:40]!r} is not supported; supported are: gpt2, llama"
        )
    _add_special(backend, metadata, tokens)
    add_bos = _entry(metadata, "add_bos_token", bool, add_bos)
    return GgufVocab(backend, add_bos, space_prefix)


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    name = _entry(metadata, "pre", str, "default")
    splitting = _SPLITTINGS.get(name)
    if splitting is None:
        raise UnsupportedModel(
            f"pre-tokenizer {name[:40]!r} is not supported; supported are: {', '.join(_SPLITTINGS)}"
        )
    # A byte-level token holds no space, but the first character may be anything.
    pairs = [(text[: (at := text.find(" ", 1))], text[at + 1 :]) for text in _merges(metadata)]
    backend = _merge_tokenizer(tokens, pairs, ignore_merges=splitting.whole_words)
    if splitting.composed:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns
    ]
    if splitting.digits_alone:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.add_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], space_prefix: bool
) -> tokenizers.Tokenizer:
    from tokenizers import decoders, normalizers

    if metadata.get("tokenizer.ggml.precompiled_charsmap") is not None:
        raise UnsupportedModel("SentencePiece normalization (precompiled_charsmap) is unsupported")
    scores = _list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.scores has {len(scores):,} entries for {len(tokens):,} tokens"
        )
    kinds = _kinds(metadata, tokens)
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    backend = _merge_tokenizer(
        tokens,
        _merges_of_scores(tokens, scores, kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    # A space is put first even before a space, as SentencePiece does; Metaspace would not.
    prefix: list[Any] = [normalizers.Prepend(SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to make a piece out of two, best score first, as SentencePiece merges.

    Control, unknown and byte pieces are never made of text. Raises CheckpointError for tokens so
    long and many that this would not end soon: the work grows with the squares of their lengths.
    """
    if sum(len(token) ** 2 for token in tokens) > _MAX_SPLIT_CHARS:
        raise CheckpointError("tokenizer.ggml.tokens has too many long tokens; the file is bad")
    score_of = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind not in (_CONTROL, _UNKNOWN, _BYTE)
    }
    return [
        (token[:at], token[at:])
        for token in sorted(score_of, key=score_of.__getitem__, reverse=True)
        for at in range(len(token) - 1, 0, -1)
        if token[:at] in score_of and token[at:] in score_of
    ]


def _merge_tokenizer(
    tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    """Straight from lists: twice as fast as reading the same tokenizer from a tokenizer.json."""
    from tokenizers import Tokenizer, models

    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as error:
        # The library raises bare Exceptions, for instance when a merge makes no token.
        raise CheckpointError(
            f"the tokenizer's merges are damaged: {one_line(error, 200)}"
        ) from None


def _add_special(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> None:
    """Make control tokens special, and user-defined ones whole but ordinary."""
    from tokenizers import AddedToken

    control, defined = [], []
    for token, kind in zip(tokens, _kinds(metadata, tokens), strict=True):
        if token and kind == _CONTROL:
            control.append(AddedToken(token, special=True, normalized=False))
        elif token and kind == _USER_DEFINED:
            defined.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(control)
    backend.add_tokens(defined)


def _kinds(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Sequence[int]:
    kinds = _list(metadata, "token_type", int, optional=True) or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.token_type has {len(kinds):,} entries for {len(tokens):,} tokens"
        )
    return kinds


def _merges(metadata: Mapping[str, Any]) -> list[str]:
    merges: list[str] = _list(metadata, "merges", str)
    return merges


def _entry(metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, kind):
        raise CheckpointError(f"tokenizer.ggml.{key} is not a {kind.__name__}; the file is bad")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type, *, optional: bool = False) -> Any:
    """A list of one kind; numpy arrays of numbers are turned into lists."""
    value: Any = metadata.get(f"tokenizer.ggml.{key}")
    if value is None and optional:
        return []
    entries = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(entries, (list, tuple)) or not set(map(type, entries)) <= {kind}:
        raise CheckpointError(
            f"the file has no sound tokenizer.ggml.{key}; it should list {kind.__name__} values"
        )
    return entries
