"""The whole path on one CPU machine with nothing but this repository."""
