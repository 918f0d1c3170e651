"""In: prompts. Out: tokens and text: requests, K/V pages, the batcher, the sampler, the Model."""

from openlpu.engine.answer import Result, Stats, Stream
from openlpu.engine.chat import Chat
from openlpu.engine.model import Model, load
from openlpu.engine.sampling import Sampling

__all__ = ["Chat", "Model", "Result", "Sampling", "Stats", "Stream", "load"]
