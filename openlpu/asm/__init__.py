"""In: a Program. Out: its bits (binary), its .lpu file (container), its text (text, parse)."""

from openlpu.asm.container import load, program_sha256, save
from openlpu.asm.parse import loads
from openlpu.asm.text import contents, dumps

__all__ = ["contents", "dumps", "load", "loads", "program_sha256", "save"]
