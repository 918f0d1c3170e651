"""In: a ModelConfig. Out: its float Graph (decoder), with rotary frequencies as data (rope)."""

from openlpu.models.decoder import build

__all__ = ["build"]
