"""Where the processes run, how they start, and what their ends mean."""
