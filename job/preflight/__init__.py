"""Checks before a run starts: what would go wrong, and how many hours and dollars the run takes."""
