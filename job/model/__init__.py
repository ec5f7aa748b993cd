"""The network, its loss, its cost in memory and FLOPs, and its files; independent of data sets and machines."""
