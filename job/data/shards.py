"""The corpus as token shards: one slice of input makes one shard per split, whoever does the work, in whatever order.

    corpus file → slices → (this worker's) → tokens of whole documents → shard files → part record
    all part records there → manifest.json

Everything a worker writes follows from the recipe and the slice alone, so workers that share nothing but the object
store agree, a worker that died is simply run again, and doing a slice twice does no harm. So it is that a tokenizer
which turns out to be wrong costs time and no more: what it made is made again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from job import storage
from job.data.corpus import BadRecord, CorpusFile, Document, SliceEnd, SliceStart, list_corpus, read_slices
from job.data.encoder import Disagreement, Encoder, Engine
from job.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardBuilder,
    TokenType,
    load_manifest,
    manifest_bytes,
)
from job.data.split import SPLIT_RULE, is_held_out
from job.data.tokenizer import TextTokenizer, store_tokenizer
from job.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
_PLAN_NAME = "plan.json"
_PART_NAME = re.compile(r".*/(\d+)-(\d+)(-last)?\.json")
_BATCH_CHARACTERS = 2**18  # text handed to the tokenizer at once: enough to keep its threads busy


@dataclass(frozen=True)
class Recipe:
    """What decides the content of a data set, apart from the corpus and the tokenizer."""

    source: str
    text_field: str
    id_field: str
    on_bad_record: str
    """``stop`` or ``skip``."""
    slice_bytes: int
    validation_fraction: float
    seed: int

    def tolerate(self, record: BadRecord) -> None:
        """Raises a UserError unless bad records are to be left out."""
        if self.on_bad_record == "stop":
            wrong = f"bad record at {record.position}: {record.reason}"
            raise UserError("data.source", record.url, wrong, "mend it, or set data.on_bad_record to skip")


@dataclass
class Counts:
    """What was seen in a slice, or in all of them. Bad records are those left out."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    normalized: int = 0
    encoded_tokens: int = 0

    def add(self, other: "Counts") -> None:
        """Adds the counts of another slice to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Part:
    """The record of a finished slice; where it exists, the slice's shards exist."""

    file: int
    slice: int
    is_last: bool
    counts: Counts
    train: Shard | None
    validation: Shard | None


OnProgress = Callable[[int, int], None]
"""Called with documents and UTF-8 bytes of text done since the last call."""
OnNotice = Callable[[str], None]


def prepare(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    worker: tuple[int, int] = (0, 1),
    on_progress: OnProgress = lambda documents, utf8_bytes: None,
    on_bad_record: Callable[[BadRecord], None] = lambda record: None,
    on_notice: OnNotice = lambda line: None,
    engine: Engine = "auto",
) -> Manifest | None:
    """Makes this worker's shards, and the manifest if all workers' shards are there then.

    Args:
        recipe: what to make.
        tokenizer: how to make tokens of text; it is stored beside the shards.
        shards_url: the folder or URL of the data set.
        worker: (i, n): this is worker i of n.
        on_progress: told what was done, several times a second.
        on_bad_record: told of every record that is left out.
        on_notice: told in one line why it takes longer than it might.
        engine: what makes the tokens: see `job.data.encoder`. It changes the time, never a byte.

    Returns:
        The manifest if the data set is complete, None if other workers still have slices to do.

    Raises:
        UserError: the corpus cannot be read, has a bad record while the recipe says stop, or `shards_url` already
            holds a data set made otherwise.
    """

    def attempt(engine: Engine) -> Manifest | None:
        encoder = Encoder(tokenizer, engine, on_notice)
        return prepare_with(encoder, recipe, tokenizer, shards_url, worker, on_progress, on_bad_record)

    index, workers = worker
    return exactly(attempt, engine, shards_url, (range(index, index + 1), workers), on_notice)


def exactly(
    attempt: Callable[[Engine], Manifest | None],
    engine: Engine,
    shards_url: str,
    parts: tuple[range, int],
    on_notice: OnNotice,
) -> Manifest | None:
    """What `attempt` makes; if the tokenizer it used was wrong, what it makes with the reference instead.

    The slices of these `parts` (which of how many) that the attempt finished count as never made.
    """
    before = _finished_parts(shards_url)
    try:
        return attempt(engine)
    except Disagreement as found:
        on_notice(f"{found}: what was made in this run is made again with the reference, slowly")
        mine, workers = parts
        made = {part: is_last for part, is_last in _finished_parts(shards_url).items() if part not in before}
        storage.delete(
            _part_url(shards_url, file, number, is_last)
            for (file, number), is_last in made.items()
            if (file + number) % workers in mine
        )
        return attempt("reference")


def prepare_with(
    encoder: Encoder,
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    worker: tuple[int, int],
    on_progress: OnProgress,
    on_bad_record: Callable[[BadRecord], None],
) -> Manifest | None:
    """`prepare` with this encoder; raises `Disagreement` where that turns out to be wrong."""
    files = list_corpus(recipe.source)
    _agree_on_plan(recipe, tokenizer, files, shards_url)
    store_tokenizer(tokenizer, storage.join(shards_url, TOKENIZER_FOLDER), "data.shards")
    if storage.exists(storage.join(shards_url, MANIFEST_NAME)):
        return load_manifest(shards_url)
    done = _finished_parts(shards_url)
    index, workers = worker
    for file in files:

        def mine(number: int, file: CorpusFile = file) -> bool:
            return (file.index + number) % workers == index and (file.index, number) not in done

        if not _is_finished(file, done, mine):
            _prepare_file(file, mine, recipe, tokenizer, encoder, shards_url, on_progress, on_bad_record)
    return _publish_manifest(recipe, tokenizer, files, shards_url)


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """The data set in numbers, as rows of name and value."""
    said = manifest.statistics
    tokens = sum(shard.tokens for shard in manifest.train + manifest.validation)
    utf8_bytes = sum(shard.utf8_bytes for shard in manifest.train + manifest.validation)
    characters = sum(shard.characters for shard in manifest.train + manifest.validation)
    train, validation = (sum(shard.documents for shard in split) for split in (manifest.train, manifest.validation))
    text_tokens = max(1, tokens - train - validation)
    rows = [
        ("documents", f"{said['documents']:,}"),
        ("  empty, left out", f"{said['empty']:,}"),
        ("  bad, left out", f"{said['bad']:,}"),
        ("  train / validation", f"{train:,} / {validation:,}"),
        ("UTF-8 bytes of text", f"{utf8_bytes:,}"),
        ("characters", f"{characters:,}"),
        ("tokens", f"{tokens:,}"),
        ("tokens per character", f"{text_tokens / max(1, characters):.3f}"),
        ("bytes per token", f"{utf8_bytes / text_tokens:.3f}"),
        ("shards", f"{len(manifest.train)} + {len(manifest.validation)}"),
        ("tokens dropped", f"{said['encoded_tokens'] - tokens:,}"),
    ]
    if said["normalized"]:
        rows.append(("documents changed by the tokenizer's normalizer", f"{said['normalized']:,}"))
    return rows


# ---- One slice ----


class _Batch(NamedTuple):
    """Documents that were made into tokens together."""

    tokens: NDArray[np.unsignedinteger]
    """`[tokens]`, each document's closed by its end."""
    lengths: NDArray[np.int64]
    """Tokens of each document, its end included; like the others, `[documents]`."""
    utf8_bytes: NDArray[np.int64]
    characters: NDArray[np.int64]


class _Writer:
    """Collects the documents of one split of one slice."""

    def __init__(self, dtype: TokenType) -> None:
        self._shard = ShardBuilder(dtype)
        self._utf8_bytes = self._characters = 0

    def add(self, batch: _Batch, chosen: NDArray[np.bool_]) -> None:
        """Takes the `chosen` documents of a batch."""
        self._shard.add(batch.tokens[np.repeat(chosen, batch.lengths)], batch.lengths[chosen])
        self._utf8_bytes += int(batch.utf8_bytes[chosen].sum())
        self._characters += int(batch.characters[chosen].sum())

    def store(self, shards_url: str, name: str) -> Shard | None:
        """Writes the shard, and tells what it is; None if there is no document."""
        if not self._shard.documents:
            return None
        content = self._shard.finish()
        storage.write_bytes(storage.join(shards_url, name), content)
        return Shard(
            name=name,
            tokens=self._shard.tokens,
            documents=self._shard.documents,
            utf8_bytes=self._utf8_bytes,
            characters=self._characters,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )


def _prepare_file(
    file: CorpusFile,
    mine: Callable[[int], bool],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    encoder: Encoder,
    shards_url: str,
    on_progress: OnProgress,
    on_bad_record: Callable[[BadRecord], None],
) -> None:
    dtype = _dtype(tokenizer)
    train, validation, counts, waiting = _Writer(dtype), _Writer(dtype), Counts(), list[Document]()
    waiting_characters = 0

    def flush() -> None:
        nonlocal waiting_characters
        if not waiting:
            return
        texts, spelled = [one.text for one in waiting], [one.text.encode() for one in waiting]
        ids, ends = encoder.encode(texts, spelled)
        batch = _Batch(
            tokens=np.insert(ids, ends, tokenizer.eod_id),
            lengths=np.diff(ends, prepend=0) + 1,
            utf8_bytes=np.array([len(one) for one in spelled], np.int64),
            characters=np.array([len(one) for one in texts], np.int64),
        )
        held_out = np.array(
            [is_held_out(one.id, one.text, recipe.seed, recipe.validation_fraction) for one in waiting], np.bool_
        )
        train.add(batch, ~held_out)
        validation.add(batch, held_out)
        counts.normalized += sum(map(tokenizer.changes, texts))
        counts.encoded_tokens += len(batch.tokens)
        on_progress(len(waiting), int(batch.utf8_bytes.sum()))
        waiting.clear()
        waiting_characters = 0

    for record in read_slices(file, recipe.slice_bytes, mine, recipe.text_field, recipe.id_field):
        match record:
            case SliceStart():
                train, validation, counts = _Writer(dtype), _Writer(dtype), Counts()
            case Document(text=""):
                counts.documents += 1
                counts.empty += 1
            case Document(text=text):
                counts.documents += 1
                waiting.append(record)
                waiting_characters += len(text)
                if waiting_characters >= _BATCH_CHARACTERS:
                    flush()
            case BadRecord():
                recipe.tolerate(record)
                counts.bad += 1
                on_bad_record(record)
            case SliceEnd(index=number, is_last=is_last):
                flush()
                name = f"{file.index:05d}-{number:05d}"
                part = Part(
                    file=file.index,
                    slice=number,
                    is_last=is_last,
                    counts=counts,
                    train=train.store(shards_url, f"train/{name}.bin"),
                    validation=validation.store(shards_url, f"validation/{name}.bin"),
                )
                storage.write_json(_part_url(shards_url, file.index, number, is_last), asdict(part))


# ---- What the workers agree on ----


def _dtype(tokenizer: TextTokenizer) -> TokenType:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _agree_on_plan(recipe: Recipe, tokenizer: TextTokenizer, files: list[CorpusFile], shards_url: str) -> None:
    """Fixes what decides the content of the data set; refuses a folder where another one is kept.

    `on_bad_record` is no part of it: who stopped at a bad record may go on by leaving it out, and the rest is the same.
    """
    plan = {
        "format_version": FORMAT_VERSION,
        "data.source": [{"url": file.url, "size": file.size} for file in files],
        "data.text_field": recipe.text_field,
        "data.id_field": recipe.id_field,
        "data.slice_bytes": recipe.slice_bytes,
        "data.validation_fraction": recipe.validation_fraction,
        "data.seed": recipe.seed,
        "tokenizer.source": tokenizer.fingerprint,
    }
    url = storage.join(shards_url, _PLAN_NAME)
    content = json.dumps(plan, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"
    if storage.create_bytes(url, content):
        return
    try:
        found = dict(storage.read_json(url))
    except (ValueError, TypeError):
        found = {}
    different = [name for name in plan if found.get(name) != plan[name]]
    if different and found.keys() == plan.keys() and not _finished_parts(shards_url):  # planned, but never begun
        storage.write_bytes(url, content)
    elif different:
        expected = f"holds a data set that differs in {', '.join(different)}"
        raise UserError("data.shards", shards_url, expected, "choose another place for this one, or delete that one")


def _part_url(shards_url: str, file: int, number: int, is_last: bool) -> str:
    return storage.join(shards_url, "parts", f"{file:05d}-{number:05d}{'-last' if is_last else ''}.json")


def _finished_parts(shards_url: str) -> dict[tuple[int, int], bool]:
    """(file, slice) of every finished slice, and whether it is its file's last."""
    found = (_PART_NAME.fullmatch(entry.url) for entry in storage.list_files(storage.join(shards_url, "parts")))
    return {(int(part[1]), int(part[2])): part[3] is not None for part in found if part}


def _slices(file: CorpusFile, done: dict[tuple[int, int], bool]) -> int | None:
    """How many slices a file has, if that is known yet."""
    return next((number + 1 for (index, number), is_last in done.items() if index == file.index and is_last), None)


def _is_finished(file: CorpusFile, done: dict[tuple[int, int], bool], mine: Callable[[int], bool]) -> bool:
    slices = _slices(file, done)
    return slices is not None and not any(map(mine, range(slices)))


def _publish_manifest(
    recipe: Recipe, tokenizer: TextTokenizer, files: Iterable[CorpusFile], shards_url: str
) -> Manifest | None:
    done = _finished_parts(shards_url)
    wanted: list[str] = []
    for file in files:
        slices = _slices(file, done)
        if slices is None or any((file.index, number) not in done for number in range(slices)):
            return None
        wanted += [_part_url(shards_url, file.index, number, done[file.index, number]) for number in range(slices)]
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(storage.read_json, wanted))
    counts = Counts()
    for part in parts:
        counts.add(Counts(**part["counts"]))
    train, validation = (
        tuple(Shard(**part[split]) for part in parts if part[split]) for split in ("train", "validation")
    )
    if not train:
        for folder in ("parts", "validation"):  # so that the same place can be used with other settings
            storage.delete_tree(storage.join(shards_url, folder))
        expected = f"no text to train on ({counts.documents} documents, {counts.empty} empty, {counts.bad} bad)"
        raise UserError("data.source", recipe.source, expected, f"is data.text_field {recipe.text_field!r} right?")
    contents = [tokenizer.fingerprint, *(shard.sha256 for shard in train), "", *(shard.sha256 for shard in validation)]
    manifest = Manifest(
        fingerprint=hashlib.sha256("\n".join(contents).encode()).hexdigest(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer=TOKENIZER_FOLDER,
        vocab_size=tokenizer.vocab_size,
        dtype=_dtype(tokenizer),
        eod_id=tokenizer.eod_id,
        seed=recipe.seed,
        validation_fraction=recipe.validation_fraction,
        split_rule=SPLIT_RULE,
        train=train,
        validation=validation,
        statistics=asdict(counts),
    )
    storage.create_bytes(storage.join(shards_url, MANIFEST_NAME), manifest_bytes(manifest))
    return load_manifest(shards_url)
