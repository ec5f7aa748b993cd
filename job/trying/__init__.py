"""Trying a model: where the prompts come from, and how their continuations are shown."""
