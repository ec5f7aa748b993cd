"""Demonstration of all steps on one machine, without a GPU and with nothing but this repository."""
