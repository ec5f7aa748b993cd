"""Starting the worker processes of a run: the environment and devices they get, and how they ended."""
