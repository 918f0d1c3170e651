"""In: jobs as worker.py reads them. Out: the times and tokens of CTranslate2.

Runs in the environment that has ctranslate2 and gguf:

    python ctranslate2_worker.py MODEL.gguf THREADS FOLDER FORM

MODEL has float16 matrices; FORM is the quantization (int8). It is converted once into FOLDER, by
CTranslate2's own specification of a decoder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec
from numpy.typing import NDArray
from worker import made_once, serve


class Worker:
    """One generator. Its tokens are texts, here the decimal ids."""

    def __init__(self, path: Path, threads: int, form: str) -> None:
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=form, inter_threads=1, intra_threads=threads
        )

    def run(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Seconds of the prompts up to their first chosen tokens, then of the steps."""
        first_s: list[float] = []

        def chosen(result: ctranslate2.GenerationStepResult) -> bool:
            if not first_s and result.step == 0:
                first_s.append(time.perf_counter())
            return False

        started_s = time.perf_counter()
        results = self._generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            beam_size=1,
            sampling_topk=1,
            min_length=1 + steps,  # no end before
            max_length=1 + steps,
            include_prompt_in_result=False,
            callback=chosen if steps else None,
        )
        ended_s = time.perf_counter()
        prefilled_s = first_s[0] if first_s else ended_s
        tokens = [result.sequences_ids[0] for result in results]
        if any(len(ids) != 1 + steps for ids in tokens):
            raise SystemExit("CTranslate2 ended a sequence early")
        return {
            "prefill_s": prefilled_s - started_s,
            "decode_s": ended_s - prefilled_s,
            "tokens": tokens,
        }


def convert(source: str, form: str, folder: str) -> None:
    """Write a llama GGUF file as a CTranslate2 model."""
    from gguf import GGUFReader

    reader = GGUFReader(source)

    def number(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    spec = TransformerDecoderModelSpec.from_config(
        number("block_count"),
        heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=True,  # as GGUF orders the rows of llama models
        rotary_base=number("rope.freq_base"),
        num_heads_kv=None if kv_heads == heads else kv_heads,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = _floats(tensors["token_embd.weight"])
    decoder.layer_norm.gamma = _floats(tensors["output_norm.weight"])
    decoder.projection.weight = decoder.embeddings.weight
    if "output.weight" in tensors:
        decoder.projection.weight = _floats(tensors["output.weight"])
    for i, layer in enumerate(decoder.layer):

        def part(name: str, block: int = i) -> NDArray[np.float32]:
            return _floats(tensors[f"blk.{block}.{name}.weight"])

        layer.self_attention.layer_norm.gamma = part("attn_norm")
        layer.self_attention.linear[0].weight = np.concatenate(
            [part("attn_q"), part("attn_k"), part("attn_v")]
        )
        layer.self_attention.linear[1].weight = part("attn_output")
        layer.ffn.layer_norm.gamma = part("ffn_norm")
        layer.ffn.linear_0.weight = part("ffn_gate")
        layer.ffn.linear_0_noact.weight = part("ffn_up")
        layer.ffn.linear_1.weight = part("ffn_down")
    spec.register_vocabulary([str(i) for i in range(decoder.embeddings.weight.shape[0])])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "0", "1", "2"
    spec.config.layer_norm_epsilon = number("attention.layer_norm_rms_epsilon")
    spec.validate()
    spec.optimize(quantization=form)
    spec.save(folder)


def _floats(data: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(data, dtype=np.float32)


def main() -> None:
    """Convert, or answer the lines of standard input."""
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:])
        return
    source, threads, folder, form = sys.argv[1:]
    path = made_once(Path(folder), f"ctranslate2-{form}", __file__, "--convert", source, form)
    about = {
        "version": ctranslate2.__version__,
        "weight_bytes": (path / "model.bin").stat().st_size,
    }
    serve(about, Worker(path, int(threads), form).run)


if __name__ == "__main__":
    main()
