"""In: a Program, a simulator of its chip, and Batches. Out: logits, and the cycles of each step.

What the host does around a step: it writes addresses, positions and rotary rows into the program's
ports, starts it with its parameters, and reads the logits. Nothing is computed here that the chip
computes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.errors import RequestError
from openlpu.graph import Batch
from openlpu.numerics.rope import cos_sin
from openlpu.program import Port, Program, cycles
from openlpu.sim.result import Result

_NEVER = 1 << 30


class Machine(Protocol):
    """Step or Fast."""

    def run(self, params: dict[str, tuple[int, ...]]) -> Result: ...
    def write(self, port: str, data: NDArray[np.uint8]) -> None: ...
    def read(self, port: str) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step: what was predicted before it began, and what the simulator found."""

    predicted_cycles: int
    result: Result


class Driver:
    """Runs Batches on a simulated chip. Slots of a Batch are the program's sequences."""

    def __init__(self, program: Program, chip: Chip, machine: Machine) -> None:
        self.program, self.chip, self.machine = program, chip, machine
        self.meta: dict[str, Any] = json.loads(program.meta)
        self.reports: list[StepReport] = []
        turns = [int(turn, 16) for turn in self.meta["rope"]["turns"]]
        self._turns = np.array(turns, np.uint64)
        self._magnitude = float.fromhex(self.meta["rope"]["magnitude"])

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [L, V] of the wanted rows. Raises RequestError for a batch that the
        program was not compiled for."""
        tokens, positions, at = self._rows(batch)
        self._write_ports(tokens, positions)
        highest = np.zeros(self.meta["sequences"], np.int64)
        per = self.meta["rows"] // self.meta["sequences"]
        for row, position in enumerate(positions):
            highest[row // per] = max(highest[row // per], position)
        reach = self.meta["chunk"] * self.meta["chunks_per_group"]
        params = {"groups": tuple(int(h) // reach + 1 for h in highest)}
        predicted = cycles(self.program, params)
        self.reports.append(StepReport(predicted, self.machine.run(params)))
        port = self.program.port("logits")
        data = self.machine.read("logits")
        logits = _from_lanes(port, data, np.dtype("<f4"), self.meta["vocabulary"])
        found: NDArray[np.float32] = logits[at[batch.wanted]]
        return found

    def _rows(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """token and position of each of the program's rows (-1: unused), and each batch row's."""
        sequences = self.meta["sequences"]
        per = self.meta["rows"] // sequences
        tokens = np.full(self.meta["rows"], 0, np.int64)
        positions = np.full(self.meta["rows"], -1, np.int64)
        used = [0] * sequences
        at = np.zeros(len(batch.tokens), np.int64)
        for i, (token, position, slot) in enumerate(
            zip(batch.tokens, batch.positions, batch.slots, strict=True)
        ):
            if not 0 <= slot < sequences or used[slot] == per:
                raise RequestError(
                    f"the program takes {per} rows of each of {sequences} sequences; "
                    "compile it with more --rows"
                )
            if not 0 <= position < self.meta["context"]:
                raise RequestError(
                    f"position {position} is outside the program's context of "
                    f"{self.meta['context']:,}; compile it with a longer --context"
                )
            if not 0 <= token < self.meta["vocabulary"]:
                raise RequestError(f"token {token} is outside the vocabulary")
            at[i] = slot * per + used[slot]
            tokens[at[i]], positions[at[i]] = token, position
            used[slot] += 1
        return tokens, positions, at

    def _write_ports(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        seen = np.maximum(positions, 0)
        cosine, sine = cos_sin(self._turns, seen, magnitude=self._magnitude)
        both = {
            "cos": np.concatenate([cosine, cosine], axis=1),
            "sin": np.concatenate([-sine, sine], axis=1),
        }
        for port in self.program.ports:
            if port.direction != "in":
                continue
            kind = port.name.split(".")[0]
            if kind in both:
                self._write(port, both[kind])
            elif port.name == "position":
                self._write(port, positions[:, None].astype("<i4"))
            elif port.name == "first_visible":
                self._write(port, self._first_visible(positions))
            elif kind == "lane":
                self._write(port, self._one_hot(positions, self._lane(positions), 0))
            elif port.name == "embed.lane":
                self._write(port, self._scale_lanes(positions, tokens))
            elif port.name == "embed.address":
                self._write(port, self._token_address(port, tokens))
            elif port.name == "append.address":
                self._write(port, self._append_address(port, positions))
            else:
                raise RequestError(f"the program has an unknown port {port.name!r}")

    def _write(self, port: Port, values: NDArray[Any]) -> None:
        self.machine.write(port.name, _to_lanes(port, values))

    def _lane(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(positions >= 0, positions % self.meta["chunk"] % self.chip.lanes, -1)

    def _one_hot(
        self, positions: NDArray[np.int64], lane: NDArray[np.int64], value: int, hidden: int = -1
    ) -> NDArray[Any]:
        """`value` in each row's lane, `hidden` in the others: int16 [rows, lanes]."""
        table = np.full((len(positions), self.chip.lanes), hidden, "<i2")
        for row, at in enumerate(lane):
            if at >= 0:
                table[row, at] = value
        return table

    def _first_visible(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        parts = [
            positions - window + 1 if window else np.full_like(positions, -_NEVER)
            for window in self.meta["windows"]
        ]
        return np.asarray(np.concatenate(parts)[:, None], "<i4")

    def _scale_lanes(self, positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[Any]:
        """-1 in the lanes of a word that hold a token's scales: one lane, or one a superlane."""
        shared = self.meta["table"]["scale_tokens"]
        lanes = np.arange(self.chip.lanes) % shared
        mine = (lanes == tokens[:, None] % shared) & (positions >= 0)[:, None]
        return np.where(mine, -1, 0).astype("<i1")

    def _token_address(self, port: Port, tokens: NDArray[np.int64]) -> NDArray[Any]:
        """Bytes of the int16 base of every slice of the table, then of those of its scales."""
        table = self.meta["table"]
        bases = np.full((len(tokens), port.features.size // 2), -1, "<i2")
        for row, token in enumerate(tokens):
            index, offset = divmod(int(token), table["rows_per_slice"])
            bases[row, index] = offset * table["vectors"]
            index, word = divmod(int(token) // table["scale_tokens"], table["scale_words"])
            first = table["slices"] + index * table["scale_slices"]
            bases[row, first : first + table["scale_slices"]] = word
        return bases.view("<i1")

    def _append_address(self, port: Port, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Bytes of the int16 offsets at which each unit's slices keep the row's position: those of
        its keys and values, and that of their scales."""
        meta, width = self.meta, self.chip.install_streams
        per = meta["rows"] // meta["sequences"]
        rows = len(positions)
        bases = np.full((meta["layers"] * rows, port.features.size // 2), -1, "<i2")
        layers = np.arange(meta["layers"]) * meta["sequences"] * meta["groups"]
        for row, position in enumerate(positions):
            if position < 0:
                continue
            chunk, inside = divmod(int(position), meta["chunk"])
            group, chunk_in_group = divmod(chunk, meta["chunks_per_group"])
            tile, lane = divmod(inside, self.chip.lanes)
            unit = chunk_in_group * meta["tiles_per_chunk"] + tile
            slots = layers + row // per * meta["groups"] + group
            words = slots * meta["tile_words"][unit] + lane // width
            bases[row::rows, meta["key_entries"][unit] + lane % width] = words
            bases[row::rows, meta["scale_entries"][unit]] = slots
        return bases.view("<i1")


def _to_lanes(port: Port, values: NDArray[Any]) -> NDArray[np.uint8]:
    """values [rows, features] of 1, 2 or 4 bytes -> uint8 [rows, vectors, bytes, lanes]."""
    rows = values[:, np.maximum(port.features, 0)]
    rows = np.where(port.features >= 0, rows, 0).astype(values.dtype)
    split = np.ascontiguousarray(rows).view(np.uint8).reshape(*rows.shape, values.dtype.itemsize)
    ordered: NDArray[np.uint8] = np.ascontiguousarray(split.transpose(0, 1, 3, 2))
    return ordered


def _from_lanes(
    port: Port, data: NDArray[np.uint8], dtype: np.dtype[Any], width: int
) -> NDArray[Any]:
    """The reverse: [rows, width]."""
    values = np.ascontiguousarray(data.transpose(0, 1, 3, 2)).view(dtype)[..., 0]
    found = np.zeros((len(data), width), dtype)
    used = port.features >= 0
    found[:, port.features[used]] = values[:, used]
    return found
