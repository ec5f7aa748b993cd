"""Print the numbers of docs/curves.md and draw its pictures from kept runs: `python -m benchmarks.reference_curves`.

    python -m benchmarks.reference_curves --keep demo RUN SHARDS

first takes over the log of a finished run: RUN is its `run.output`, SHARDS its `data.shards`.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from job.data.manifest import load_manifest, open_shard
from job.demo.loss_curve import draw_loss_curve
from job.preflight.assumed_data import WIKIPEDIA_BYTES_PER_TOKEN
from job.runs.metrics_file import read_metrics

KEPT = Path(__file__).parent / "curves"
PICTURES = Path(__file__).parent.parent / "docs"
RUNS = {"demo": "WikiLLM demo", "laptop": "WikiLLM, configs/laptop.yaml"}
"""The kept runs, and the titles of their pictures."""
PUBLISHED = {50: 10.92, 100: 8.10, 150: 7.37, 200: 6.81, 250: 6.31}
"""The tutorial's published loss on one A100: step → mean of 50 steps, in nats per token of Qwen2's vocabulary."""
LOSS = 4.0
"""The loss that the page asks about, in nats per token."""
_PRESETS = {"demo": 2_048, "laptop": 4_096, "wiki-54m": 16_384, "wiki-110m": 16_384, "wiki-123m": 151_646}
"""Entries of each preset's vocabulary."""
_STEPS = (1, 10, 20, 50, 100, 300, 500)
"""Steps in the tables, besides those with an evaluation."""
_SHOWN = ("train/loss", "validation/loss", "validation/bits_per_byte", "train/gradient_norm", "train/learning_rate")


def keep(name: str, run: str, shards_url: str) -> None:
    """Write what the page needs of a run to `KEPT`.

    Args:
        name: one of `RUNS`.
        run: folder or URL of the run.
        shards_url: its data set, in a local folder.
    """
    manifest = load_manifest(shards_url)
    counts = np.zeros(manifest.vocab_size, np.int64)
    for shard in manifest.train:
        tokens, _ = open_shard(Path(shards_url) / shard.name, shard, manifest.dtype)
        counts += np.bincount(tokens, minlength=len(counts))
    rows = [{key: row[key] for key in ("step", *_SHOWN, "train/epoch") if key in row} for row in read_metrics(run)]
    kept = {"vocab_size": manifest.vocab_size, "unigram_nats": round(entropy(counts), 4), "rows": rows}
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Return the entropy of tokens that occur so often, in nats: the least loss of a guess that sees no context."""
    shares = np.asarray(counts)[np.asarray(counts) > 0] / np.sum(counts)
    return float(-(shares * np.log(shares)).sum())


def load(name: str) -> dict[str, Any]:
    """Return what is kept of a run."""
    kept: dict[str, Any] = json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))
    return kept


def preset_rows() -> Iterator[str]:
    """Yield for each preset its vocabulary, the loss of two guesses, bytes per token, and `LOSS` in bits per byte."""
    for name, entries in _PRESETS.items():
        unigram, bytes_per_token = "", WIKIPEDIA_BYTES_PER_TOKEN.get(entries)
        if name in RUNS:
            kept = load(name)
            unigram = f"{kept['unigram_nats']:.2f}"
            last = next(row for row in reversed(kept["rows"]) if "validation/loss" in row)
            bytes_per_token = last["validation/loss"] / math.log(2) / last["validation/bits_per_byte"]
        assert bytes_per_token is not None
        bits_per_byte = LOSS / math.log(2) / bytes_per_token
        cells = name, f"{entries:,}", f"{math.log(entries):.2f}", unigram, f"{bytes_per_token:.2f}"
        yield f"| {' | '.join(cells)} | {bits_per_byte:.2f} |".replace("|  |", "| |")


def run_rows(name: str) -> Iterator[str]:
    """Yield the rows of a run's table: step, epoch, and the metrics in `_SHOWN`."""
    forms = ("{:.2f}", "{:.2f}", "{:.3f}", "{:.2f}", "{:.1e}")
    for row in load(name)["rows"]:
        if row["step"] in _STEPS or "validation/loss" in row:
            cells = [form.format(row[key]) if key in row else "" for key, form in zip(_SHOWN, forms, strict=True)]
            yield f"| {row['step']} | {row['train/epoch']:.2f} | {' | '.join(cells)} |".replace("|  ", "| ")


def published_rows() -> Iterator[str]:
    """Yield the rows of the table of wiki-123m: step and loss."""
    for step, loss in PUBLISHED.items():
        yield f"| {step} | {loss:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep a run if asked to; print the rows of the tables, and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=3, metavar=("NAME", "RUN", "SHARDS"))
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the pictures (default: docs)")
    options = parser.parse_args(arguments)
    if options.keep:
        keep(*options.keep)
    print("presets", *preset_rows(), sep="\n")
    for name, title in RUNS.items():
        print(f"\n{name}", *run_rows(name), sep="\n")
        draw_loss_curve(load(name)["rows"], options.pictures / f"curves-{name}.png", title)
    print("\nwiki-123m, published", *published_rows(), sep="\n")


if __name__ == "__main__":
    main()
