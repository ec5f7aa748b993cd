"""From shards to a model: the loop, and what surrounds it."""
