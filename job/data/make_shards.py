"""The shards of one worker's slices: text is encoded, split into training and validation, and written.

slice → documents → batches of tokens → one shard file per split → part record
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from job import storage
from job.data.corpus import BadRecord, Document, Group, SliceEnd, SliceStart, read_group
from job.data.data_set_plan import ensure_plan
from job.data.encoder import Encoder
from job.data.fingerprint import check_unchanged
from job.data.manifest import Shard, ShardBuilder, TokenType
from job.data.parts import Counts, Part, slice_count
from job.data.recipe import OnBadRecord, OnProgress, Preparation
from job.data.split import is_validation
from job.data.tokenizer import TextTokenizer

_BATCH_CHARACTERS = 2**18
"""Characters of text that are encoded at once: enough to keep the tokenizer's threads busy."""


def token_type(tokenizer: TextTokenizer) -> TokenType:
    """Return the smallest type that holds all token ids."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def make_slices(
    preparation: Preparation,
    worker: tuple[int, int],
    encoder: Encoder,
    on_progress: OnProgress,
    on_bad_record: OnBadRecord,
) -> None:
    """Make the shards of this worker's slices that are not finished yet.

    Args:
        preparation: what to make.
        worker: (i, n): this is worker i of n. It makes the slices whose group and slice numbers add up to i modulo n.
        encoder: makes the tokens.
        on_progress: see `job.data.recipe`.
        on_bad_record: see `job.data.recipe`.

    Raises:
        UserError: as `job.data.prepare.prepare`.
        Disagreement: the encoder's engine turned out to be wrong.
    """
    done = preparation.parts.finished()
    index, workers = worker
    for group in preparation.groups:

        def is_mine(number: int, group: Group = group) -> bool:
            return (group.index + number) % workers == index and (group.index, number) not in done

        if not _is_finished(group, done, is_mine):
            _prepare_group(preparation, group, is_mine, encoder, on_progress, on_bad_record)


def _is_finished(group: Group, done: dict[tuple[int, int], bool], is_mine: Callable[[int], bool]) -> bool:
    """Return True if it is known that no slice of the group is left for this worker."""
    slices = slice_count(group, done)
    return slices is not None and not any(map(is_mine, range(slices)))


class _Batch(NamedTuple):
    """Documents that were encoded together."""

    tokens: NDArray[np.unsignedinteger]
    """The documents' tokens in a row, each document closed by its end-of-document token (`[tokens]`)."""
    lengths: NDArray[np.int64]
    """Tokens of each document, its end-of-document token included (`[documents]`)."""
    utf8_bytes: NDArray[np.int64]
    """Bytes of each document's text (`[documents]`)."""
    characters: NDArray[np.int64]
    """Characters of each document's text (`[documents]`)."""


class _ShardWriter:
    """Collects the documents of one split of one slice, and writes them as a shard."""

    def __init__(self, dtype: TokenType) -> None:
        self._builder = ShardBuilder(dtype)
        self._utf8_bytes = self._characters = 0

    def add(self, batch: _Batch, chosen: NDArray[np.bool_]) -> None:
        """Add the `chosen` documents of a batch (`[documents]`)."""
        self._builder.add(batch.tokens[np.repeat(chosen, batch.lengths)], batch.lengths[chosen])
        self._utf8_bytes += int(batch.utf8_bytes[chosen].sum())
        self._characters += int(batch.characters[chosen].sum())

    def write(self, shards_url: str, name: str) -> Shard | None:
        """Write the shard and return its description; without documents do nothing and return None."""
        if not self._builder.documents:
            return None
        content = self._builder.finish()
        storage.write_bytes(storage.join(shards_url, name), content)
        return Shard(
            name=name,
            tokens=self._builder.tokens,
            documents=self._builder.documents,
            utf8_bytes=self._utf8_bytes,
            characters=self._characters,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )


def _prepare_group(
    preparation: Preparation,
    group: Group,
    is_mine: Callable[[int], bool],
    encoder: Encoder,
    on_progress: OnProgress,
    on_bad_record: OnBadRecord,
) -> None:
    """Make the shards and part records of this worker's slices of a group of files."""
    recipe, tokenizer = preparation.recipe, preparation.tokenizer
    dtype = token_type(tokenizer)
    train, validation, counts, waiting = _ShardWriter(dtype), _ShardWriter(dtype), Counts(), list[Document]()
    waiting_characters = 0

    def flush() -> None:
        """Encode the waiting documents and add them to the shards."""
        nonlocal waiting_characters
        if not waiting:
            return
        texts, utf8_texts = [document.text for document in waiting], [document.text.encode() for document in waiting]
        ids, ends = encoder.encode(texts, utf8_texts)
        batch = _Batch(
            tokens=np.insert(ids, ends, tokenizer.eod_id),
            lengths=np.diff(ends, prepend=0) + 1,
            utf8_bytes=np.array([len(utf8_text) for utf8_text in utf8_texts], np.int64),
            characters=np.array([len(text) for text in texts], np.int64),
        )
        seed, fraction = recipe.seed, recipe.validation_fraction
        for_validation = np.array(
            [is_validation(document.id, document.text, seed, fraction) for document in waiting], np.bool_
        )
        train.add(batch, ~for_validation)
        validation.add(batch, for_validation)
        counts.normalized += sum(map(tokenizer.is_changed_by_normalizer, texts))
        counts.encoded_tokens += len(batch.tokens)
        on_progress(len(waiting), int(batch.utf8_bytes.sum()))
        waiting.clear()
        waiting_characters = 0

    for record in read_group(group, recipe.slice_bytes, is_mine, recipe.text_field, recipe.id_field):
        match record:
            case SliceStart():
                train, validation, counts = _ShardWriter(dtype), _ShardWriter(dtype), Counts()
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
                check_unchanged(group.files, preparation.versions)
                ensure_plan(preparation.plan, preparation.shards_url)
                name = f"{group.index:05d}-{number:05d}-{preparation.plan.label}.bin"
                part = Part(
                    group=group.index,
                    slice=number,
                    is_last=is_last,
                    counts=counts,
                    train=train.write(preparation.shards_url, f"train/{name}"),
                    validation=validation.write(preparation.shards_url, f"validation/{name}"),
                    plan=preparation.plan.digest,
                )
                preparation.parts.write(part)
