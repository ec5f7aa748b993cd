"""Follow one token of the demonstration from its article to its gradient: `python -m benchmarks.tour`.

docs/tour.md explains the numbers that this prints. The settings are those of configs/demo.yaml; a setting is changed as
for `python -m job` (`--train.learning_rate 1e-3`). One process does the work of the demonstration's two: it takes the
micro-batches of both, so losses and gradients are the same up to rounding.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist

from benchmarks.tour_step import Station, train_stations
from job import config as settings
from job.cli import parse
from job.commands import recipe_of
from job.config import Config
from job.data.batching import optimizer_steps
from job.data.corpus import list_corpus, read_slices
from job.data.documents import Document
from job.data.manifest import Manifest, open_shard
from job.data.order import SequenceOrder
from job.data.prepare import prepare
from job.data.split import is_validation
from job.data.text_sample import sample_corpus
from job.data.tokenizer import TextTokenizer, train_tokenizer
from job.demo.walk import SAMPLE
from job.log_setup import silence_libraries
from job.runs.checkpoint import CheckpointName
from job.training.schedule import learning_rate

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
ARTICLE_ID = "1"
WORD = "美国"
"""The token: this word where it first stands in the article."""


def follow(config: Config, folder: Path) -> Iterator[Station]:
    """Yield the stations of the token, with the demonstration's data set made in `folder`."""
    data, train = config.data, config.train
    sample, _ = sample_corpus(recipe_of(config), int(config.tokenizer.train_bytes), 1)
    tokenizer = train_tokenizer(sample.texts(), config.tokenizer.vocab_size, folder / "tokenizer")
    manifest = prepare(recipe_of(config), tokenizer, data.shards)
    assert manifest is not None

    # ---- Data ----
    (file,) = list_corpus(data.source)
    items = read_slices(file, int(data.slice_bytes), lambda _: True, data.text_field, data.id_field)
    documents = (item for item in items if isinstance(item, Document))
    line, document = next((line, one) for line, one in enumerate(documents, 1) if one.id == ARTICLE_ID)
    text, at = document.text, document.text.index(WORD)
    sizes = {"characters": f"{len(text):,}", "bytes": f"{len(text.encode()):,}"}
    yield "article", {"line": line, "id": document.id, **sizes, "characters before the word": at}

    share, splits = data.validation_fraction, {"training": manifest.train, "validation": manifest.validation}
    counts = {f"{name} documents": sum(shard.documents for shard in shards) for name, shards in splits.items()}
    yield "split", {"hash from 0 to 1": f"{_hash_of(document, data.seed):.4f}", "share for validation": share, **counts}

    ids = tokenizer.encode([text])[0]
    ends_at = np.cumsum([len(tokenizer.token_bytes[one]) for one in ids])
    index = int(np.searchsorted(ends_at, len(text[:at].encode()), side="right"))
    token = ids[index]
    of_article = {"number of the token": index, "tokens of the article": len(ids)}
    yield "tokenizer", _of_tokenizer(tokenizer, text, at, token) | of_article

    number, start, end = _find(manifest, data.shards, ids)
    offset, shard = start + index, manifest.train[number]
    of_shard = {"shard": number, "tokens of the shard": f"{shard.tokens:,}", "type of the tokens": manifest.dtype}
    of_end = {"end-of-document id": manifest.eod_id, "offset of the end-of-document token": end - 1}
    yield "shard", {**of_shard, "offset of the token": offset, **of_end}

    shard_tokens, shard_bytes = zip(*((one.tokens, one.size) for one in manifest.train), strict=True)
    order = SequenceOrder(shard_tokens, shard_bytes, train.context_length, data.seed, int(data.shuffle_bytes))
    sequence, column = divmod(offset - 1, train.context_length)
    lengths = {"of the shard": order.sequence_counts[number], "of an epoch": order.sequences_per_epoch}
    named = {f"sequences {name}": count for name, count in lengths.items()}
    yield "sequence", {"sequence": sequence, "position as a label": column, **named}

    shards, sequences = order.sequence_ids(0, order.sequences_per_epoch)
    (position,) = np.flatnonzero((shards == number) & (sequences == sequence)).tolist()
    steps_before, row = divmod(position, train.global_batch_size)
    steps, _ = optimizer_steps(order.position_limit(train.epochs), train.global_batch_size, train.max_steps)
    yield "order", {"position": position, "step": steps_before + 1, "steps": steps, "row of the batch": row}

    # ---- Training ----
    rates = [
        learning_rate(
            step,
            schedule=train.schedule,
            peak=train.learning_rate,
            minimum=train.min_learning_rate,
            warmup_steps=train.warmup_steps,
            decay_steps=train.decay_steps,
            total_steps=steps,
        )
        for step in range(steps_before + 1)
    ]
    yield from train_stations(config, manifest, order, rates, token, row, column)

    every = config.checkpoint.every
    saved = math.ceil((steps_before + 1) / every) * every
    consumed = saved * train.global_batch_size
    progress = {"sequences consumed": f"{consumed:,}", "epochs": f"{consumed / order.sequences_per_epoch:.2f}"}
    yield "checkpoint", {"name": CheckpointName(saved, 1), **progress}


def _hash_of(document: Document, seed: int) -> float:
    """Return the hash that decides the split: the document is for validation if the share is larger than this."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if is_validation(document.id, document.text, seed, middle) else (middle, high)
    return low


def _of_tokenizer(tokenizer: TextTokenizer, text: str, at: int, token: int) -> dict[str, object]:
    """Return how the tokenizer makes a token that begins with character `at` of a text."""
    path = tokenizer.folder / "tokenizer.json"
    merges = json.loads(path.read_text(encoding="utf-8"))["model"]["merges"]
    pieces = tokenizers.Tokenizer.from_file(str(path)).pre_tokenizer.pre_tokenize_str(text)
    merge = token - (tokenizer.vocab_size - len(merges))
    return {
        "entries": f"{tokenizer.vocab_size:,}",
        "merges": f"{len(merges):,}",
        "piece": next(text[start:end] for _, (start, end) in pieces if start <= at < end),
        "number of the merge": merge + 1,
        "merge": " + ".join(tokenizer.token_bytes[tokenizer.vocabulary[part]].decode() for part in merges[merge]),
        "id": token,
        "bytes of the token": tokenizer.token_bytes[token].hex(" ").upper(),
    }


def _find(manifest: Manifest, shards_url: str, ids: Sequence[int]) -> tuple[int, int, int]:
    """Return the training shard that has a document of these tokens, and where the document begins and ends in it."""
    for number, shard in enumerate(manifest.train):
        tokens, ends = open_shard(Path(shards_url) / shard.name, shard, manifest.dtype)
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            if tokens[start : end - 1].tolist() == list(ids):
                return number, start, end
    raise RuntimeError("no training shard has the document")


def main(words: Sequence[str] | None = None) -> None:
    """Print the stations."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    silence_libraries()
    torch.set_num_threads(1)
    arguments = parse(["train", "--config", str(CONFIG), *(sys.argv[1:] if words is None else words)])
    with tempfile.TemporaryDirectory(prefix="tour-") as name:
        folder = Path(name)
        places = {"data.source": SAMPLE, "data.shards": folder / "shards", "data.cache_dir": folder / "cache"}
        overrides = [*arguments.overrides, *((setting, str(path)) for setting, path in places.items())]
        for number, (station, values) in enumerate(follow(settings.load(arguments.config_path, overrides), folder), 1):
            print(f"{number}. {station}")
            for label, value in values.items():
                print(f"   {label:<38}{value}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
