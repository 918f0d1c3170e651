"""In: nothing. Out: one MLP of Llama-3-8B on a simulated chip: cycles beside weight install, speed.

python bench/mlp.py [--chip tsp_v1] [--dim 4096] [--ffn-dim 14336]

Weights are random int8. The result is compared with the numerics' slow code, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from openlpu.check import check
from openlpu.chip import load_chip
from openlpu.numerics.functions import hadamard_blocks, swiglu
from openlpu.numerics.quant import linear, quantize
from openlpu.schedule.mlp import build_mlp
from openlpu.sim.fast import Fast
from openlpu.sim.ports import from_lanes, to_lanes

_RUNS = 7


def main() -> None:
    """Schedule, check, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="tsp_v1")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--ffn-dim", type=int, default=14336)
    options = parser.parse_args()
    dim, ffn_dim = options.dim, options.ffn_dim
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in (("gate_up", (2 * ffn_dim, dim)), ("down", (dim, ffn_dim))):
        weight = rng.integers(-127, 128, shape).astype(np.int8)
        tensors[name] = (weight, rng.uniform(1e-4, 3e-4, shape[0]).astype(np.float32))
    chip = load_chip(options.chip)
    started_s = time.perf_counter()
    program = build_mlp(tensors, chip)
    print(f"scheduled in {time.perf_counter() - started_s:.1f} s")
    check(program, chip)
    cycles = program.sections[0].cycles
    weight_bytes = sum(weight.size for weight, _ in tensors.values())
    install_cycles = weight_bytes / (chip.planes * chip.install_streams * chip.lanes)
    print(
        f"{cycles:,} cycles; installing {weight_bytes:,} bytes of weights takes "
        f"{install_cycles:,.0f}: ratio {cycles / install_cycles:.3f}"
    )
    machine = Fast(program, chip)
    x = rng.standard_normal((1, dim)).astype(np.float32)
    machine.write("x", to_lanes(program.port("x"), x))
    seconds = []
    for _ in range(_RUNS):
        started_s = time.perf_counter()
        result = machine.run({})
        seconds.append(time.perf_counter() - started_s)
    print(f"{result.cycles / statistics.median(seconds):,.0f} chip cycles a second, median")
    y = from_lanes(program.port("y"), machine.read("y"), np.dtype("<f4"), dim)
    both = linear(*quantize(x), *tensors["gate_up"])
    hidden = hadamard_blocks(swiglu(both[:, :ffn_dim], both[:, ffn_dim:]))
    wanted = linear(*quantize(hidden), *tensors["down"])
    differ = int((y.view(np.int32) != wanted.view(np.int32)).sum())
    print(f"{differ} of {wanted.size} values differ from the numerics")
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()
