"""In: what a checkpoint says about its tokenizer. Out: TokenizerSource."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a tokenizer comes from, and the special ids that the checkpoint itself declares."""

    kind: Literal["hf", "gguf"]
    folder: Path | None
    """hf: the directory that holds tokenizer.json and tokenizer_config.json."""
    metadata: Mapping[str, Any] = field(repr=False)
    """gguf: the metadata with its tokenizer.ggml.* keys; empty for hf."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Every id that ends generation, in the order the checkpoint lists them."""
    add_bos: bool
    """Whether a plain prompt starts with bos_id."""
