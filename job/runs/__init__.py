"""Everything stored under `run.output`: the run's record, attempts, checkpoints, metrics and the exported model."""
