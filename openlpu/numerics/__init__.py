"""In: nothing of ours. Out: contract lpu-1, the meaning of every number, as slow exact numpy code.

docs/numerics.md states the same contract in words. Every engine is compared with this package
bit for bit. Only +, -, x, /, sqrt, comparisons and conversions of IEEE-754 are used: each is
correctly rounded everywhere. There is no fused multiply-add and no library exp, cos or power.
"""

CONTRACT = "lpu-1"
SUPERLANE = 16  # lanes; the block of the online Hadamard transform
CHUNK = 320  # positions; attention is exact inside a chunk, chunks merge in order
GROUP = 32  # values; the group of 4-bit and blocked 8-bit weights
MAX_K = 133_000  # longest dot product whose int8 products cannot overflow int32
