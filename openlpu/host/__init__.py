"""In: a quantized Graph. Out: native steps on this processor, through LLVM."""

from openlpu.host.engine import HostModel, build, default_threads

__all__ = ["HostModel", "build", "default_threads"]
