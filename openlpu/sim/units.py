"""In: an Instruction that issues now, and the Machine. Out: what it reads, computes and sends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from openlpu import isa
from openlpu.sim.decode import TRANSPOSED, Instruction, Operand, operands, port_width
from openlpu.sim.machine import I8, I32, U8, Machine, Register, Slot, Write


def execute(machine: Machine, instruction: Instruction, repetition: int) -> None:
    """One repetition of an instruction, in the machine's cycle."""
    unit = instruction.kind.unit
    if unit == "vxm":
        _alu(machine, instruction)
    elif unit == "sxm":
        _sxm(machine, instruction)
    else:
        _UNITS[instruction.kind.name](machine, instruction, repetition)


def _group(machine: Machine, instruction: Instruction, number: int) -> list[U8]:
    """The values of the instruction's stream port `number`."""
    port, fields = instruction.kind.reads[number], instruction.fields
    take = not port.take or bool(fields[port.take])
    first, width = fields[port.field], port_width(machine.chip, port, fields)
    return [machine.read(instruction, first + j, take) for j in range(width)]


def _word(streams: list[U8]) -> I32:
    """Bytes, low byte first, as signed words."""
    kind = {1: "<i1", 2: "<i2", 4: "<i4"}[len(streams)]
    return np.ascontiguousarray(np.stack(streams, axis=-1)).view(kind)[:, 0].astype(np.int32)


def _bytes(value: I32) -> list[U8]:
    """The four bytes of each word, low byte first."""
    split = np.ascontiguousarray(value.astype("<i4")).view(np.uint8).reshape(-1, 4)
    return [split[:, j].copy() for j in range(4)]


# -- MEM


def _address(machine: Machine, instruction: Instruction, repetition: int, span: int) -> int | None:
    """The word of an access that may reach up to span words further; None if it is turned off."""
    chip, reg = machine.chip, instruction.fields["base"]
    place = instruction.place.index, reg
    if reg != 0 and place not in machine.bases:
        raise machine.fault(instruction, f"base register {reg} holds nothing")
    base = machine.bases[place] if reg != 0 else Register(0, 0)
    word = instruction.stepped(repetition)
    highest = word % chip.words_per_bank + base.highest + span
    if base.highest >= 0 and highest >= chip.words_per_bank:
        raise machine.fault(instruction, f"word {word} + {base.highest + span} leaves its bank")
    return None if base.value < 0 else word + base.value


def _read(machine: Machine, instruction: Instruction, repetition: int) -> None:
    word = _address(machine, instruction, repetition, 0)
    value = np.zeros(machine.chip.lanes, np.uint8)
    if word is not None:
        value = machine.memory[instruction.place.index, word].copy()
    machine.put(instruction, instruction.fields["dst"], value)


def _write(machine: Machine, instruction: Instruction, repetition: int) -> None:
    (value,) = _group(machine, instruction, 0)
    word = _address(machine, instruction, repetition, 0)
    if word is None:
        machine.store(instruction, None)
        return
    lanes = machine.chip.lanes
    words, all_lanes = np.full(lanes, word, np.int64), np.ones(lanes, np.bool_)
    machine.store(instruction, Write(instruction.place.index, words, all_lanes, value))


def _offsets(machine: Machine, instruction: Instruction, number: int) -> NDArray[np.int64]:
    """The map of a gather or scatter, cut to its limit; negative where there is no access."""
    offsets = _word(_group(machine, instruction, number)).astype(np.int64)
    return np.minimum(offsets, instruction.fields["limit"])


def _gather(machine: Machine, instruction: Instruction, repetition: int) -> None:
    offsets = _offsets(machine, instruction, 0)
    word = _address(machine, instruction, repetition, instruction.fields["limit"])
    value = np.zeros(machine.chip.lanes, np.uint8)
    if word is not None:
        for lane in np.flatnonzero(offsets >= 0):
            value[lane] = machine.memory[instruction.place.index, word + offsets[lane], lane]
    machine.put(instruction, instruction.fields["dst"], value)


def _scatter(machine: Machine, instruction: Instruction, repetition: int) -> None:
    (value,) = _group(machine, instruction, 0)
    offsets = _offsets(machine, instruction, 1)
    word = _address(machine, instruction, repetition, instruction.fields["limit"])
    if word is None:
        machine.store(instruction, None)
        return
    write = Write(instruction.place.index, word + offsets, offsets >= 0, value)
    machine.store(instruction, write)


def _setbase(machine: Machine, instruction: Instruction, _: int) -> None:
    (value,) = _group(machine, instruction, 0)
    fields = instruction.fields
    low, high = (int(value[fields["lane"] + i]) for i in range(2))
    number = low + 256 * high
    number -= 65536 if number >= 32768 else 0
    limit = fields["limit"]
    register = Register(-1 if number < 0 else min(number, limit), limit)
    machine.set_base(instruction, fields["reg"], register)


# -- MXM


def _as_loaded(value: U8, mode: int) -> I8:
    if mode == isa.Mode.I8:
        return value.view(np.int8)
    high = mode in (isa.Mode.U4_HIGH, isa.Mode.S4_HIGH)
    nibble = (value >> 4 if high else value & 15).astype(np.int8)
    return nibble - np.int8(8 if mode in (isa.Mode.S4_LOW, isa.Mode.S4_HIGH) else 0)


def _load(machine: Machine, instruction: Instruction, repetition: int) -> None:
    plane = machine.planes[instruction.place.index]
    fields = instruction.fields
    first = instruction.stepped(repetition) * machine.chip.install_streams
    for j, value in enumerate(_group(machine, instruction, 0)):
        loaded = _as_loaded(value, fields["mode"])
        if fields["row"]:
            plane.buffer[first + j, :] = loaded
        else:
            plane.buffer[:, first + j] = loaded
    plane.last_load = machine.cycle


def _install(machine: Machine, instruction: Instruction, _: int) -> None:
    plane = machine.planes[instruction.place.index]
    if plane.last_load is None:
        raise machine.fault(instruction, "nothing was loaded since the last install")
    if plane.last_load + machine.chip.latency.mxm_load > machine.cycle:
        raise machine.fault(instruction, "the last load is not done")
    plane.weights.append((machine.cycle + instruction.latency, plane.buffer.copy()))
    plane.last_load = None


def _act(machine: Machine, instruction: Instruction, repetition: int) -> None:
    plane = machine.planes[instruction.place.index]
    (value,) = _group(machine, instruction, 0)
    # int64 sums reduced modulo 2^32 are what wrapping int32 sums are.
    row = value.view(np.int8).astype(np.int64)
    product = (row @ machine.weights(instruction).astype(np.int64)).astype(np.int32)
    number = instruction.stepped(repetition)
    if instruction.fields["add"]:
        if number not in plane.slots:
            raise machine.fault(instruction, f"nothing to add to in slot {number}")
        product = plane.slots[number].value + product
    plane.slots[number] = Slot(product, machine.cycle)


def _out(machine: Machine, instruction: Instruction, repetition: int) -> None:
    plane = machine.planes[instruction.place.index]
    number = instruction.stepped(repetition)
    if number not in plane.slots:
        raise machine.fault(instruction, f"slot {number} is empty")
    slot = plane.slots[number]
    if slot.last_act + machine.chip.latency.mxm_dot > machine.cycle:
        raise machine.fault(instruction, f"slot {number} is not ready")
    for j, value in enumerate(_bytes(slot.value)):
        machine.put(instruction, instruction.fields["dst"] + j, value)


_UNITS: dict[str, Callable[[Machine, Instruction, int], None]] = {
    "read": _read,
    "write": _write,
    "gather": _gather,
    "scatter": _scatter,
    "setbase": _setbase,
    "load": _load,
    "install": _install,
    "act": _act,
    "out": _out,
}


# -- VXM


def _alu(machine: Machine, instruction: Instruction) -> None:
    fields, op = instruction.fields, isa.ALU[instruction.kind.name]
    inputs = [_operand(machine, instruction, operand) for operand in operands(fields)]
    with np.errstate(all="ignore"):
        result = op.compute(*inputs[: op.operands])
    machine.deliver(instruction, result)
    for side, offset in (("west", 0), ("east", machine.chip.streams)):
        if fields[side]:
            for j, value in enumerate(_bytes(result)[: fields["width"]]):
                machine.put(instruction, offset + fields[side] - 1 + j, value)


def _operand(machine: Machine, instruction: Instruction, operand: Operand) -> I32:
    if operand.source in isa.SOURCE_WIDTH:
        first, take = divmod(operand.at, 2)
        width = isa.SOURCE_WIDTH[operand.source]
        return _word([machine.read(instruction, first + j, bool(take)) for j in range(width)])
    if operand.source == isa.Source.TAP:
        return machine.result(instruction, *divmod(operand.at, isa.DELAYS))
    constant = instruction.fields["imm"] if operand.source == isa.Source.IMM else 0
    return np.full(machine.chip.lanes, constant, np.int32)


# -- SXM


def _sxm(machine: Machine, instruction: Instruction) -> None:
    values = _group(machine, instruction, 0)
    if instruction.kind.name == "transpose":
        moved = _transposed(np.stack(values))
    else:
        lanes = _lanes(machine, instruction)
        moved = [np.where(lanes >= 0, value[lanes], np.uint8(0)) for value in values]
    for j, value in enumerate(moved):
        machine.put(instruction, instruction.fields["dst"] + j, value)


def _lanes(machine: Machine, instruction: Instruction) -> NDArray[np.int64]:
    """Which lane of the input stands in each lane of the result; -1 for zero."""
    chip, name, fields = machine.chip, instruction.kind.name, instruction.fields
    lanes: NDArray[np.int64] = np.arange(chip.lanes, dtype=np.int64)
    if name == "shift":
        lanes = lanes - fields["amount"]
        lanes[(lanes < 0) | (lanes >= chip.lanes)] = -1
    elif name == "rotate":
        group = chip.superlane_lanes
        lanes = lanes // group * group + (lanes + fields["amount"]) % group
    else:
        lanes = machine.maps[fields["map"]].astype(np.int64)
    return lanes


def _transposed(streams: NDArray[np.uint8]) -> list[U8]:
    """streams [16, lanes]: inside each superlane, stream and lane change places."""
    cube = streams.reshape(TRANSPOSED, -1, TRANSPOSED)  # stream, superlane, lane
    return list(cube.transpose(2, 1, 0).reshape(TRANSPOSED, -1))
