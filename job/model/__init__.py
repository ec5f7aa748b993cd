"""The network, its loss, and what it costs: it knows nothing of where tokens come from, nor of machines."""
