"""In: programs, and damaged files of them. Out: .lpu files that read back as they were, or say why.

And what `lpu asm`, `lpu dis` and `lpu check` make of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_programs import SMALL, TINY, same, some_program
from random_programs import random_program

from openlpu.asm import container, contents, dumps, load, loads, program_sha256, save
from openlpu.cli import main
from openlpu.errors import ProgramError
from openlpu.program import Loop, Param, Run, Section, Segment

PATIENCE_S = 2.0


@pytest.mark.parametrize("seed", range(15))
def test_a_program_reads_back_from_its_file(seed: int, tmp_path: Path) -> None:
    program = some_program(seed)
    digest = save(program, tmp_path / "a.lpu")
    again = load(tmp_path / "a.lpu", TINY)
    assert same(again, program)
    assert program_sha256(program) == program_sha256(again) == digest
    save(again, tmp_path / "b.lpu")
    assert (tmp_path / "a.lpu").read_bytes() == (tmp_path / "b.lpu").read_bytes()
    save(again, tmp_path / "a.lpu")  # over the file that `again` maps
    assert same(load(tmp_path / "a.lpu"), again)


@pytest.mark.parametrize("seed", range(12))
def test_a_legal_program_reads_back_from_file_and_text(seed: int, tmp_path: Path) -> None:
    program, chip = random_program(seed)
    save(program, tmp_path / "p.lpu")
    again = load(tmp_path / "p.lpu", chip)
    assert same(again, program)
    assert same(loads(dumps(again, chip), chip, contents(again)), program)


def test_equal_programs_have_equal_files_and_others_have_not() -> None:
    digests = {program_sha256(some_program(seed)) for seed in range(8)}
    assert len(digests) == 8
    program = some_program(1)
    turned = replace(program, tables=dict(reversed(program.tables.items())))
    assert program_sha256(turned) == program_sha256(program)
    image = tuple(replace(s, data=np.asfortranarray(s.data)) for s in program.image)
    assert program_sha256(replace(program, image=image)) == program_sha256(program)
    assert program_sha256(replace(program, meta="{ }")) != program_sha256(program)


def test_the_image_is_mapped(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (1 << 17, 32), np.uint8)
    program = replace(SMALL, image=tuple(Segment(i, 0, data, "weights") for i in range(6)))
    save(program, tmp_path / "p.lpu")
    began_s = time.monotonic()
    again = load(tmp_path / "p.lpu")
    assert time.monotonic() - began_s < PATIENCE_S
    for segment in again.image:
        assert not segment.data.flags.writeable
        assert not segment.data.flags.owndata
        assert segment.data.ctypes.data % 64 == 0
    assert np.array_equal(again.image[5].data, data)


def test_every_cut_and_every_flip_is_seen(tmp_path: Path) -> None:
    save(SMALL, tmp_path / "p.lpu")
    whole = (tmp_path / "p.lpu").read_bytes()
    rng = random.Random(2)
    cuts = [whole[:size] for size in (0, 1, 63, 64, 65, len(whole) - 1, rng.randrange(len(whole)))]
    flips = []
    for at in [*range(64), *(rng.randrange(len(whole)) for _ in range(150))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        flips.append(bytes(damaged))
    for damaged in [*cuts, *flips, whole + b"\0"]:
        (tmp_path / "d.lpu").write_bytes(damaged)
        began_s = time.monotonic()
        with pytest.raises(ProgramError, match=r"d\.lpu: ") as caught:
            load(tmp_path / "d.lpu")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began_s < PATIENCE_S


def resigned(whole: bytes, change: Callable[[dict[str, Any]], None], path: Path) -> None:
    """The file with another header, its sizes and its digest right again."""
    size = int.from_bytes(whole[16:24], "little")
    header = json.loads(whole[64 : 64 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    data = whole[64 + size :]
    sizes = (1, len(text), 64 + len(text) + len(data))
    start = container.MAGIC + b"".join(number.to_bytes(8, "little") for number in sizes)
    path.write_bytes(start + hashlib.sha256(start + text + data).digest() + text + data)


def set_in(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a header: the value that stands at a path of keys; the last word is the value."""
    *keys, last, value = path

    def change(header: Any) -> None:
        for key in keys:
            header = header[key]
        header[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_in("chip", 3), "the chip is no text"),
        (set_in("extra", 3), "the header is no record"),
        (set_in("isa", "0"), "another instruction set"),
        (set_in("sections", {}), "sections is no list"),
        (set_in("sections", 0, "cycles", -1), "cycles is '-1'"),
        (set_in("sections", 0, "cycles", 1e3), "cycles is '1000.0'"),
        (set_in("sections", 0, "tags", ["a"]), "tag 1 is none of its 1"),
        (set_in("sections", 0, "queues", []), "bytes, its queues 0"),
        (set_in("sections", 0, "queues", 0, 1, 1 << 40), "the text of section 'layer' is"),
        (set_in("sections", 0, "queues", 1, 0, 19), "queue 19 stands twice"),
        (set_in("sections", 0, "text", "shape", [1 << 30]), "are not its place"),
        (set_in("sections", 0, "issue_tags", "shape", [1]), "are not its place|more issues than"),
        (set_in("maps", "at", 0), "are not its place"),
        (set_in("maps", "at", -64), "the maps is '-64'"),
        (set_in("maps", "type", "int32"), "an array of 'int32' with 2 axes is wrong"),
        (set_in("maps", "type", []), "is wrong here"),
        (set_in("maps", "shape", [96]), "an array of 'int16' with 1 axes is wrong"),
        (set_in("maps", "shape", [1 << 31, 1 << 31]), "the maps is '2147483648'"),
        (set_in("tables", "", "shape", [0] + 3 * [(1 << 31) - 1]), "with 4 axes is wrong here"),
        (set_in("maps", "shape", [2, 32]), "are not its place"),
        (set_in("image", 0, "slice", -1), "a segment's slice is '-1'"),
        (set_in("image", 0, "word", True), "a segment's word is 'True'"),
        (set_in("image", []), "are not its place"),
        (set_in("ports", 0, "direction", "up"), "port 'x' is neither in nor out"),
        (set_in("tables", []), "tables is no record"),
        (set_in("tables", {}), "its arrays end at byte"),
        (set_in("plan", 0, "section", 1), "a run's section is '1'"),
        (set_in("plan", 0, "bases", [[1, 2, 3]]), "a base is no list of 4"),
        (set_in("plan", 0, {"var": "i", "count": -1, "by": "", "body": []}), "a loop's count"),
        (set_in("params", 0, 1, "2"), "parameter 'n' is '2'"),
        (set_in("used", 0, 3, None), "a used range is 'None'"),
        (set_in("meta", {}), "meta is no text"),
    ],
)
def test_a_hostile_header_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    save(SMALL, tmp_path / "p.lpu")
    whole = (tmp_path / "p.lpu").read_bytes()
    resigned(whole, lambda header: None, tmp_path / "q.lpu")
    assert same(load(tmp_path / "q.lpu"), SMALL)
    resigned(whole, change, tmp_path / "q.lpu")
    with pytest.raises(ProgramError, match=rf"q\.lpu: .*({named})"):
        load(tmp_path / "q.lpu")


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys to every value inside a JSON value."""
    if path:
        yield path
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield from places_in(value[key], (*path, key))


def test_any_header_is_refused_or_a_program(tmp_path: Path) -> None:
    rng = random.Random(4)
    odd = [0, 1, -1, 64, 1 << 31, 1 << 63, True, None, 1.5, "", "i", "int64", [], {}, [[]], ["a"]]

    def damage(header: dict[str, Any]) -> None:
        *keys, last = rng.choice(list(places_in(header)))
        part: Any = header
        for key in keys:
            part = part[key]
        if rng.random() < 0.7:
            part[last] = rng.choice(odd)
        else:
            del part[last]

    for seed in range(4):
        save(some_program(seed), tmp_path / "p.lpu")
        whole = (tmp_path / "p.lpu").read_bytes()
        for _ in range(100):
            resigned(whole, damage, tmp_path / "q.lpu")
            began_s = time.monotonic()
            try:
                load(tmp_path / "q.lpu")
            except ProgramError as error:
                assert "\n" not in str(error)
            assert time.monotonic() - began_s < PATIENCE_S


def test_a_deep_header_is_refused(tmp_path: Path) -> None:
    save(SMALL, tmp_path / "p.lpu")
    whole = (tmp_path / "p.lpu").read_bytes()
    plan: list[Any] = []
    for _ in range(100):
        plan = [{"var": "i", "count": 1, "by": "", "body": plan}]
    resigned(whole, set_in("plan", plan), tmp_path / "q.lpu")
    with pytest.raises(ProgramError, match="loops deeper than 16"):
        load(tmp_path / "q.lpu")
    deep = b"[" * 64_000
    start = container.MAGIC + b"".join(n.to_bytes(8, "little") for n in (1, 64_000, 64_064))
    (tmp_path / "q.lpu").write_bytes(start + hashlib.sha256(start + deep).digest() + deep)
    with pytest.raises(ProgramError, match="its header is no JSON"):
        load(tmp_path / "q.lpu")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"maps": np.zeros((1, 32), np.int64)}, None),
        ({"maps": np.zeros(32, np.int16)}, "the maps"),
        ({"tables": {"x": np.array(["text"])}}, "table 'x'"),
        ({"tables": {"x": np.array([True])}}, "table 'x': an array of bool"),
        ({"plan": (Run(7),)}, "a run's section"),
        ({"plan": (Loop("i", -1, ()),)}, "a loop's count"),
        ({"params": (Param("n", 1, 0, 1 << 40),)}, "parameter 'n'"),
        ({"sections": (Section("s", -1, ()),)}, "cycles"),
        ({"used": (("x", 0, 0, 2.5),)}, "a used range"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(
    changes: dict[str, Any], named: str | None, tmp_path: Path
) -> None:
    with pytest.raises(ProgramError, match=named):
        save(replace(SMALL, **changes), tmp_path / "p.lpu")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.lpu"
    save(SMALL, path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProgramError, match=r"p\.lpu: no space left on device"):
        save(some_program(1), path)
    assert same(load(path), SMALL)
    assert list(tmp_path.iterdir()) == [path]


def test_only_files_are_read_and_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, named in (("pipe", "is no file"), ("nobody", "there is no such file")):
        with pytest.raises(ProgramError, match=named):
            load(tmp_path / name)
    for path in (tmp_path, Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(ProgramError, match="is no file"):
            save(SMALL, path)
    with pytest.raises(ProgramError, match="there is no such folder"):
        save(SMALL, tmp_path / "no" / "folder.lpu")
    precious, empty = tmp_path / "model.safetensors", tmp_path / "new.lpu"
    precious.write_bytes(b"weights")
    empty.touch()
    with pytest.raises(ProgramError, match=r"model\.safetensors: is there, and is no \.lpu file"):
        save(SMALL, precious)
    assert precious.read_bytes() == b"weights"
    save(SMALL, empty)
    assert same(load(empty), SMALL)


# -- commands ---------------------------------------------------------------------------------

Lpu = Callable[..., tuple[int, str, str]]

MOVE = """\
program tiny
segment mem.w2 word=5 words=1 weights hex {}
section move cycles=6
@0 mem.w2 read word=5 step=0 base=0 dst=e0
@4 mem.w0 write word=9 step=0 base=0 src=e0 take=1
plan
run move
""".format("07" * 32)


@pytest.fixture
def lpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lpu:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lpu", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def moving(lpu: Lpu, tmp_path: Path) -> Path:
    """The file of MOVE."""
    (tmp_path / "move.txt").write_text(MOVE)
    assert lpu("asm", tmp_path / "move.txt", "-o", tmp_path / "move.lpu")[0] == 0
    return tmp_path / "move.lpu"


def test_text_to_program_and_back(lpu: Lpu, tmp_path: Path) -> None:
    first, second, written = (tmp_path / name for name in ("a.lpu", "b.lpu", "a.txt"))
    digest = save(SMALL, first)
    code, out, _ = lpu("dis", first)
    assert code == 0
    written.write_text(out)
    code, _, err = lpu("asm", written, "-o", second)
    assert code == 2
    assert f"{written}: line 13: the contents" in err
    assert "are not at hand" in err
    assert not second.exists()
    code, out, err = lpu("asm", written, "-o", second, "--contents", first, "--json")
    assert (code, err) == (0, "")
    size = first.stat().st_size
    assert json.loads(out) == {"path": str(second), "bytes": size, "sha256": digest}
    assert second.read_bytes() == first.read_bytes()


def test_parts_of_a_program_are_shown(lpu: Lpu, moving: Path) -> None:
    head = "section move cycles=6\n"
    read, write = MOVE.splitlines(keepends=True)[3:5]
    assert lpu("dis", moving, "--section", "move")[1] == head + write + read
    assert lpu("dis", moving, "--queue", "mem.w2")[1] == head + read
    document = json.loads(lpu("dis", moving, "--queue", "mem.w2", "--json")[1])
    assert document["sections"] == [
        {
            "name": "move",
            "cycles": 6,
            "text_bytes": {"mem.w2": 7},
            "issues": [
                {
                    "queue": "mem.w2",
                    "cycle": 0,
                    "count": 1,
                    "period": 1,
                    "op": "read",
                    "fields": {"word": 5, "step": 0, "base": 0, "dst": 32},
                    "tag": "",
                }
            ],
        }
    ]
    assert document["image"][0]["sha256"] == hashlib.sha256(b"\7" * 32).hexdigest()


def test_check_says_what_was_proved(lpu: Lpu, moving: Path) -> None:
    code, out, err = lpu("check", moving)
    assert (code, err) == (0, "")
    assert out.startswith(f"{moving}: legal on tiny\n")
    assert "issues" in out
    found = json.loads(lpu("check", moving, "--json")[1])
    assert (found["sections"], found["issues"], found["events"]) == (1, 2, 2)
    assert found["sha256"] == program_sha256(load(moving))


def test_a_program_that_is_not_legal_is_one_line(lpu: Lpu, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(MOVE.replace("@4", "@5"))
    assert lpu("asm", tmp_path / "p.txt", "-o", tmp_path / "p.lpu")[0] == 0
    code, out, err = lpu("check", tmp_path / "p.lpu")
    assert (code, out) == (2, "")
    assert err.startswith(f"lpu: {tmp_path / 'p.lpu'}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["dis", "check"])
def test_damage_and_wrong_chips_are_one_line(command: str, lpu: Lpu, moving: Path) -> None:
    mine = moving.with_name("mine.lpu")
    save(replace(SMALL, chip="mine"), mine)
    broken = moving.with_name("broken.lpu")
    broken.write_bytes(moving.read_bytes()[:-1])
    for words, named in [
        ((moving, "--chip", "tsp_v1"), "the program is for the chip 'tiny', not for 'tsp_v1'"),
        ((moving, "--chip", "tyni"), "no chip 'tyni'"),
        ((mine,), "the program is for the chip 'mine'; give its file with --chip"),
        ((broken,), "it is damaged"),
        ((moving.with_name("none.lpu"),), "there is no such file"),
    ]:
        code, out, err = lpu(command, *words)
        assert (code, out) == (2, "")
        assert named in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--section", "x"), "has no section 'x'; it has: move"),
        (("--queue", "mem.w99"), "tiny has no queue 'mem.w99'"),
    ],
)
def test_a_part_that_is_not_there(
    words: tuple[str, str], named: str, lpu: Lpu, moving: Path
) -> None:
    code, _, err = lpu("dis", moving, *words)
    assert code == 2
    assert named in err


def test_a_text_that_is_none(lpu: Lpu, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    for raw, named in [
        (b"\xff", "is not UTF-8 text"),
        (b"", "the text is empty"),
        (b"?", "line 1"),
    ]:
        bad.write_bytes(raw)
        code, _, err = lpu("asm", bad, "-o", tmp_path / "p.lpu")
        assert code == 2
        assert err.startswith(f"lpu: {bad}: {named}")
    assert lpu("asm", tmp_path / "none.txt", "-o", tmp_path / "p.lpu")[0] == 2
    assert not (tmp_path / "p.lpu").exists()
    code, _, err = lpu("asm", tmp_path, "-o", tmp_path / "p.lpu")
    assert (code, err) == (2, f"lpu: {tmp_path}: is no file\n")
