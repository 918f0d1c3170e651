"""In: jobs as worker.py reads them. Out: the times and tokens of OpenVINO GenAI.

Runs in the environment that has openvino-genai and nncf:

    python openvino_worker.py MODEL.gguf THREADS FOLDER FORM

The graph is the one that GenAI itself makes of a GGUF file. FORM int8 and int4 compress its
weights (MODEL in float16) with NNCF, once, into FOLDER; FORM gguf takes the file as it is.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from worker import made_once, serve

BATCH_TOKENS = 512
CACHE_GB = 1
INT4_GROUP = 64  # inputs that share a scale; NNCF's own 128 does not divide every width


class Worker:
    """One pipeline with continuous batching."""

    def __init__(self, path: Path, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = BATCH_TOKENS
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False  # the same prompts come again in every round
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)
        self._ids = count()

    def run(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Seconds of the prompts up to their first chosen tokens, then of the steps."""
        config = genai.GenerationConfig()
        config.max_new_tokens = 1 + steps
        config.do_sample = False
        config.ignore_eos = True
        config.eos_token_id, config.stop_token_ids = 0, {0}  # it wants some; ignored
        requests = [
            self._pipeline.add_request(
                next(self._ids), openvino.Tensor(np.array([prompt], np.int64)), config
            )
            for prompt in prompts
        ]
        started_s = time.perf_counter()
        self._pipeline.step()
        prefill_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        taken = 0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            taken += 1
        decode_s = time.perf_counter() - started_s
        tokens = [request.read_all()[0].generated_ids for request in requests]
        if taken != steps or any(len(chosen) != 1 + steps for chosen in tokens):
            raise SystemExit(f"OpenVINO took {taken} steps for {steps}")
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": tokens}


def convert(source: str, form: str, folder: str) -> None:
    """Write the graph of a GGUF file with compressed weights to a folder."""
    import nncf

    graph = Path(folder) / "graph"
    graph.mkdir()
    (graph / "model.gguf").symlink_to(source)  # it is named so, and the graph is saved beside it
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    try:
        genai.ContinuousBatchingPipeline(
            str(graph / "model.gguf"), scheduler, "CPU", {"enable_save_ov_model": True}
        )
    except RuntimeError:
        # It also compiles the float16 graph, which fails for some shapes ("dead weak ptr"); the
        # graph itself is written by then, and compiles when its weights are compressed.
        if not (graph / "openvino_model.xml").exists():
            raise
    model = openvino.Core().read_model(graph / "openvino_model.xml")
    if form == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=INT4_GROUP)
    openvino.save_model(model, Path(folder) / "openvino_model.xml")
    del model
    for file in graph.iterdir():
        file.unlink()
    graph.rmdir()


def main() -> None:
    """Convert, or answer the lines of standard input."""
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:])
        return
    source, threads, folder, form = sys.argv[1:]
    about = {"version": version("openvino-genai"), "openvino": version("openvino")}
    path = Path(source)
    if form != "gguf":
        path = made_once(Path(folder), f"openvino-{form}", __file__, "--convert", source, form)
        about["nncf"] = version("nncf")
        about["weight_bytes"] = (path / "openvino_model.bin").stat().st_size
    serve(about, Worker(path, int(threads)).run)


if __name__ == "__main__":
    main()
