"""In: receipts, honest, damaged and hostile. Out: what is said of them, and the exit codes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chat import write_tiny_chat

import openlpu
from openlpu import knobs
from openlpu.cli import main
from openlpu.engine.embed import embed
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request
from openlpu.engine.text import AnswerText
from openlpu.errors import RequestError
from openlpu.serve.receipt import (
    MOST_BYTES,
    Answered,
    Receipt,
    answered,
    embedded,
    read_receipt,
    receipt_of,
    replay,
)
from openlpu.serve.structured import Grammars
from openlpu.serve.tools import read_tools

SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "schema": {
            "type": "object",
            "properties": {"b": {"enum": [1.0, 2]}, "a": {"enum": ["yes", "no"]}},
            "required": ["b", "a"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path, cache: str) -> Iterator[openlpu.Model]:
    with knobs.override(CACHE=cache), openlpu.load(str(folder), threads=2) as loaded:
        yield loaded


def answer_of(
    model: openlpu.Model, sampling: Sampling, *, prompt: str = "Hi", **request: Any
) -> Answered:
    """Answered as the service does it, speculation and stop strings included."""
    ids = model.prompt_tokens(prompt)
    asked = request.pop("asked", None)
    ends = frozenset(model.tokenizer.eos_ids)
    answer = model.engine.submit(ids, sampling, Request(end_ids=ends, **request))
    told = text_stop(model, answer)
    if told is not None:
        return answered(ids, answer, constraint=asked, told=told, finish_reason="stop")
    return answered(ids, answer, constraint=asked)


def text_stop(model: openlpu.Model, answer: Answer) -> int | None:
    """Run it to its end, or up to a stop string: then the number of tokens it took."""
    text, told = AnswerText(model.tokenizer.stream(), stop=answer.sampling.stop), 0
    while True:
        done = answer.done
        for token in answer.generated[told:]:
            text.push(token)
            told += 1
            if text.stopped:
                answer.cancel()
                return told
        if done:
            return None
        model.engine.step()


@pytest.fixture(scope="module")
def honest(model: openlpu.Model) -> dict[str, Any]:
    """One of everything."""
    drawn = Sampling(temperature=1.3, top_p=0.95, top_k=50, seed=2**63 + 5, max_tokens=24)
    penalized = Sampling(
        temperature=0.7, seed=3, frequency_penalty=0.5, logit_bias=((65, 1.5),), max_tokens=16
    )
    plain = answer_of(model, Sampling(max_tokens=40, ignore_eos=True))
    stop = model.detokenize(plain.tokens)[12:14]
    prompts = [model.tokenize("one"), model.tokenize("another text")]
    return receipt_of(
        model,
        [
            plain,
            answer_of(model, Sampling(max_tokens=40, stop=(stop,), ignore_eos=True), logprobs=0),
            answer_of(model, drawn, logprobs=20),
            answer_of(model, penalized, logprobs=3),
            *constrained(model),
        ],
        [embedded(ids, row) for ids, row in zip(prompts, embed(model, prompts), strict=True)],
    )


def constrained(model: openlpu.Model) -> list[Answered]:
    grammars = Grammars(model.tokenizer, vocab_size=model.compiled.config.vocab_size)
    sampling = Sampling(temperature=1.0, seed=7, max_tokens=60)
    tools = read_tools(TOOLS, "required")
    assert tools is not None
    pairs: list[tuple[dict[str, Any], Any]] = [
        ({"regex": "[a-c]{3,9}!"}, grammars.constraint_for(None, regex="[a-c]{3,9}!")),
        ({"response_format": SCHEMA}, grammars.constraint_for(SCHEMA)),
        ({"tools": TOOLS, "tool_choice": "required"}, tools.constraint(grammars)),
    ]
    try:
        return [
            answer_of(model, sampling, constraint=constraint, asked=asked)
            for asked, constraint in pairs
        ]
    finally:
        grammars.close()


def text_of(receipt: dict[str, Any]) -> str:
    return json.dumps(receipt)


def forged(receipt: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A changed receipt whose sum is right again."""
    copy = json.loads(text_of(receipt))
    change(copy)
    return {**copy, "sha256": Receipt.model_validate_json(text_of(copy)).digest()}


# -- receipts that hold -----------------------------------------------------------------------


def test_an_honest_receipt_holds(model: openlpu.Model, honest: dict[str, Any]) -> None:
    found = replay(model, read_receipt(text_of(honest)))
    assert [part.same for part in found] == [True] * 9
    assert [part.kind for part in found] == ["answer"] * 7 + ["embedding"] * 2
    assert [part.tokens for part in found[:1]] == [40]
    assert found[1].finish_reason == "stop"
    assert 0 < found[1].tokens < 40
    assert json.loads(found[5].text)["a"] in ("yes", "no")
    assert found[6].text.startswith("<tool_call>")
    assert all(part.text for part in found[:7])


def test_a_receipt_holds_on_other_kernels_and_threads(
    folder: Path, cache: str, honest: dict[str, Any]
) -> None:
    with (
        knobs.override(CACHE=cache),
        openlpu.load(str(folder), threads=1, kernels="plain") as other,
    ):
        assert all(part.same for part in replay(other, read_receipt(text_of(honest))))


def test_the_form_of_the_json_does_not_count(honest: dict[str, Any]) -> None:
    """Other tools sort the names, and write 1 for 1.0."""
    text = json.dumps(honest, indent=3, sort_keys=True, ensure_ascii=False)
    text = text.replace(": 1.0,", ": 1,").replace(": 0.0,", ": 0,")
    assert ": 1.0," not in text
    assert read_receipt(text.encode()) == read_receipt(text_of(honest))


def test_a_cancelled_answer_is_repeated_as_far_as_it_came(model: openlpu.Model) -> None:
    ids = model.prompt_tokens("Hi")
    answer = model.engine.submit(ids, Sampling(max_tokens=50, ignore_eos=True))
    while len(answer.generated) < 5:
        model.engine.step()
    answer.cancel()
    found = replay(model, read_receipt(text_of(receipt_of(model, [answered(ids, answer)]))))
    assert [(part.same, part.tokens) for part in found] == [(True, len(answer.generated))]


# -- receipts that do not ---------------------------------------------------------------------


def other_token(receipt: dict[str, Any]) -> None:
    receipt["answers"][0]["tokens"][7] ^= 1


def shorter(receipt: dict[str, Any]) -> None:
    del receipt["answers"][0]["tokens"][30:]


def longer(receipt: dict[str, Any]) -> None:
    receipt["answers"][0]["tokens"].append(5)


def other_logprob(receipt: dict[str, Any]) -> None:
    entry = receipt["answers"][2]["token_logprobs"][3]
    entry[1] = float(np.nextafter(np.float32(entry[1]), np.float32(0)))


def finer_logprob(receipt: dict[str, Any]) -> None:
    entry = receipt["answers"][2]["token_logprobs"][3][2][1]
    entry[1] = float(np.nextafter(entry[1], 0))


def other_reason(receipt: dict[str, Any]) -> None:
    receipt["answers"][0]["finish_reason"] = "stop"


def other_seed(receipt: dict[str, Any]) -> None:
    receipt["answers"][2]["sampling"]["seed"] += 1


def other_prompt(receipt: dict[str, Any]) -> None:
    receipt["embeddings"][1]["prompt"][0] ^= 1


@pytest.mark.parametrize(
    ("change", "at", "difference", "logprobs"),
    [
        (other_token, 0, 7, 0),
        (shorter, 0, 30, 0),
        (longer, 0, 40, 0),
        (other_logprob, 2, None, 1),
        (finer_logprob, 2, None, 1),
        (other_reason, 0, None, 0),
        (other_seed, 2, ..., ...),
        (other_prompt, 8, ..., 0),
    ],
)
def test_what_differs_is_found(
    model: openlpu.Model,
    honest: dict[str, Any],
    change: Callable[[dict[str, Any]], object],
    at: int,
    difference: object,
    logprobs: object,
) -> None:
    with pytest.raises(RequestError, match="damaged"):
        changed = json.loads(text_of(honest))
        change(changed)
        read_receipt(text_of(changed))
    found = replay(model, read_receipt(text_of(forged(honest, change))))
    assert [part.same for part in found] == [i != at for i in range(9)]
    if difference is not ...:
        assert (found[at].first_difference, found[at].differing_logprobs) == (difference, logprobs)


# -- receipts that cannot be run --------------------------------------------------------------

BAD_VALUES: list[tuple[str, object]] = [
    ("format", "lpu-receipt-2"),
    ("model", None),
    ("model.name", 5),
    ("model.identity", "0" * 63 + "g"),
    ("model.context", 0),
    ("model.path", "/etc/passwd"),
    ("answers", {}),
    ("answers.0.prompt", []),
    ("answers.0.prompt", [1.5]),
    ("answers.0.prompt", [True]),
    ("answers.0.prompt", ["1"]),
    ("answers.0.prompt", [2**31]),
    ("answers.0.prompt", [1] * ((1 << 20) + 1)),
    ("answers.0.sampling.temperature", "hot"),
    ("answers.0.sampling.temperature", 1e999),
    ("answers.0.sampling.seed", 2**64),
    ("answers.0.sampling.unknown", 1),
    ("answers.0.logprobs", 21),
    ("answers.0.finish_reason", "because"),
    ("answers.0.constraint", {"regex": "a"}),
    ("answers.0.tokens", None),
]


@pytest.mark.parametrize(("place", "value"), BAD_VALUES)
def test_malformed_receipts_are_refused(honest: dict[str, Any], place: str, value: object) -> None:
    receipt = json.loads(text_of(honest))
    *path, last = place.split(".")
    part = receipt
    for name in path:
        part = part[int(name)] if name.isdigit() else part[name]
    part[last] = value
    with pytest.raises(RequestError, match="not a receipt") as caught:
        read_receipt(text_of(receipt))
    assert place.split(".")[0] in str(caught.value) or "JSON" in str(caught.value)
    assert "\n" not in str(caught.value)


def fewer_logprobs(receipt: dict[str, Any]) -> None:
    del receipt["answers"][2]["token_logprobs"][-1]


def more_logprobs(receipt: dict[str, Any]) -> None:
    receipt["answers"][2]["token_logprobs"].append([1, -0.5, []])


def made_up_logprobs(receipt: dict[str, Any]) -> None:
    receipt["answers"][2]["logprobs"] = None


def test_a_whole_answer_holds_its_receipt(honest: dict[str, Any]) -> None:
    answer = {"id": "x", "choices": [], "lpu_receipt": json.loads(text_of(honest))}
    assert read_receipt(json.dumps(answer)) == read_receipt(text_of(honest))
    with pytest.raises(RequestError, match="not a receipt"):
        read_receipt(json.dumps({"lpu_receipt": answer}))


def nothing(receipt: dict[str, Any]) -> None:
    receipt["answers"] = receipt["embeddings"] = []


@pytest.mark.parametrize("change", [fewer_logprobs, more_logprobs, made_up_logprobs, nothing])
def test_what_would_not_be_compared_is_refused(
    honest: dict[str, Any], change: Callable[[dict[str, Any]], object]
) -> None:
    receipt = json.loads(text_of(honest))
    change(receipt)
    with pytest.raises(RequestError, match=r"not a receipt: .*(log probability|no answer)"):
        read_receipt(text_of(receipt))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"answers":' * 50_000, b'"x"'],
)
def test_what_is_no_receipt_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError, match="not a receipt"):
        read_receipt(data)


def test_a_receipt_that_is_too_large_is_not_even_parsed() -> None:
    with pytest.raises(RequestError, match="larger than 32 MiB"):
        read_receipt(b" " * (MOST_BYTES + 1))


def put(place: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(receipt: dict[str, Any]) -> None:
        receipt["answers"][0][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("prompt", [264]), "outside 0 to 263"),
        (put("prompt", [1] * 256), "context of 256"),
        (lambda r: r["answers"][0]["sampling"].update(top_p=2.0), "top_p"),
        (lambda r: r["answers"][2]["sampling"].update(seed=None), "no seed"),
        (put("constraint", "{"), "cannot be read"),
        (put("constraint", '{"code": "x"}'), "cannot be read"),
        (put("constraint", '{"regex": 5}'), "no text"),
        (put("constraint", '{"regex": "("}'), "regex"),
        (put("constraint", '{"response_format": {"type": "x"}}'), "response_format"),
        (put("constraint", '{"tools": [5]}'), "tools"),
        (put("constraint", "[" * 200_000), "cannot be read"),
        (lambda r: r["embeddings"][0].update(vector="?"), "no base64"),
    ],
)
def test_what_cannot_be_run_is_told(
    model: openlpu.Model,
    honest: dict[str, Any],
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    with pytest.raises(RequestError, match=message):
        replay(model, read_receipt(text_of(forged(honest, change))))
    assert model.engine.sequences == 0


def test_another_contract_is_told(honest: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="this version computes lpu-1"):
        read_receipt(text_of(forged(honest, lambda r: r.update(contract="lpu-2"))))


# -- the command ------------------------------------------------------------------------------

Lpu = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lpu(cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lpu:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lpu", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        with knobs.override(CACHE=cache, OFFLINE=True), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_command_says_whether_the_bits_agree(
    lpu: Lpu, folder: Path, honest: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(text_of(honest))
    code, out, _ = lpu("replay", str(file), "--model", str(folder))
    assert (code, out.splitlines()[-1]) == (0, "every bit agrees")
    code, out, _ = lpu("replay", str(file), "-m", str(folder), "--threads", "1", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["same"], report["same_model"], len(report["parts"])) == (True, True, 9)

    file.write_text(text_of(forged(honest, other_token)))
    code, out, _ = lpu("replay", str(file), "--model", str(folder))
    assert code == 1
    assert "answer 0, 40 tokens: DIFFERENT, from token 7 on" in out
    assert out.splitlines()[-1] == "the receipt does not hold here"


def test_another_model_is_told(
    lpu: Lpu, folder: Path, honest: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(text_of(forged(honest, lambda r: r["model"].update(identity="0" * 64))))
    code, out, _ = lpu("replay", str(file), "--model", str(folder))
    assert code == 1
    assert "ANOTHER MODEL" in out
    code, out, _ = lpu("replay", str(file), "--model", str(folder), "--json")
    assert (code, json.loads(out)["same_model"]) == (1, False)


@pytest.mark.parametrize("name", ["tiny", "../models/tiny", "org/unknown", "smollm2\x1b[2J"])
def test_a_receipt_never_chooses_a_file(
    lpu: Lpu,
    folder: Path,
    honest: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Nor what is fetched: only the user does, or a name that can mean but one model."""
    file = tmp_path / "receipt.json"
    file.write_text(text_of(forged(honest, lambda r: r["model"].update(name=name))))
    monkeypatch.chdir(folder.parent)
    code, out, err = lpu("replay", str(file))
    assert (code, out) == (2, "")
    assert "--model" in err
    assert "\x1b" not in err


def test_a_folder_with_a_known_name_is_not_opened(
    lpu: Lpu, folder: Path, honest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(text_of(forged(honest, lambda r: r["model"].update(name="smollm2"))))
    (tmp_path / "smollm2").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert lpu("replay", str(file))[0] == 2


def test_files_that_are_no_receipts(lpu: Lpu, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    file.write_text("{}")
    for given in (str(file), str(tmp_path / "missing"), str(tmp_path)):
        code, out, err = lpu("replay", given)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
