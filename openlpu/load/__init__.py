"""In: a path, an alias or a hub name. Out: a Checkpoint: sizes, weights, tokenizer source."""
