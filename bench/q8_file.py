"""In: a GGUF checkpoint. Out: the same model as a Q8_0 GGUF file, which llama.cpp runs."""

from __future__ import annotations

from pathlib import Path

from openlpu.store import Store

_KIND = "bench"
_RECIPE = "q8_0-1"


def q8_0_file(source: Path, fingerprint: str) -> Path:
    """The converted file, made once and kept in the cache under the checkpoint's fingerprint.

    Matrices become Q8_0, vectors float32; metadata and tied embeddings stay as they are.
    """
    store, key = Store(), f"{fingerprint}-{_RECIPE}"
    path = store.get(_KIND, key)
    if path is None:
        with store.create(_KIND, key) as target:
            _convert(source, target)
        path = store.path(_KIND, key)
    return path


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file. With tied embeddings, decode reads each of them."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def _convert(source: Path, target: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # the writer's own
        value = field.contents()
        if field.name == "general.file_type":
            value = int(LlamaFileType.MOSTLY_Q8_0)
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
