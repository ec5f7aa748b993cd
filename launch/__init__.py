"""How a run is started on each place, and the tools for it."""
