"""In: what went wrong. Out: one exception tree; each prints as one line that names the way out.

LpuError                     all that a user can cause; the command prints it, exit code 2
├── CheckpointError          a model file is missing, damaged, or hostile
│   ├── UnsupportedModel     the architecture, or one of its options, is not implemented
│   └── UnsupportedTensor    a tensor has a storage type that is not implemented
├── TemplateError            a chat template raised, looped, or tried to leave its sandbox
├── DownloadError            a model could not be fetched whole
├── StoreError               the cache could not be read or written (disk full, no permission)
├── RequestError             a prompt or parameter is outside what the model accepts
├── NumericOverflow          a value left the finite range, so no bits can be promised
├── GraphError               a graph is malformed (text does not parse, shapes do not meet)
├── ChipError                a chip file has unknown keys or impossible sizes
├── ProgramError             a program cannot be decoded, or is not legal on its chip
│   └── MachineError         the simulated chip met what a legal program never does
├── UnsupportedTarget        a kernel set that this machine's processor lacks
└── DoesNotFit               a resource is too small; carries the figures
"""

from __future__ import annotations

from dataclasses import dataclass, field


class LpuError(Exception):
    """Base of every error a user can cause. str(error) is one line."""


class CheckpointError(LpuError):
    """A model file is missing, truncated, damaged or hostile."""


class UnsupportedModel(CheckpointError):
    """The file is sound, but its architecture or an option of it is not implemented."""


class UnsupportedTensor(CheckpointError):
    """The file is sound, but a tensor has a storage type that is not implemented."""


class TemplateError(LpuError):
    """A chat template raised, ran too long, grew too large or tried to leave its sandbox."""


class DownloadError(LpuError):
    """A model could not be fetched whole and verified."""


class StoreError(LpuError):
    """The cache could not be read or written."""


class RequestError(LpuError):
    """A prompt or a parameter is outside what the model accepts."""


class NumericOverflow(LpuError):
    """A row left the finite float32 range, so its bits are not promised."""


class GraphError(LpuError):
    """A graph does not parse, or its shapes do not meet."""


class UnsupportedTarget(LpuError):
    """A kernel set was asked for that this processor cannot execute."""


class ChipError(LpuError):
    """A chip file has unknown keys or impossible sizes."""


class ProgramError(LpuError):
    """A program cannot be decoded, or is not legal on its chip."""


class MachineError(ProgramError):
    """The simulated chip met what a legal program never does; nothing stalls, it stops."""


@dataclass(eq=False)
class DoesNotFit(LpuError):
    """A resource is too small. Plain data, so that an explorer can read it.

    demand and bound are in `unit`; levers are concrete changes that would make it fit.
    """

    resource: str
    demand: int
    bound: int
    unit: str
    levers: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        way_out = f"; try {' or '.join(self.levers)}" if self.levers else ""
        return (
            f"{self.resource} does not fit: {self.demand:,} {self.unit} needed, "
            f"{self.bound:,} available{way_out}"
        )
