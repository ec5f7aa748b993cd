"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_loss_curve(rows: Sequence[dict[str, Any]], path: Path, title: str, resumed_at: int | None = None) -> None:
    """Draws training and held-out loss over the steps as a PNG.

    Args:
        rows: of metrics.jsonl.
        path: the picture.
        title: above it.
        resumed_at: the step at which the run was stopped and went on, marked by a line.
    """
    from matplotlib.figure import Figure  # half a second of import

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("train/loss", "training", "-"), ("validation/loss", "held out", "o--")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4) if points else None
    if resumed_at is not None:
        axes.axvline(resumed_at, color="grey", linestyle=":", label="stopped and resumed")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
