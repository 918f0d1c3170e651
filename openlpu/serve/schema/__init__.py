"""In: OpenAI's documents. Out: their shapes, as pydantic checks requests and describes answers."""
