"""In: command lines, good and bad. Out: what `lpu` prints where, its exit codes, its start-up."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import house
import numpy as np
import pytest
from tiny_chat import write_tiny_chat

from openlpu import knobs
from openlpu.cli import main
from openlpu.engine import verify
from openlpu.engine.batcher import Engine

Lpu = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lpu(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lpu:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*words: str, stdin: str = "", cache: Path = cache) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lpu", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        with knobs.override(CACHE=str(cache), OFFLINE=True), pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


# -- what works -------------------------------------------------------------------------------


def test_run_writes_the_answer_to_stdout(lpu: Lpu, tiny: str) -> None:
    options = ("--max-tokens", "12", "--temperature", "1", "--seed", "3")
    code, out, err = lpu("run", "-m", tiny, "Hi", *options, "--stats")
    assert code == 0
    assert out.endswith("\n")
    assert "seed 3" in err.splitlines()[-1]
    assert lpu("run", "-m", tiny, "-", *options, stdin="Hi")[1] == out
    code, document, _ = lpu("run", "-m", tiny, "Hi", *options, "--json")
    answer = json.loads(document)
    assert answer["text"] == out.removesuffix("\n") or answer["text"] == out
    assert answer["model"] == "tiny"
    assert len(answer["identity"]) == 64
    assert answer["stats"]["seed"] == 3
    assert answer["finish_reason"] in ("stop", "length")


def test_chat_talks_until_the_input_ends(lpu: Lpu, tiny: str) -> None:
    turns = "Hi\n/stats\n/help\n/what\n\n/reset\n/stats\nHi\n"
    code, out, err = lpu("chat", "-m", tiny, "--max-tokens", "5", stdin=turns)
    assert code == 0
    assert "tokens kept" in err
    assert "/reset" in err
    assert "/what is not known" in err
    assert "nothing was said yet" in err
    half = len(out) // 2
    assert out[:half] == out[half:]  # the same question after /reset, the same answer


def test_chat_survives_a_turn_that_is_too_long(lpu: Lpu, tiny: str) -> None:
    turns = f"{'x' * 400}\nHi\n/exit\nnever\n"
    code, out, err = lpu("chat", "-m", tiny, "--max-tokens", "3", stdin=turns)
    assert code == 0
    assert "context of 256" in err
    assert out


def test_an_interrupted_answer_stays_in_the_conversation(
    lpu: Lpu, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    true_step = Engine.step

    def step(engine: Engine) -> object:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return true_step(engine)

    monkeypatch.setattr(Engine, "step", step)
    code, _, err = lpu("chat", "-m", tiny, "--max-tokens", "9", stdin="Hi\n/stats\nHo\n/stats\n")
    assert code == 0
    answers = [line for line in err.splitlines() if "answer" in line]
    assert "answer 3 tokens" in answers[0]
    assert "kept)" in answers[1]


def test_a_bad_knob_is_one_line(lpu: Lpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPU_DEBUG", "loud")
    code, out, err = lpu("models")
    assert (code, out) == (2, "")
    assert err.startswith("lpu: LPU_DEBUG")


def test_eval_compares_engines(lpu: Lpu, tiny: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text, scored by three engines.")
    words = [w for name in ("float", "host", "reference") for w in ("--engine", name)]
    code, out, _ = lpu("eval", str(text), "-m", tiny, *words, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["host"]["mean_loss_nats"] == found["reference"]["mean_loss_nats"]
    assert found["float"]["scored_tokens"] == 37
    assert found["host"]["perplexity"] == pytest.approx(found["float"]["perplexity"], rel=0.1)
    code, out, _ = lpu("eval", str(text), "-m", tiny, "--tokens", "9", "--window", "4")
    assert code == 0
    assert "host" in out


def test_inspect_shows_passes_and_graph(lpu: Lpu, tiny: str) -> None:
    code, out, _ = lpu("inspect", tiny, "--no-time")
    assert code == 0
    assert "fuse_qkv" in out
    assert "rmsnorm_quant" in out
    assert "kernels" in out
    code, out, _ = lpu("inspect", tiny, "--stop", "quantize_w8", "--graph")
    assert code == 0
    assert out.startswith('graph "llama"')
    assert "rmsnorm_quant" not in out
    code, out, _ = lpu("inspect", tiny, "--stop", "fuse_qkv", "--json")
    stages = json.loads(out)["passes"]
    assert stages[0]["layer_1_row_us"] is None
    assert stages[-1]["layer_1_row_us"] > 0


def test_models_and_pull_name_what_is_there(lpu: Lpu, tmp_path: Path) -> None:
    code, out, err = lpu("models", cache=tmp_path)
    assert code == 0
    assert "smollm2" not in out
    assert "lpu pull" in err or "hub" in out
    assert json.loads(lpu("models", "--json", cache=tmp_path)[1]) == [] or "hub" in out
    code, out, err = lpu("pull", "smollm2", cache=tmp_path)
    assert (code, out) == (2, "")
    assert "LPU_OFFLINE" in err


def test_verify_prints_a_table_and_fails_on_one_bit(
    lpu: Lpu, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved_elsewhere = verify.Claim("", "", 0, 0, 0.0)
    for name in ("_random_models", "_packing", "_restart"):
        monkeypatch.setattr(verify, name, lambda *a, **k: proved_elsewhere)
    monkeypatch.setattr(verify, "KERNELS", ("plain",))
    code, out, _ = lpu("verify", tiny)
    assert code == 0, out
    assert out.splitlines()[-1].endswith("0 differ")
    true_rows = verify.rows_of

    def wrong(runner: object, compiled: object, tokens: list[int], piece: int = 512) -> object:
        rows = true_rows(runner, compiled, tokens, piece)  # type: ignore[arg-type]
        if piece == 7:
            rows.view(np.uint32)[0, 0] ^= 1
        return rows

    monkeypatch.setattr(verify, "rows_of", wrong)
    code, out, _ = lpu("verify", tiny, "--json")
    assert code == 1
    assert json.loads(out)["differing_bits"] == 1


def test_a_second_process_gives_the_same_bits(tiny: str, cache: Path) -> None:
    with knobs.override(CACHE=str(cache)):
        _, compiled = verify.open_model(tiny)
        host = compiled.host()
        rows = verify.rows_of(host, compiled, verify.random_tokens(30, 264, seed=30))
        host.close()
    environment = {**os.environ, "LPU_CACHE": str(cache)}
    code = "import sys; from openlpu.engine.verify import digest; digest(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, tiny, "w8", "30"],
        env=environment,
        cwd=house.REPOSITORY,
        capture_output=True,
        check=True,
    )
    import hashlib

    assert done.stdout == hashlib.sha256(rows.tobytes()).digest()


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "Hi", "--temperature", "-1"], "temperature is -1"),
        (["run", "Hi", "--temperature", "nan"], "temperature is nan"),
        (["run", "Hi", "--top-p", "0"], "top_p is 0"),
        (["run", "Hi", "--top-k", "few"], "--top-k"),
        (["run", "Hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["run", "Hi", "--seed", "-4"], "seed is -4"),
        (["run", "Hi", "--stop", ""], "stop"),
        (["run", "Hi", "--raw", "--system", "x"], "--raw"),
        (["run", "Hi", "--no-such"], "--no-such"),
        (["run"], "prompt"),
        (["fly"], "fly"),
        (["run", "Hi", "-m", "/no/such/file.gguf"], "/no/such/file.gguf"),
        (["run", "Hi", "-m", "TINY", "--precision", "w9"], "precision is 'w9'"),
        (["run", "Hi", "-m", "TINY", "--threads", "-1"], "threads is -1"),
        (["run", "Hi", "-m", "TINY", "--kernels", "mmx"], "mmx"),
        (["run", "x" * 300, "-m", "TINY"], "context of 256"),
        (["run", "", "--raw", "-m", "TINY"], "no tokens"),
        (["run", "Hi", "-m", ""], "name is empty"),
        (["verify", "/nope"], "/nope"),
        (["run", "Hi", "-m", "/no/\x1b[31mred\n"], "/no/\ufffd[31mred"),
        (["inspect", "TINY", "--stop", "fold_laundry"], "fold_laundry"),
        (["eval", "/no/such.txt"], "no such file"),
        (["eval", __file__, "--engine", "steam"], "steam"),
        (["run", "Hi", "-m", "org/model"], "LPU_OFFLINE"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    lpu: Lpu, tiny: str, words: list[str], message: str
) -> None:
    code, out, err = lpu(*[tiny if word == "TINY" else word for word in words])
    assert (code, out) == (2, "")
    # Whoever comes first in an empty cache is told of kernels being compiled.
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert lines[0].startswith("lpu: ")
    assert message.lower() in lines[0].lower()


def test_a_damaged_or_unknown_model_is_named(lpu: Lpu, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "mamba"}')
    for name, message in (("cut.gguf", "cut.gguf"), ("strange", "mamba")):
        code, out, err = lpu("run", "Hi", "-m", str(tmp_path / name))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err


def test_a_full_disk_is_one_line(
    lpu: Lpu, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = lpu("run", "Hi", "-m", tiny, cache=tmp_path)
    assert (code, out) == (2, "")
    assert "no space left" in err
    assert "LPU_CACHE" in err
    monkeypatch.undo()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_a_reader_that_leaves_ends_the_command_quietly(tiny: str, cache: Path) -> None:
    words = ["run", "-m", tiny, "Hi", "--max-tokens", "200", "--temperature", "1", "--seed", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "openlpu", *words],
        env={**os.environ, "LPU_CACHE": str(cache)},
        cwd=house.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def lpu_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'lpu() {{ "$PYTHON" -m openlpu "$@"; }}; {line}'],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd=house.REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("lpu run -m $TINY Hi --max-tokens 2 >/dev/full", 2, "lpu: standard output: no space"),
        ("lpu --help >/dev/full", 2, "lpu: standard output: no space"),
        ("lpu run -m $TINY Hi --max-tokens 2 >&-", 2, "lpu: standard output is closed"),
        ("lpu run -m $TINY - <&-", 2, "lpu: standard input is closed"),
        ("lpu run -m $TINY Hi --max-tokens 2 2>&- >/dev/null", 0, ""),
        ("lpu --help | true", 141, ""),
        ("LPU_DEBUG=1 lpu run -m /nope Hi", 2, "lpu: /nope"),
    ],
)
def test_odd_streams_are_one_line(
    tiny: str, cache: Path, line: str, code: int, message: str
) -> None:
    done = lpu_shell(line, TINY=tiny, LPU_CACHE=str(cache))
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == bool(message)


def test_debugging_shows_tracebacks_from_level_2(tiny: str) -> None:
    assert "LpuError" not in lpu_shell("lpu run -m /nope Hi", LPU_DEBUG="1").stderr
    assert "CheckpointError" in lpu_shell("lpu run -m /nope Hi", LPU_DEBUG="2").stderr


def test_an_interrupt_ends_the_command_with_130(
    lpu: Lpu, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openlpu.engine.model.open_checkpoint", interrupted)
    assert lpu("run", "Hi", "-m", tiny)[0] == 130


# -- how it starts ----------------------------------------------------------------------------


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=house.REPOSITORY, capture_output=True, text=True
    )


def processor_s(*words: str) -> float:
    """Processor time of a command, the least of three: a busy machine hardly changes it."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_and_import_are_quick() -> None:
    """0.3 s on a calm machine; neighbours on the same core may add half of that."""
    assert processor_s("-c", "import openlpu") < 0.45
    assert processor_s("-m", "openlpu", "--help") < 0.45


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys; sys.argv = ['lpu', '--help']\n"
        "from openlpu.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'llvmlite', 'tokenizers', 'jinja2', 'huggingface_hub'}\n"
        "sys.stderr.write(' '.join(heavy & set(sys.modules)))"
    )
    assert python("-c", code).stderr == ""


def test_the_version_is_the_package_s() -> None:
    import openlpu

    assert python("-m", "openlpu", "--version").stdout == f"lpu {openlpu.__version__}\n"
    project = (house.REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{openlpu.__version__}"' in project


def test_load_is_a_function_and_a_folder() -> None:
    code = (
        "import openlpu; first = openlpu.load\n"
        "from openlpu.load import checkpoint\n"
        "import openlpu.load.hub as hub\n"
        "assert openlpu.load is first and callable(openlpu.load)\n"
        "assert openlpu.load.checkpoint is checkpoint"
    )
    assert python("-c", code).stderr == ""
