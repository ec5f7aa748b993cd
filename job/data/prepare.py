"""The corpus as token shards: one slice of input makes one shard per split, whoever does the work, in whatever order.

    corpus files → plan.json (created once, see `job.data.data_set_plan`)
    group of files → slices → (this worker's) → tokens of whole documents → shard files → part record
    all part records of the plan there → tokenizer → manifest.json

Everything a worker writes follows from the plan and the slice alone, so workers that share nothing but the object
store agree, a worker that died is simply run again, and doing a slice twice does no harm. If the fast tokenizer turns
out to be wrong, that costs time and nothing else: what it made is made again.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from job import storage
from job.data.corpus import (
    BadRecord,
    Document,
    Group,
    OnListed,
    SliceEnd,
    SliceStart,
    list_corpus,
    read_group,
    share_slices,
)
from job.data.data_set_plan import Plan, claimed, finished_data_set, make_plan, remove, renew
from job.data.dataset_files import ALL, Choice
from job.data.encoder import Disagreement, Encoder, Engine
from job.data.fingerprint import Identified, check_unchanged, identify
from job.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardBuilder,
    TokenType,
    load_manifest,
    manifest_bytes,
)
from job.data.parts import Counts, Part, Parts, slices_of
from job.data.split import SPLIT_RULE, is_held_out
from job.data.tokenizer import TextTokenizer, replace_tokenizer
from job.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
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
    choice: Choice = ALL

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that all workers of a data set must have in common, by name."""
        return self.choice.settings | {
            "data.text_field": self.text_field,
            "data.id_field": self.id_field,
            "data.slice_bytes": self.slice_bytes,
            "data.validation_fraction": self.validation_fraction,
            "data.seed": self.seed,
        }

    def tolerate(self, record: BadRecord) -> None:
        """Raises a UserError unless bad records are to be left out."""
        if self.on_bad_record == "stop":
            wrong = f"bad record at {record.position}: {record.reason}"
            remedy = record.remedy or "mend it, or set data.on_bad_record to skip"
            if record.setting in self.settings:
                raise UserError(record.setting, self.settings[record.setting], f"{record.url}: {wrong}", remedy)
            raise UserError(record.setting, record.url, wrong, remedy)


OnProgress = Callable[[int, int], None]
"""Called with documents and UTF-8 bytes of text done since the last call."""
OnNotice = Callable[[str], None]
OnIdentified = Callable[[Identified], None]


@dataclass(frozen=True)
class Work:
    """Everything that a process has to know to make its slices."""

    recipe: Recipe
    tokenizer: TextTokenizer
    shards_url: str
    plan: Plan
    groups: tuple[Group, ...]
    versions: tuple[str, ...]
    """`storage.Ranges.version` of each file when the plan was made."""

    @property
    def parts(self) -> Parts:
        """The records of its finished slices."""
        return Parts(self.shards_url, self.plan)


def prepare(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    worker: tuple[int, int] = (0, 1),
    on_progress: OnProgress = lambda documents, utf8_bytes: None,
    on_bad_record: Callable[[BadRecord], None] = lambda record: None,
    on_notice: OnNotice = lambda line: None,
    engine: Engine = "auto",
    on_identified: OnIdentified = lambda corpus: None,
    on_listed: OnListed = lambda listing: None,
) -> Manifest | None:
    """Make this worker's shards, and the manifest if all workers' shards are there then.

    Args:
        recipe: what to make.
        tokenizer: how to make tokens of text; it is stored beside the shards.
        shards_url: the folder or URL of the data set.
        worker: (i, n): this is worker i of n.
        on_progress: told what was done, several times a second.
        on_bad_record: told of every record that is left out.
        on_notice: told in one line why it takes longer than it might.
        engine: what makes the tokens: see `job.data.encoder`. It changes the time, never a byte.
        on_identified: told what the corpus is, before anything is made of it.
        on_listed: told before that which files are taken, and which are left out.

    Returns:
        The manifest if the data set is complete, None if other workers still have slices to do.

    Raises:
        UserError: the corpus cannot be read, changes while it is read, or has a bad record while the recipe says stop;
            or `shards_url` already holds a data set made by another plan.
    """

    def make(work: Work, engine: Engine) -> None:
        make_slices(work, worker, Encoder(tokenizer, engine, on_notice), on_progress, on_bad_record)

    index, workers = worker
    parts = (range(index, index + 1), workers)
    return carry_out(recipe, tokenizer, shards_url, parts, engine, make, on_notice, on_identified, on_listed)


def carry_out(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    parts: tuple[range, int],
    engine: Engine,
    make: Callable[[Work, Engine], None],
    on_notice: OnNotice,
    on_identified: OnIdentified,
    on_listed: OnListed,
) -> Manifest | None:
    """Agree with the other workers on the plan, have the slices made, and publish the manifest if it is complete.

    Args:
        recipe, tokenizer, shards_url, engine, on_notice, on_identified, on_listed: as `prepare`.
        parts: which parts of how many are this worker's.
        make: makes the slices of these parts with an engine; may raise `Disagreement`.
    """
    files = list_corpus(recipe.source, on_listed, recipe.choice)
    identified = identify(files)
    on_identified(identified)
    plan = make_plan(identified.fingerprints, recipe.settings | {"tokenizer.source": tokenizer.fingerprint})
    if (manifest := finished_data_set(plan, shards_url)) is not None:
        return manifest
    # The groups follow from the sizes in the plan: a file may have grown since it was listed.
    sized = [replace(file, size=one.size) for file, one in zip(files, plan.source, strict=True)]
    groups = share_slices(sized, recipe.slice_bytes)
    work = Work(recipe, tokenizer, shards_url, plan, groups, identified.versions)
    with claimed(plan, shards_url, lambda: bool(work.parts.finished())):
        _make_exactly(work, parts, engine, make, on_notice)
        return _publish_manifest(work)


def _make_exactly(
    work: Work, parts: tuple[range, int], engine: Engine, make: Callable[[Work, Engine], None], on_notice: OnNotice
) -> None:
    """Have the slices made; if the tokenizer's fast engine was wrong, have them made again with the reference.

    The slices of these parts that the first try finished count as never made.
    """
    before = work.parts.finished()
    try:
        make(work, engine)
    except Disagreement as found:
        on_notice(f"{found}: what was made in this run is made again with the reference, slowly")
        mine, workers = parts
        made = {part: is_last for part, is_last in work.parts.finished().items() if part not in before}
        storage.delete(
            work.parts.url_of(group, number, is_last)
            for (group, number), is_last in made.items()
            if (group + number) % workers in mine
        )
        make(work, "reference")


def make_slices(
    work: Work,
    worker: tuple[int, int],
    encoder: Encoder,
    on_progress: OnProgress,
    on_bad_record: Callable[[BadRecord], None],
) -> None:
    """Make the shards of this worker's slices that are not finished yet.

    Raises:
        UserError: as `prepare`.
        Disagreement: the encoder's engine turned out to be wrong.
    """
    done = work.parts.finished()
    index, workers = worker
    for group in work.groups:

        def mine(number: int, group: Group = group) -> bool:
            return (group.index + number) % workers == index and (group.index, number) not in done

        if not _is_finished(group, done, mine):
            _prepare_group(work, group, mine, encoder, on_progress, on_bad_record)


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


def _prepare_group(
    work: Work,
    group: Group,
    mine: Callable[[int], bool],
    encoder: Encoder,
    on_progress: OnProgress,
    on_bad_record: Callable[[BadRecord], None],
) -> None:
    recipe, tokenizer = work.recipe, work.tokenizer
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

    for record in read_group(group, recipe.slice_bytes, mine, recipe.text_field, recipe.id_field):
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
                check_unchanged(group.files, work.versions)
                renew(work.plan, work.shards_url)
                name = f"{group.index:05d}-{number:05d}-{work.plan.label}.bin"
                part = Part(
                    group=group.index,
                    slice=number,
                    is_last=is_last,
                    counts=counts,
                    train=train.store(work.shards_url, f"train/{name}"),
                    validation=validation.store(work.shards_url, f"validation/{name}"),
                    plan=work.plan.digest,
                )
                work.parts.write(part)


# ---- The data set that the parts make ----


def _dtype(tokenizer: TextTokenizer) -> TokenType:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _is_finished(group: Group, done: dict[tuple[int, int], bool], mine: Callable[[int], bool]) -> bool:
    slices = slices_of(group, done)
    return slices is not None and not any(map(mine, range(slices)))


def _publish_manifest(work: Work) -> Manifest | None:
    """Write the manifest if every slice is finished, and the tokenizer before it."""
    recipe, tokenizer, shards_url = work.recipe, work.tokenizer, work.shards_url
    done = work.parts.finished()
    wanted: list[tuple[int, int]] = []
    for group in work.groups:
        slices = slices_of(group, done)
        if slices is None or any((group.index, number) not in done for number in range(slices)):
            return None
        wanted += [(group.index, number) for number in range(slices)]
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda part: work.parts.read(part[0], part[1], done[part]), wanted))
    counts = Counts()
    for part in parts:
        counts.add(part.counts)
    train = tuple(part.train for part in parts if part.train is not None)
    validation = tuple(part.validation for part in parts if part.validation is not None)
    if not train:
        # The same place can be used with other settings: nothing of this plan stays.
        storage.delete(storage.join(shards_url, shard.name) for shard in validation)
        storage.delete_tree(work.parts.url)
        remove(work.plan, shards_url)
        expected = f"no text to train on ({counts.documents} documents, {counts.empty} empty, {counts.bad} bad)"
        raise UserError("data.source", recipe.source, expected, f"is data.text_field {recipe.text_field!r} right?")
    contents = [tokenizer.fingerprint, *(shard.sha256 for shard in train), "", *(shard.sha256 for shard in validation)]
    manifest = Manifest(
        fingerprint=hashlib.sha256("\n".join(contents).encode()).hexdigest(),
        plan=work.plan.digest,
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
    renew(work.plan, shards_url)
    replace_tokenizer(tokenizer, storage.join(shards_url, TOKENIZER_FOLDER))
    storage.create_bytes(storage.join(shards_url, MANIFEST_NAME), manifest_bytes(manifest))
    return load_manifest(shards_url)
