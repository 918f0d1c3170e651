"""In: a GGUF checkpoint and a format. Out: the same model as a GGUF file of it, kept in the cache.

Tensors are converted and written one after the other, so that memory holds one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.store import Store

KIND = "bench"
TABLES = ("token_embd.weight", "output.weight")
_RECIPE = 2


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written: `form` names a GGML type, `data` makes its bytes when called."""

    name: str
    shape: tuple[int, ...]
    form: str
    data: Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Field:
    """A piece of metadata, of a GGUFValueType; `inner` is the type of a list's elements."""

    name: str
    value: Any
    type: Any
    inner: Any = None


def converted(source: Path, fingerprint: str, form: str) -> Path:
    """The file, made once and kept in the cache under the checkpoint's fingerprint.

    Matrices become `form`, vectors float32; the tables of a 4-bit file (embeddings, head) become
    Q8_0. Metadata and tied embeddings stay as they are.
    """
    return kept(
        f"{fingerprint}-{form}-{_RECIPE}.gguf", lambda target: _convert(source, target, form)
    )


def kept(key: str, make: Callable[[Path], None]) -> Path:
    """The cache's entry, made by `make` if it is not there."""
    store = Store()
    path = store.get(KIND, key)
    if path is None:
        with store.create(KIND, key) as target:
            make(target)
        path = store.path(KIND, key)
    return path


def decode_bytes(path: Path) -> int:
    """Bytes of the tensors that one token's step reads: all, but of an embedding table that is not
    the head, too, only a row."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes[TABLES[0]] if TABLES[1] in sizes else 0)


def forms(path: Path) -> set[str]:
    """The GGML types of the matrices inside the layers."""
    from gguf import GGUFReader

    return {
        tensor.tensor_type.name
        for tensor in GGUFReader(path).tensors
        if len(tensor.shape) > 1 and tensor.name not in TABLES
    }


def matrix_form(name: str, form: str) -> str:
    """The GGML type of a matrix in a file of `form`."""
    return "Q8_0" if form.startswith("Q4") and name in TABLES else form


def write(target: Path, architecture: str, fields: Iterable[Field], tensors: list[Planned]) -> None:
    """Write a GGUF file."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES

    writer = GGUFWriter(target, architecture)
    for field in fields:
        writer.add_key_value(field.name, field.value, field.type, sub_type=field.inner)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.form]
        elements, size = GGML_QUANT_SIZES[kind]
        count = math.prod(tensor.shape) // elements * size
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), count, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data())
    writer.close()


def metadata(reader: Any, form: str) -> tuple[str, list[Field]]:
    """The architecture and the fields of a GGUFReader's file, as those of a file of `form`."""
    from gguf import GGUFValueType, LlamaFileType

    architecture = reader.fields["general.architecture"].contents()
    fields = []
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # the writer's own
        value = field.contents()
        if field.name == "general.file_type":
            value = int(LlamaFileType[f"MOSTLY_{form}"])
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        fields.append(Field(field.name, value, field.types[0], inner))
    return architecture, fields


def _convert(source: Path, target: Path, form: str) -> None:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture, fields = metadata(reader, form)

    def planned(tensor: Any) -> Planned:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = matrix_form(tensor.name, form) if len(shape) > 1 else "F32"

        def data() -> NDArray[Any]:
            values = dequantize(tensor.data, tensor.tensor_type)
            found: NDArray[Any] = quantize(values, GGMLQuantizationType[kind])
            return found

        return Planned(tensor.name, shape, kind, data)

    write(target, architecture, fields, [planned(tensor) for tensor in reader.tensors])
