"""In: command lines for the chip. Out: what `lpu compile`, `lpu sim` and `lpu explain` print."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat
from tiny_chat import write_tiny_chat

from openlpu import asm, knobs
from openlpu.cli import main
from openlpu.cli.compile import speed
from openlpu.engine.onchip import OnChip, facts
from openlpu.program import Loop, Param, Run, cycles

Lpu = Callable[..., tuple[int, str, str]]
SAMPLED = ("--temperature", "1", "--seed", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chip")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> str:
    return str(write_tiny_chat(folder / "tiny"))


@pytest.fixture
def lpu(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lpu:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lpu", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        cache = str(folder / "cache")
        with knobs.override(CACHE=cache, OFFLINE=True), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def program(lpu: Lpu, tiny: str, folder: Path) -> str:
    """The tiny model's program, compiled once."""
    path = folder / "tiny.lpu"
    if not path.exists():
        code, out, _ = lpu("compile", tiny, "--chip", "tiny", "-o", str(path))
        assert code == 0
        (folder / "told.txt").write_text(out)
    return str(path)


# -- what works ---------------------------------------------------------------------------------


def test_compile_tells_sizes_and_speed(
    lpu: Lpu,
    tiny: str,
    program: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, made = (folder / "told.txt").read_text(), asm.load(program)
    step = cycles(made, {"groups": (1,)})
    assert f"{step:,} cycles a step at full context" in out
    assert f"sha256 {asm.program_sha256(made)}" in out
    assert all(section.name in out for section in made.sections)
    monkeypatch.chdir(tmp_path)
    code, out, _ = lpu("compile", tiny, "--chip", "tiny", "--json")
    assert code == 0
    path = tmp_path / "tiny.lpu"  # the model's name, here
    assert path.read_bytes() == Path(program).read_bytes()
    report = json.loads(out)
    assert report["cycles"] == step
    assert report["tokens_per_s"] == pytest.approx(report["clock_hz"] / step)
    assert report["bytes"] == path.stat().st_size
    assert report["prompt_rows_per_s"] == report["tokens_per_s"]  # a row a step
    assert report["identity"] == facts(made).identity
    assert report["context"] == 256  # the model's own is less than the usual one
    assert report["used_bytes"] == sum(use["bytes"] for use in report["memory"])
    assert sum(s["runs"] * s["cycles"] for s in report["sections"]) == step
    assert lpu("check", str(path))[0] == 0


@pytest.mark.parametrize("machine", ["fast", "step"])
def test_sim_says_what_run_says(lpu: Lpu, tiny: str, program: str, machine: str) -> None:
    tokens = "2" if machine == "step" else "12"
    raw = ("--raw",) if machine == "step" else ()
    _, expected, _ = lpu("run", "Hi", "-m", tiny, "--max-tokens", tokens, *SAMPLED, *raw)
    words = ("sim", program, "--prompt", "Hi", "--tokens", tokens, "--machine", machine, *raw)
    code, out, err = lpu(*words, *SAMPLED, "--check-host")
    assert (code, out) == (0, expected)
    assert "as predicted in each of" in err
    assert "logits compared, 0 bits differ" in err
    assert "seed 5" in err
    if machine == "fast":
        assert lpu(*words, *SAMPLED)[1] == out


def test_sim_reports_as_json(lpu: Lpu, tiny: str, program: str) -> None:
    words = ("--tokens", "6", "--system", "Be brief.", "--json")
    code, out, _ = lpu("sim", program, "--prompt", "-", *words, "--check-host", stdin="Hi")
    assert code == 0
    report = json.loads(out)
    messages = ("--max-tokens", "6", "--system", "Be brief.", "--json")
    told = json.loads(lpu("run", "-", "-m", tiny, *messages, stdin="Hi")[1])
    assert report["text"] == told["text"]
    assert report["identity"] == told["identity"]
    step = cycles(asm.load(program), {"groups": (1,)})
    assert report["cycles"] == report["predicted_cycles"] == report["steps"] * step
    assert report["prompt"]["steps"] == told["stats"]["prompt_tokens"]
    assert report["answer"]["steps"] == report["steps"] - report["prompt"]["steps"]
    assert report["answer"]["tokens_per_s"] == pytest.approx(900e6 / step)
    assert report["check"]["logits"] == report["steps"] * 264
    assert report["check"]["differing_bits"] == 0
    assert report["simulation"]["cycles_per_s"] > 0


def test_sim_fails_on_one_bit(lpu: Lpu, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_step = OnChip.step

    def wrong(chip: OnChip, batch: Any) -> Any:
        logits = true_step(chip, batch)
        logits.view(np.int32)[-1, 3] ^= 1
        return logits

    monkeypatch.setattr(OnChip, "step", wrong)
    code, _, err = lpu("sim", program, "--prompt", "Hi", "--raw", "--tokens", "3", "--check-host")
    assert code == 1
    assert "4 bits differ" in err


def test_explain_fits_a_terminal(lpu: Lpu, program: str) -> None:
    code, out, err = lpu("explain", program)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 65
    made = asm.load(program)
    for section in made.sections:
        assert section.name in out
    assert "what binds: latency" in out
    assert "mJ a token decoded" in out
    assert "logits linear" in out
    plain = out
    code, out, _ = lpu("explain", program, "--json", "--params", "groups=1")
    report = json.loads(out)
    assert report["cycles"] == cycles(made, {"groups": (1,)})
    assert report["watts"] == pytest.approx(report["joules"] / report["seconds"])
    assert report["joules"] == pytest.approx(sum(report["energy_pj"].values()) / 1e12)
    least = report["least"]
    assert least["cycles"] == max(least["by"].values()) <= report["cycles"]
    assert f"at least {least['cycles']:,} cycles" in plain
    along = sum(one["least_cycles"] for one in least["operations"].values())
    assert along <= least["cycles"]  # of one layer
    assert least["operations"]["l0.attn"]["parts"] > 3
    for section in report["sections"]:
        added = [operation["added_cycles"] for operation in section["operations"]]
        assert min(added) >= 0
        assert 0 <= section["cycles"] - sum(added) < 100  # the last results are on their way


def test_speed_tells_decoding_from_reading() -> None:
    assert speed(1, 1, 0.5) == "decoding 2 tokens/s"
    assert speed(4, 4, 0.5) == "decoding 8 tokens/s, 4 a step"
    assert speed(64, 1, 0.5) == "decoding 2 tokens/s; reading prompts 128 rows/s, 64 a step"


def test_explain_takes_programs_of_no_model(lpu: Lpu, folder: Path) -> None:
    source = folder / "nothing.txt"
    source.write_text(_text_of_nothing())
    path = str(folder / "nothing.lpu")
    assert lpu("asm", str(source), "-o", path)[0] == 0
    code, out, _ = lpu("explain", path)
    assert code == 0
    assert "mJ a step" in out
    assert "tokens/s" not in out
    assert "compiled model" in lpu("sim", path, "--prompt", "Hi")[2]


def test_explain_tells_why_there_is_no_bound(lpu: Lpu, program: str, tmp_path: Path) -> None:
    made = dataclasses.replace(asm.load(program), tables={})
    asm.save(made, tmp_path / "bare.lpu")
    code, out, _ = lpu("explain", str(tmp_path / "bare.lpu"))
    assert code == 0
    assert "no lower bound: the program holds no graph" in out


@pytest.mark.parametrize("params", [(), (Param("groups", 1, 0, 0),)], ids=["none", "no groups"])
def test_explain_takes_any_parameters(
    lpu: Lpu, program: str, tmp_path: Path, params: tuple[Param, ...]
) -> None:
    made = dataclasses.replace(asm.load(program), params=params, plan=(Run(0),))
    asm.save(made, tmp_path / "odd.lpu")
    code, out, _ = lpu("explain", str(tmp_path / "odd.lpu"))
    assert code == 0
    assert "no lower bound: the parameters do not say" in out


@pytest.mark.parametrize("cycles_of_a_run", [0, 9])
def test_a_step_that_never_ends_is_one_line(
    lpu: Lpu, program: str, tmp_path: Path, cycles_of_a_run: int
) -> None:
    made = asm.load(program)
    first = dataclasses.replace(made.sections[0], cycles=cycles_of_a_run, issues=())
    plan: tuple[Run | Loop, ...] = (Run(0),)
    for var in "ijk":
        plan = (Loop(var, 1 << 30, plan),)
    path = str(tmp_path / "long.lpu")
    asm.save(dataclasses.replace(made, sections=(first, *made.sections[1:]), plan=plan), path)
    for words in (["explain", path], ["view", path]):
        code, out, err = lpu(*words)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "can be shown" in err


def _text_of_nothing() -> str:
    from openlpu.chip import load_chip
    from openlpu.program import Program, Section

    none = np.zeros((0, 32), np.int16)
    empty = Section("empty\x1b[31m", 5, ())
    return asm.dumps(Program("tiny", (empty,), (Run(0),), (), none, (), ()), load_chip("tiny"))


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compile", "/no/such"], "/no/such"),
        (["compile", "TINY", "--chip", "nope"], "no chip 'nope'"),
        (["compile", "TINY", "--chip", "tiny", "--context", "257"], "context is 257"),
        (["compile", "TINY", "--chip", "tiny", "--rows", "3", "--sequences", "2"], "multiple"),
        (["compile", "TINY", "--chip", "tiny", "--precision", "w9"], "precision is 'w9'"),
        (["compile", "TINY", "--chip", "tiny", "-o", "/no/such/x.lpu"], "no such folder"),
        (["compile", "TINY", "--chip", "tiny", "-o", "TINY"], "is no file; give another"),
        (["compile", "TINY", "--chip", "tiny", "-o", "TINY/model.safetensors"], "is no .lpu file"),
        (["sim", "PROGRAM"], "--prompt"),
        (["sim", "/no/such.lpu", "--prompt", "Hi"], "no such file"),
        (["sim", "PROGRAM", "--prompt", "Hi", "--machine", "steam"], "machine is 'steam'"),
        (["sim", "PROGRAM", "--prompt", "Hi", "--chip", "tsp_v1"], "not for 'tsp_v1'"),
        (["sim", "PROGRAM", "--prompt", "Hi", "--tokens", "0"], "max_tokens is 0"),
        (["sim", "PROGRAM", "--prompt", "Hi", "--raw", "--system", "x"], "--raw"),
        (["sim", "PROGRAM", "--prompt", "x" * 300], "context of 256"),
        (["sim", "PROGRAM", "--prompt", "", "--raw"], "no tokens"),
        (["sim", "PROGRAM", "--prompt", "Hi", "--model", "/no/such"], "/no/such"),
        (["explain", "PROGRAM", "--params", "groups=2"], "groups is 2"),
        (["explain", "TINY/config.json"], "no .lpu file"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    lpu: Lpu, tiny: str, program: str, words: list[str], message: str
) -> None:
    named = [word.replace("TINY", tiny).replace("PROGRAM", program) for word in words]
    code, out, err = lpu(*named)
    assert (code, out) == (2, "")
    *stages, fault = err.splitlines()
    assert fault.startswith("lpu: ")
    assert message in fault
    assert all(stage.endswith("...") for stage in stages)


def test_a_model_too_large_names_what_does_not_fit(
    lpu: Lpu, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_chat, "CONFIG", {**tiny_chat.CONFIG, "intermediate_size": 12288})
    wide = str(write_tiny_chat(folder / "wide"))
    code, out, err = lpu("compile", wide, "--chip", "tiny", "-o", str(folder / "wide.lpu"))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("lpu: weights ")
    assert "does not fit" in err
    assert "2,097,152 available" in err
    assert not (folder / "wide.lpu").exists()


def test_a_damaged_file_is_one_line(lpu: Lpu, program: str, tmp_path: Path) -> None:
    data = bytearray(Path(program).read_bytes())
    data[len(data) // 2] ^= 1
    for name, contents in (("flipped", data), ("cut", data[:-100]), ("short", data[:20])):
        path = tmp_path / f"{name}.lpu"
        path.write_bytes(contents)
        for words in (["sim", str(path), "--prompt", "Hi"], ["explain", str(path)]):
            code, out, err = lpu(*words)
            assert (code, out, len(err.splitlines())) == (2, "", 1)
            assert str(path) in err


def test_a_checkpoint_that_is_another_s_is_told(
    lpu: Lpu, tiny: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file, save_file

    other = write_tiny_chat(tmp_path / "other")
    words = ("sim", program, "--prompt", "Hi", "--tokens", "2", "--model")
    assert lpu(*words, str(other), "--check-host")[0] == 0  # a copy is as good
    arrays = load_file(other / "model.safetensors")
    save_file(
        {name: array[::-1].copy() for name, array in arrays.items()}, other / "model.safetensors"
    )
    code, _, err = lpu(*words, str(other), "--check-host")
    assert code == 2
    assert "other tensors" in err
    monkeypatch.setattr(tiny_chat, "CONFIG", {**tiny_chat.CONFIG, "vocab_size": 272})
    code, _, err = lpu(*words, str(write_tiny_chat(tmp_path / "more")))
    assert code == 2
    assert "has 272 tokens, the program 264" in err


def test_a_checkpoint_that_moved_is_told(lpu: Lpu, tiny: str, program: str, tmp_path: Path) -> None:
    path = str(tmp_path / "away.lpu")
    for checkpoint, message in (("/away", "--model names another"), ("", "give --model")):
        made = asm.load(program)
        meta = json.dumps({**json.loads(made.meta), "checkpoint": checkpoint})
        asm.save(dataclasses.replace(made, meta=meta), path)
        code, _, err = lpu("sim", path, "--prompt", "Hi")
        assert code == 2
        assert message in err
    assert lpu("sim", path, "--prompt", "Hi", "--tokens", "2", "--model", tiny)[0] == 0
