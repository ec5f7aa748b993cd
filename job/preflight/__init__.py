"""What can be known to be wrong before a GPU is paid for, and what a run will cost."""
