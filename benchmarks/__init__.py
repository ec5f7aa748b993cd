"""Benchmarks: each module prints a table; README.md keeps the results."""
