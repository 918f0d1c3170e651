"""In: random and damaged programs. Out: bits and text read back as they were, or say why."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from any_programs import IN_SECTIONS, SMALL, TINY, same, some_program, some_section

from openlpu.asm import binary, contents, dumps, loads, text
from openlpu.asm.operands import Names
from openlpu.errors import ProgramError
from openlpu.isa import OPCODES, units
from openlpu.program import Issue, Loop, Section

# -- bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(15))
def test_a_section_reads_back_from_its_bits(seed: int) -> None:
    section = some_section(random.Random(seed), "s", 300)
    texts = binary.encode(section, TINY)
    tags = [issue.tag for issue in section.issues]
    again = binary.decode(texts, "s", section.cycles, section.tags, tags, TINY)
    assert again == section
    assert binary.encode(again) == texts
    assert binary.text_bytes(section, TINY) == {queue: len(t) for queue, t in texts.items()}


@pytest.mark.parametrize("kind", IN_SECTIONS, ids=lambda kind: kind.name)
def test_fields_lie_one_above_the_other(kind: Any) -> None:
    zero = [0] * len(kind.fields)
    at = 8
    for number, field in enumerate(kind.fields):
        for bit in range(field.bits):
            value = 1 << bit
            if field.signed and bit == field.bits - 1:
                value = -value
            args = [*zero[:number], value, *zero[number + 1 :]]
            word = int.from_bytes(binary.pack(kind.name, args), "little")
            assert word == OPCODES[kind.name] | 1 << (at + bit)
        for value in (-1 - (1 << (field.bits - 1)) * field.signed, 1 << field.bits):
            with pytest.raises(ProgramError, match=f"{kind.name}: {field.name} is {value}, not"):
                binary.pack(kind.name, [*zero[:number], value, *zero[number + 1 :]])
        at += field.bits
    assert binary.size_bytes(kind.name) == -(-at // 8)


def test_time_is_written_by_nop_and_repeat() -> None:
    read, write = (3, 0, 0, 0), (9, 0, 0, 0, 0)

    def text_of(*issues: Issue) -> str:
        return binary.encode(Section("s", 10, issues), TINY)[0].hex()

    def nop(cycles: int) -> str:
        return "0e" + cycles.to_bytes(2, "little").hex()

    a = binary.pack("read", read).hex()
    b = binary.pack("write", write).hex()
    assert a == "00030000000000"
    assert text_of(Issue(0, 0, "read", read)) == a
    assert text_of(Issue(1, 0, "read", read)) == nop(1) + a
    assert text_of(Issue(65_535, 0, "read", read)) == nop(65_535) + a
    assert text_of(Issue(65_536, 0, "read", read)) == nop(65_535) + nop(1) + a
    assert text_of(Issue(0, 0, "read", read), Issue(0, 0, "write", write)) == a + nop(0) + b
    assert text_of(Issue(0, 0, "read", read), Issue(1, 0, "write", write)) == a + b
    repeated = Issue(0, 0, "read", read, 4, 3)
    assert text_of(repeated, Issue(2, 0, "write", write)) == a + "0f03000300" + nop(1) + b


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the text is empty"),
        ("63", "byte 0: opcode 99 is unknown"),
        ("000300", "byte 0: read is cut short"),
        ("000300000000ff", "byte 0: read: the bits above its fields are not zero"),
        ("0e0000", "byte 0: a nop of 0 stands after a nop or at the beginning"),
        ("0e0100", "byte 0: the text ends with a nop"),
        ("0e01000e0100" + "00" * 7, "byte 3: a nop follows one that is not full"),
        ("00" * 7 + "0e0100", "byte 7: the text ends with a nop"),
        ("0f01000100", "byte 0: repeat is no instruction of a section"),
        ("00" * 7 + "0f00000100", "byte 7: repeat: count or period is 0"),
        ("00" * 7 + "0f0100", "byte 7: repeat is cut short"),
        ("11", "byte 0: sync is no instruction of a section"),
        ("06", "byte 0: install is no instruction of this queue"),
        ("01" + "00" * 6 + "0e0000" + "00" * 7, "byte 10: the instructions of one cycle are not"),
        ("0effff" * 40_000 + "00" * 7, "byte 120000: cycle 2,621,400,000 is beyond"),
    ],
)
def test_a_fault_in_a_text_is_named_with_its_byte(text: str, named: str) -> None:
    with pytest.raises(ProgramError, match=rf"section 's', queue mem\.w0.*{named}"):
        binary.decode({0: bytes.fromhex(text)}, "s", 10, chip=TINY)


def test_damaged_bits_are_an_error_or_another_section() -> None:
    rng = random.Random(5)
    texts = binary.encode(some_section(rng, "s", 100), TINY)
    began_s = time.monotonic()
    read_back = 0
    for _ in range(1500):
        queue, text = rng.choice(list(texts.items()))
        damaged = bytearray(text[: rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text)
        for _ in range(rng.randrange(3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.choice([0, 14, 15, rng.randrange(256)])
        try:
            section = binary.decode({queue: bytes(damaged)}, "s", 10, chip=TINY)
        except ProgramError:
            continue
        read_back += 1
        assert binary.encode(section) == {queue: damaged}
    assert read_back > 100
    assert time.monotonic() - began_s < 10


def test_many_short_instructions_are_bounded() -> None:
    text = b"\x06" * (binary.MOST_ISSUES // 64)
    texts = {units(TINY).load + 3 * plane: text for plane in range(4)}
    assert len(binary.decode(texts, "s", 10, chip=TINY).issues) == 4 * len(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "MOST_ISSUES", 3 * len(text))
        with pytest.raises(ProgramError, match="more than"):
            binary.decode(texts, "s", 10, chip=TINY)


FIRST = Issue(5, 0, "read", (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("issues", "named"),
    [
        ([replace(FIRST, op="jump")], "there is no instruction 'jump'"),
        ([replace(FIRST, args=(1,))], "read has 4 fields, not 1"),
        ([replace(FIRST, args=(70_000, 0, 0, 0))], "read: word is 70000, not 0 to 65535"),
        ([replace(FIRST, queue=32)], "queue mxm0.load @5: read is no instruction of this queue"),
        ([replace(FIRST, queue=999)], "tiny has no queue 999"),
        ([replace(FIRST, queue=-1)], "the queue is negative"),
        ([replace(FIRST, cycle=-1)], "the cycle is not 0 to"),
        ([replace(FIRST, cycle=1 << 40)], "the cycle is not 0 to"),
        ([replace(FIRST, count=0)], "count is 0, not 1 to 65536"),
        ([replace(FIRST, count=2, period=0)], "period is 0, not 1 to 65535"),
        ([replace(FIRST, period=2)], "it is 1 for an issue without repetitions"),
        ([replace(FIRST, tag=1)], "tag 1 is none of the section's 1"),
        ([replace(FIRST, op="sync", args=())], "sync is no instruction of a section"),
        ([FIRST, replace(FIRST, cycle=3)], "not sorted by queue, cycle, op and args at queue 0 @3"),
    ],
)
def test_what_cannot_be_written_is_said(issues: list[Issue], named: str) -> None:
    with pytest.raises(ProgramError, match=re.escape(named)):
        binary.encode(Section("s", 10, tuple(issues)), TINY)


# -- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(15))
def test_a_program_reads_back_from_its_text(seed: int) -> None:
    program = some_program(seed)
    at_hand = contents(program)
    for inline_bytes in (0, text.INLINE_BYTES, 1 << 20):
        written = dumps(program, TINY, inline_bytes=inline_bytes)
        again = loads(written, TINY, at_hand if inline_bytes < 1 << 20 else None)
        assert same(again, program)
        assert dumps(again, TINY, inline_bytes=inline_bytes) == written


def test_the_text_can_be_read() -> None:
    lines = dumps(SMALL, TINY).splitlines()
    assert lines[0] == "program tiny"
    assert "@120 x16/1 mem.e3 read word=12 step=1 base=2 dst=e5 tag=1 ; l0.qkv" in lines
    assert "@9 alu0 add e4:4.take, alu3[-2] -> w0:4 e8:4" in lines
    assert "map 0..31" in lines
    assert "map -1*32" in lines
    assert lines[-2:] == ["plan", "run layer"]


@pytest.mark.parametrize(
    ("op", "args", "written"),
    [
        ("mov", (5, 0, 0, 0, 0, 0, 0x3F800000, 1, 1, 0), "#0x3f800000 -> w0:1"),
        ("mov", (5, 0, 0, 0, 0, 0, -1, 0, 0, 0), "#0xffffffff"),
        ("sel", (4, 0, 1, 2, 2, 67, 0, 2, 0, 3), "alu0[0], w1:1, e1:2.take -> e2:2"),
        ("load", (0, 1, 16, 1, 3), "group=0 step=1 src=w16 row=1 mode=s4_low"),
        ("install", (), ""),
        ("shift", (40, 0, 0, 1, -5), "src=e8 dst=w0 wide=0 take=1 amount=-5"),
        # What has no short form is written by its fields.
        (
            "mov",
            (1, 0, 0, 0, 0, 0, 7, 0, 0, 0),
            "a_from=1 a_at=0 b_from=0 b_at=0 c_from=0 c_at=0 imm=7 width=0 west=0 east=0",
        ),
    ],
)
def test_operands_are_written_so(op: str, args: tuple[int, ...], written: str) -> None:
    assert Names(TINY).operands(op, args) == written
    assert Names(TINY).args(op, written) == args


def test_the_example_of_the_manual_is_a_program() -> None:
    doc = inspect.cleandoc(text.__doc__ or "").split("\n\n")[1]
    example = doc.replace("sha256 0c3f...", "hex " + "00" * 512).replace("00ff...", "00ff" * 64)
    program = loads(example, TINY)
    assert program.sections[0].issues[0] == Issue(120, 19, "read", (12, 1, 2, 37), 16, 1, 1)
    assert program.plan[0] == Loop(
        "l", 30, (Loop("c", "context", program.plan[0].body[0].body, "l"),)
    )  # type: ignore[union-attr]
    assert same(loads(dumps(program, TINY, inline_bytes=512), TINY), program)


SAID = dumps(SMALL, TINY, inline_bytes=1 << 20)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("program tiny", "program tsp_v1", "line 1: the program is for 'tsp_v1', not for 'tiny'"),
        ("program tiny\n", "", "line 1: .*begins with `program` and a chip"),
        ("map 0..31", "map 0..30", "these are 31 numbers, not 32"),
        ("map 0..31", "map 0..2000000000", "these are not 32 numbers"),
        ("map 0..31", "map 40000*32", "a map holds int16 numbers"),
        ("map -1*32", "map -1*2000000000", "these are not 32 numbers"),
        ("segment mem.", "segment mom.", "a slice is missing at column 9"),
        ("words=40", "words=41", "1,312 bytes are 2,624 digits, not 2,560"),
        ("words=40", "words=-1", "-32 bytes"),
        ("int8[0,4]", "int8[0" + 3 * ",2147483647" + "]", "a table cannot have the shape"),
        ("port in", "port at", "a port is in or out, not 'at'"),
        ("section layer", "section", "'cycles=' is missing at column 15"),
        ("@120 x16/1", "@120 x16/1/1", "an issue is `@cycle"),
        ("@120 x16/1", "@120 x16", "tiny has no queue 'x16'"),
        ("@120 ", "@99999999999999 ", "the cycle is not 0 to"),
        ("x16/1", "x1/2", "it is 1 for an issue without"),
        ("mem.e3 read", "mem.e99 read", "tiny has no queue 'mem.e99'"),
        ("mem.e3 read", "mem.e3 sync", "'sync' is no instruction of a section"),
        ("mem.e3 read", "mem.e3 jump", "'jump' is no instruction of a section"),
        (" step=1 base", " base", "read lacks step"),
        (" step=1 base", " step=1 step=1 base", "'step=1' is no field of read, or stands twice"),
        (" step=1 base", " stop=1 base", "'stop=1' is no field of read"),
        ("word=12 step", "word=70000 step", "read: word is 70000, not 0 to 65535"),
        ("dst=e5", "dst=e32", "tiny has no stream 'e32'"),
        ("tag=1", "tag=2", "tag 2 is none of the section's 2"),
        ("e4:4.take", "e4:3.take", "'e4:3.take' is no operand"),
        ("alu3[-2]", "alu3[-64]", "a delay is at most 63 cycles"),
        ("alu3[-2]", "#0x1, #0x2", "one constant"),
        ("-> w0:4 e8:4", "-> w0:4 w8:4", "'w8:4' is no result"),
        ("-> w0:4 e8:4", "->", "no result stands after ->"),
        ("run layer", "run lawyer", "no section above has this name or number"),
        ("run layer", "run 1", "no section above has this name or number"),
        ("run layer", "run layer mem.e3=4", r"'\.r' is missing"),
        ("run layer", "end", "there is no loop to end"),
        ("run layer", "loop i count=3\nrun layer", "the loop 'i' has no end"),
        ("run layer", "loop i count=3\n" * 17, "loops are at most 16 deep"),
        ("run layer", "run layer x", "a slice is missing at column 11"),
        ("plan", "plane", "a line cannot begin with 'plane'"),
        ("plan\n", "plan\nplan x\n", "unexpected text at column 6"),
        ("hex ", "sha256 " + "0" * 64 + " ; ", "the contents 0{64} are not at hand"),
    ],
)
def test_a_fault_is_named_with_its_line(old: str, new: str, named: str) -> None:
    assert old in SAID
    with pytest.raises(ProgramError, match=named) as caught:
        loads(SAID.replace(old, new, 1), TINY)
    assert "\n" not in str(caught.value)


def test_wrong_contents_are_refused() -> None:
    written = dumps(SMALL, TINY, inline_bytes=0)
    at_hand = contents(SMALL)
    key = hashlib.sha256(SMALL.image[2].data.tobytes()).hexdigest()
    wrong = at_hand | {key: at_hand[key] + np.uint8(1)}
    with pytest.raises(ProgramError, match=f"line .*the contents {key} are not these 1,280 bytes"):
        loads(written, TINY, wrong)


def test_a_damaged_text_is_an_error_or_a_program() -> None:
    rng = random.Random(8)
    for _ in range(300):
        at = rng.randrange(len(SAID))
        piece = rng.choice(["", "9", "-", "=", ";", '"', "\n", " ", "..", "*", "[", SAID[:at][-9:]])
        try:
            loads(SAID[:at] + piece + SAID[at + rng.randrange(4) :], TINY)
        except ProgramError as error:
            assert "\n" not in str(error)
