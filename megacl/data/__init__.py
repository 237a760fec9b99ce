"""From raw text to batches: tokenizer, shards, order, mixture, replay, loader. Knows no process group."""
