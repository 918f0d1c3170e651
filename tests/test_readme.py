"""In: README.md. Out: its commands run, its Python runs, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import house
import pytest

README = (house.REPOSITORY / "README.md").read_text(encoding="utf-8")

# What keeps a command short here; .ci/run runs the set-up commands whole.
ADDED = {"run": ["--max-tokens", "8"], "compile": ["--effort", "1"]}

# Commands of minutes: here their options are only parsed, other tests run their parts.
PARSED_ONLY = ("verify", "bench")

TEXT_CHARACTERS = 1500


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def lpu_commands(page: str) -> list[str]:
    """Every `lpu` command in the page's shell blocks, each once."""
    found = {}
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "lpu" in words:
                words = words[words.index("lpu") :]
                end = words.index("&&") if "&&" in words else len(words)
                found[shlex.join(words[:end])] = None
                words = words[end:]
    return list(found)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that imports this tree, whatever is installed beside it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=house.REPOSITORY,
        input="",
        capture_output=True,
        text=True,
        timeout=200,
    )


def with_short_text(word: str, folder: Path) -> str:
    """The word; where it names a text file, a copy of the text's beginning."""
    source = house.REPOSITORY / word
    if source.suffix != ".txt" or not source.is_file():
        return word
    copy = folder / source.name
    copy.write_text(source.read_text(encoding="utf-8")[:TEXT_CHARACTERS], encoding="utf-8")
    return str(copy)


@pytest.fixture(scope="session")
def program_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the README, compiled for its chip."""
    assert smollm2_path.is_file()
    path = tmp_path_factory.mktemp("program") / "smollm2.lpu"
    command = ["compile", "smollm2", "--chip", "tsp_v1", "-o", str(path), *ADDED["compile"]]
    done = run_python("-c", "from openlpu.cli import main; main()", *command)
    assert done.returncode == 0, done.stderr
    return path


def in_folder(
    verb: str, words: list[str], folder: Path, request: pytest.FixtureRequest
) -> list[str]:
    """The words with files that a command writes in `folder`, and a program that it reads."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "-o":
            word = str(folder / word)
        elif word.endswith(".lpu") and verb != "compile":
            word = str(request.getfixturevalue("program_path"))
        found.append(word)
    return found


@contextmanager
def served(command: str, folder: Path) -> Iterator[str]:
    """The address of `lpu serve`, on any free port; it ends gently."""
    _, *words = shlex.split(command)
    words += ["--port", "0", "--data", str(folder), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from openlpu.cli import main; main()", *words],
        cwd=house.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize("command", [c for c in lpu_commands(README) if c.split()[1] == "serve"])
@pytest.mark.parametrize("code", blocks(README, "py"))
def test_a_client_is_served(command: str, code: str, smollm2_path: Path, tmp_path: Path) -> None:
    assert smollm2_path.is_file()
    with served(command, tmp_path) as url:
        assert "http://127.0.0.1:8000" in code
        told = code.replace("http://127.0.0.1:8000", url)
        done = run_python("-c", told.replace("answer.json", str(tmp_path / "answer.json")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "`lpu replay answer.json`" in README
    command = ["replay", str(tmp_path / "answer.json")]
    done = run_python("-c", "from openlpu.cli import main; main()", *command)
    assert done.returncode == 0, done.stderr
    assert "every bit agrees" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in lpu_commands(README) if c.split()[1] != "serve"])
def test_command_runs(
    command: str, smollm2_path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert smollm2_path.is_file()
    _, verb, *words = shlex.split(command)
    words = in_folder(verb, words, tmp_path, request)
    words = [with_short_text(word, tmp_path) for word in words] + ADDED.get(verb, [])
    if verb in PARSED_ONLY:
        words.append("--help")
    done = run_python("-c", "from openlpu.cli import main; main()", verb, *words)
    assert done.returncode == 0, done.stderr
    assert verb == "chat" or done.stdout.strip()


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_runs(code: str, smollm2_path: Path) -> None:
    assert smollm2_path.is_file()
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_first_two_blocks_are_the_set_up() -> None:
    """`.ci/run` runs these two, by their position."""
    first, second = (block.strip() for block in blocks(README, "sh")[:2])
    assert first.startswith("pip install . && lpu run ")
    assert second == "pip install '.[test]' && ./check"


def test_the_command_is_the_one_installed() -> None:
    project = tomllib.loads((house.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lpu": "openlpu.cli:main"}


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:|#)([^)#]+)", README))
def test_link_leads_somewhere(link: str) -> None:
    assert (house.REPOSITORY / link).exists()


def test_commands_are_found() -> None:
    block = 'pip install . && lpu run "a b" && lpu models  # all\nlpu eval \\\n  x\n'
    page = f"```sh\n{block}```\nlpu no\n"
    assert lpu_commands(page) == ["lpu run 'a b'", "lpu models", "lpu eval x"]
