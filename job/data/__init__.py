"""From raw documents to batches: corpus → tokenizer → shards → order → loader. Knows nothing of models or clusters."""
