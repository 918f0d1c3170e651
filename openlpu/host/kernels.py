"""In: nothing. Out: descriptions of kernels as plain data, so that a warm start builds no IR."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T and its epilogue. Args: out, x, weights, scales, bias, residual, minima."""

    k: int
    blocks: int  # 16-output blocks, padded
    out_width: int
    epilogue: str  # none, add, swiglu
    bias: bool
    format: str  # w8, or of the blocks: q8_0, q4_0, q4_1


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention op. fused: q, k, v side by side, rope (and head norms) still to do.

    Args: out, q, k, v, quantized queries, layer, q gain, k gain.
    """

    heads: int
    kv_heads: int
    head_dim: int
    factor: float
    window: int
    chunk: int
    fused: bool
    norm_eps: float | None = None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def query_bytes(self) -> int:
        """One quantized query head: values, scale, correction."""
        return self.head_dim + 64

    @property
    def part_bytes(self) -> int:
        """What a unit has of one chunk: m, l and o of each head of the group, float32."""
        return 4 * self.group * (self.head_dim + 2)


@dataclass(frozen=True, slots=True)
class Install(Attention):
    """Rope, quantize and append: runs before Attend, with the same arguments."""


@dataclass(frozen=True, slots=True)
class Attend(Attention):
    """Scores, probabilities, weighted values."""


@dataclass(frozen=True, slots=True)
class Quant:
    """Args: out, x."""

    width: int
    group: int
    hadamard: bool


@dataclass(frozen=True, slots=True)
class RmsnormQuant:
    """Args: out, x, gain."""

    width: int
    group: int
    eps: float
    gain: bool


@dataclass(frozen=True, slots=True)
class Rmsnorm:
    """Args: out, x, gain."""

    width: int
    heads: int
    eps: float
    gain: bool


@dataclass(frozen=True, slots=True)
class Elementwise:
    """kind add or swiglu. Args: out, a, b."""

    width: int
    kind: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Args: out, x."""

    source_width: int
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Args: out, x."""

    width: int
    heads: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Args: out, x."""

    width: int


@dataclass(frozen=True, slots=True)
class Embed:
    """Args: out, table, scales, minima."""

    width: int
    format: str


Spec = (
    Linear
    | Install
    | Attend
    | Quant
    | RmsnormQuant
    | Rmsnorm
    | Elementwise
    | Slice
    | Rope
    | Rows
    | Embed
)


def symbol(spec: Spec) -> str:
    """Name of the kernel's function: its kind and every parameter."""
    values = []
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, float):
            values.append(value.hex().replace("+", "").replace("-", "m").replace(".", "_"))
        else:
            values.append(str(int(value) if isinstance(value, bool) else value))
    return "_".join([type(spec).__name__.lower(), *values])
