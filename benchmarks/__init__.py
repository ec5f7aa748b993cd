"""Measurements: each prints its table, and README.md keeps what was seen."""
