"""WikiLLM: one command that turns raw Chinese Wikipedia into a trained language model."""

__version__ = "0.1.0"
