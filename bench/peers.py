"""In: a checkpoint, a precision and interpreters. Out: the engines to compare, each ready to start.

bench/README.md says how each peer is installed and why it is set up so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines import OpenLpu, Peer, Side
from gguf_files import KIND, converted, decode_bytes, forms

from openlpu import __version__
from openlpu.engine.model import open_model
from openlpu.jit import llvm_version
from openlpu.load.checkpoint import Checkpoint
from openlpu.load.config import ModelConfig
from openlpu.store import Store

PEERS = ("llama.cpp", "openvino", "ctranslate2")
PRECISIONS = ("w8", "w4")
BITS = {"w8": 8, "w4": 4}
LARGE = 3_000_000_000  # weights of which no float16 file is made, since it would not fit in memory
NOT_THERE = {"ctranslate2": "it has no 4-bit weights on processors"}  # at w4


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine at a precision; peer is empty for OpenLPU itself."""

    name: str
    peer: str
    precision: str
    start: Callable[[], Side]


@dataclass(frozen=True, slots=True)
class Setup:
    """What every engine gets: the model, the threads, and an interpreter for each peer."""

    model: str
    checkpoint: Checkpoint
    threads: int
    pythons: Mapping[str, str]

    def engines(self, precision: str) -> list[Engine]:
        """OpenLPU, and every peer that has this precision."""
        w8, own = precision == "w8", self._own()
        its_own = own if len(own) == 1 and own < {"Q4_1", "Q4_K"} else ()
        found = [Engine(f"openlpu {precision}", "", precision, lambda: self._openlpu(precision))]
        found += [
            self._engine("llama.cpp", precision, form, self._llama)
            for form in (("Q8_0",) if w8 else ("Q4_0", *its_own))
        ]
        form = f"int{BITS[precision]}" if self._elements() < LARGE else "gguf"
        found.append(self._engine("openvino", precision, form, self._openvino))
        if w8:
            found.append(self._engine("ctranslate2", precision, "int8", self._ctranslate2))
        return found

    def _engine(
        self, peer: str, precision: str, form: str, start: Callable[[str, str], Side]
    ) -> Engine:
        return Engine(f"{peer} {form}", peer, precision, lambda: start(precision, form))

    def _openlpu(self, precision: str) -> Side:
        _, compiled = open_model(self.model, precision=precision)
        host = compiled.host(threads=self.threads)
        about = {"version": __version__, "llvm": llvm_version()}
        return OpenLpu(host, {**about, "kernels": host.kernels, "identity": host.identity})

    def _llama(self, precision: str, form: str) -> Side:
        file = self._file(form)
        command = self._command("llama.cpp", "llama_worker.py", file)
        return Peer(f"llama.cpp {form}", command, decode_bytes(file))

    def _openvino(self, precision: str, form: str) -> Side:
        if form == "gguf":
            file = self._named(self._file("Q8_0" if precision == "w8" else "Q4_0"))
            command = self._command("openvino", "openvino_worker.py", file)
            return Peer("openvino", [*command, str(self._folder()), form], decode_bytes(file))
        command = self._command("openvino", "openvino_worker.py", self._file("F16"))
        return self._less_table(Peer("openvino", [*command, str(self._folder()), form]))

    def _ctranslate2(self, precision: str, form: str) -> Side:
        command = self._command("ctranslate2", "ctranslate2_worker.py", self._file("F16"))
        return self._less_table(Peer("ctranslate2", [*command, str(self._folder()), form]))

    def _command(self, peer: str, worker: str, file: Path) -> list[str]:
        script = Path(__file__).with_name(worker)
        return [self.pythons[peer], str(script), str(file), str(self.threads)]

    def _less_table(self, peer: Peer) -> Peer:
        """Of an embedding table (8 bits, a scale a row) that is not the head, a row is read."""
        config = self.checkpoint.config
        peer.bytes_per_token -= 0 if config.tied else config.vocab_size * (config.dim + 4)
        return peer

    def _file(self, form: str) -> Path:
        """The checkpoint in this GGML type: itself if that is how it came."""
        if self._own() == {form}:
            return self.checkpoint.source
        return converted(self.checkpoint.source, self.checkpoint.weights.fingerprint(), form)

    def _named(self, file: Path) -> Path:
        """The file under a name that ends in .gguf."""
        link = self._folder() / f"{file.stem}.gguf"
        link.unlink(missing_ok=True)
        link.symlink_to(file)
        return link

    def _folder(self) -> Path:
        return Store().folder(KIND, f"{self.checkpoint.weights.fingerprint()}-peers")

    def _own(self) -> set[str]:
        return forms(self.checkpoint.source)

    def _elements(self) -> int:
        config = self.checkpoint.config
        return layer_products(config) + config.vocab_size * config.dim


def layer_products(config: ModelConfig) -> int:
    """Weights of all matrices inside the layers: so many products of each token."""
    attention = 2 * config.dim * config.head_dim * (config.heads + config.kv_heads)
    return config.layers * (attention + 3 * config.dim * config.ffn_dim)
