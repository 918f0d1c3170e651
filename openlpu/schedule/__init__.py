"""In: a quantized Graph, its tensors and a Chip. Out: a Program, every cycle of it decided."""
