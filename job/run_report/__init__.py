"""Reports of runs: one HTML page and Markdown, from what a run has stored."""
