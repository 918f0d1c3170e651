"""4-bit blocks for checkpoints that have none: rounded by what a text makes of their inputs."""

from openlpu.calibrate.weights import has_blocks, in_blocks

__all__ = ["has_blocks", "in_blocks"]
