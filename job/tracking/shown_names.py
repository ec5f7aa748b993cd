"""The names under which trackers show the metrics of a run: each chart is in one of five groups.

A tracker puts a chart into the section that the name has before its slash. The names in logs/metrics.jsonl are those on
the left.
"""

GROUPS = ("train", "validation", "speed", "data", "checkpoint")
"""Sections of the charts, in the order of the table below."""
TOKENS_SEEN = "data/tokens_seen"
"""Shown name of the tokens trained on so far, which a tracker can take as the axis of a chart."""
SHOWN_NAMES = {
    "train/loss": "train/loss",
    "train/learning_rate": "train/learning_rate",
    "train/gradient_norm": "train/gradient_norm",
    "train/skipped_steps": "train/skipped_steps",
    "train/loss_scale": "train/loss_scale",
    "validation/loss": "validation/loss",
    "validation/bits_per_byte": "validation/bits_per_byte",
    "validation/bits_per_character": "validation/bits_per_character",
    "samples": "validation/samples",
    "speed/tokens_per_second": "speed/tokens_per_second",
    "speed/seconds_per_step": "speed/seconds_per_step",
    "speed/mfu": "speed/mfu",
    "memory/peak_gib": "speed/peak_memory_gib",
    "train/tokens_seen": TOKENS_SEEN,
    "train/epoch": "data/epoch",
    "speed/data_wait": "data/wait",
    "speed/stall": "checkpoint/stall",
}
"""Name of a metric, or of texts, in this program → name under which every tracker shows it."""


def shown_name(name: str) -> str:
    """Return the name under which trackers show a metric; a name that is not in the table stays as it is."""
    return SHOWN_NAMES.get(name, name)
