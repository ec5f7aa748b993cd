"""The data set that the plan assumes before `prepare` has made one.

    stored bytes x share that is text / bytes of text per token = tokens

The share comes from the first documents, and the bytes per token from the tokenizer, if it can be read. Each number
that is not known yet is assumed, and the plan prints which.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from job import storage
from job.config_data import Data, Tokenizer
from job.data import hub, parquet
from job.data.corpus import BadRecord, CorpusFile, Document, Listing, SliceEnd, read_slices
from job.data.json_stream import ByteStream
from job.data.manifest import Manifest, Shard, TokenType, shard_size
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.data.tokenizer_download import is_hub_name
from job.errors import UserError
from job.preflight.findings import Findings

_HUB_VOCAB_SIZE, _HUB_BYTES_PER_TOKEN = 151_646, 4.5
"""Those of Qwen2's tokenizer: 4.48 bytes of UTF-8 a token, measured by this project on Chinese news."""
_OWN_BYTES_PER_TOKEN = {1024: 2.29, 2048: 2.80, 4096: 3.30, 8192: 3.81, 16_384: 4.27}
"""Bytes of Chinese Wikipedia per token, by the entries of a BPE trained on it, measured by this project: the first four
on the 1.4 MB of text that they were trained on, the last on held-out text."""
WIKIPEDIA_TOKENS = 400e6
"""Tokens of the tutorial's corpus, fjcanyue/wikipedia-zh-cn, in Qwen2's vocabulary."""
WIKIPEDIA_BYTES_PER_TOKEN = {_HUB_VOCAB_SIZE: 3.893, 16_384: 4.266}
"""Bytes of held-out Chinese Wikipedia per token, by the entries of the vocabulary: Qwen2's and one of our own."""
_KNOWN_TEXT_BYTES = {"fjcanyue/wikipedia-zh-cn": WIKIPEDIA_TOKENS * WIKIPEDIA_BYTES_PER_TOKEN[_HUB_VOCAB_SIZE]}
"""Bytes of text of the corpora on hubs for which a plan can be made before anything is downloaded."""
_SAMPLE_BYTES = 2**20
"""Decompressed bytes of the first file whose documents are read."""
_HEAD_BYTES = 2**18
"""Stored bytes of the first file that are decompressed to learn how much larger it becomes."""
_MOST_SHARDS = 1000
"""More shards change the number of steps by less than one in a thousand, and take time to list."""


@dataclass(frozen=True)
class AssumedData:
    """A data set that does not exist yet."""

    manifest: Manifest
    """Its numbers of tokens, in shards that do not exist; names and hashes are empty."""
    assumptions: tuple[str, ...]
    """Sentences that name the assumed numbers."""


@dataclass(frozen=True)
class Sample:
    """The first documents of a corpus."""

    texts: list[str]
    share: float
    """Bytes of text in UTF-8 for each stored byte."""
    first_fault: BadRecord | None


def assume_data(findings: Findings, data: Data, tokenizer: Tokenizer, listing: Listing) -> AssumedData | None:
    """Return the data set that `prepare` would probably make; a row says why if there is no plan.

    Args:
        findings: takes the row.
        data: settings of the corpus.
        tokenizer: settings of the tokenizer.
        listing: the files of the corpus.
    """
    first_file = next((file for file in listing.files if file.size > 0), None)
    sample = Sample([], 0.0, None) if first_file is None else read_sample(first_file, data)
    if sample.share == 0:
        fault = sample.first_fault
        found = "none: no text was found at the start of the corpus"
        if fault is not None:
            found = f"none: the corpus begins with a broken record: {fault.url}, {fault.position}: {fault.reason}"
        findings.unsure("plan", found, fault.remedy if fault is not None else "")
        return None
    if sample.texts:
        text = (
            f"{sample.share:.2f} bytes of text for each byte of the corpus, as in its first {_documents(sample.texts)}"
        )
    else:
        text = "every byte of the corpus is text"
    with TemporaryDirectory(prefix="wikillm-") as scratch:
        vocab_size, bytes_per_token, tokens = _tokens(tokenizer, sample.texts, scratch)
    total = listing.size * sample.share / bytes_per_token
    return AssumedData(_manifest(data, round(total), vocab_size, listing.size), (text, tokens))


def assume_known_corpus(data: Data, tokenizer: Tokenizer) -> AssumedData | None:
    """Return the data set that `prepare` would probably make of a corpus on a hub; None if its size is not known."""
    text_bytes = _KNOWN_TEXT_BYTES.get(data.source.removeprefix("modelscope://"))
    if text_bytes is None:
        return None
    is_of_hub = hub.has_scheme(tokenizer.source) or is_hub_name(tokenizer.source)
    entries = _HUB_VOCAB_SIZE if is_of_hub else tokenizer.vocab_size
    bytes_per_token = WIKIPEDIA_BYTES_PER_TOKEN.get(entries) or own_bytes_per_token(entries)
    assumptions = (
        f"{text_bytes / 1e9:.2f} GB of text, as {data.source} had in 2024",
        f"{bytes_per_token:.4g} bytes of text per token, and {entries:,} entries",
    )
    manifest = _manifest(data, round(text_bytes / bytes_per_token), entries, round(text_bytes))
    return AssumedData(manifest, assumptions)


def own_bytes_per_token(vocab_size: int) -> float:
    """Return bytes of Chinese text per token for a BPE of this size trained on it, by the logarithm of its entries."""
    sizes = list(_OWN_BYTES_PER_TOKEN)
    size = min(max(vocab_size, sizes[0]), sizes[-1])
    above = next(index for index in range(1, len(sizes)) if size <= sizes[index])
    low, high = _OWN_BYTES_PER_TOKEN[sizes[above - 1]], _OWN_BYTES_PER_TOKEN[sizes[above]]
    share = math.log(size / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    return low + share * (high - low)


def _documents(texts: list[str]) -> str:
    return f"{len(texts):,} documents" if len(texts) > 1 else "document"


# ---- How much text ----


def read_sample(file: CorpusFile, data: Data) -> Sample:
    """Read the first documents of a file; of a format that the `datasets` library reads, assume that all is text."""
    if file.library_reader is not None:
        return Sample([], 1.0, None)
    texts: list[str] = []
    fault, text_bytes = None, 0
    for item in _first_records(file, data):
        if isinstance(item, BadRecord):
            fault = fault or item
            continue
        texts.append(item.text)
        text_bytes += len(item.text.encode(errors="replace"))
    if file.format == "parquet":
        with storage.open_read(file.path) as source:
            share = parquet.text_bytes(source, data.text_field) / file.size if texts else 0.0
        return Sample(texts, share, fault)
    if not text_bytes:
        return Sample(texts, 0.0, fault)
    growth = 1.0
    if file.compression:
        with storage.open_read(file.path) as source:
            head = source.read(_HEAD_BYTES)
        growth = sum(map(len, ByteStream(io.BytesIO(head), file.compression))) / len(head)
    # The last record begins in the slice and may end after it, so the share of a short sample could be above 1.
    share = min(1.0, text_bytes / min(_SAMPLE_BYTES, file.size * growth))
    return Sample(texts, share * growth, fault)


def _first_records(file: CorpusFile, data: Data) -> Iterator[Document | BadRecord]:
    """Yield the records of the first slice, up to `_SAMPLE_BYTES` characters of text."""
    characters = 0
    for item in read_slices(file, _SAMPLE_BYTES, lambda index: index == 0, data.text_field, data.id_field):
        if isinstance(item, SliceEnd) or characters >= _SAMPLE_BYTES:
            return
        if isinstance(item, Document | BadRecord):
            characters += len(item.text) if isinstance(item, Document) else 0
            yield item


# ---- How many tokens ----


def _tokens(tokenizer: Tokenizer, texts: list[str], scratch: str) -> tuple[int, float, str]:
    """Return the size of the vocabulary, the bytes of text per token, and both in words."""
    loaded = _tokenizer_at_hand(tokenizer.source, scratch)
    if loaded is not None and texts:
        tokens = sum(len(ids) + 1 for ids in loaded.encode(texts))
        bytes_per_token = sum(len(text.encode(errors="replace")) for text in texts) / tokens
        words = f"{bytes_per_token:.2f} bytes of text per token, as {tokenizer.source} makes of the first documents"
        return loaded.vocab_size, bytes_per_token, words
    if loaded is not None:
        words = f"{_HUB_BYTES_PER_TOKEN} bytes of text per token"
        return loaded.vocab_size, _HUB_BYTES_PER_TOKEN, words
    if hub.has_scheme(tokenizer.source) or is_hub_name(tokenizer.source):
        words = f"{_HUB_BYTES_PER_TOKEN} bytes of text per token and {_HUB_VOCAB_SIZE:,} entries, as Qwen2 for Chinese"
        return _HUB_VOCAB_SIZE, _HUB_BYTES_PER_TOKEN, words
    bytes_per_token = own_bytes_per_token(tokenizer.vocab_size)
    words = f"{bytes_per_token:.2f} bytes of text per token, as about {tokenizer.vocab_size:,} entries "
    words += "(tokenizer.vocab_size) trained on Chinese Wikipedia have"
    return tokenizer.vocab_size, bytes_per_token, words


def _tokenizer_at_hand(source: str, scratch: str) -> TextTokenizer | None:
    """Return the tokenizer in a folder or at a URL; None on a hub, and if it does not exist or is damaged."""
    is_url = storage.is_remote(source) and not hub.has_scheme(source)
    if not is_url and not storage.path_of(source).is_dir():
        return None
    try:
        return load_tokenizer(source, scratch)
    except UserError:
        return None


def _manifest(data: Data, tokens: int, vocab_size: int, corpus_bytes: int) -> Manifest:
    """Return a manifest with so many tokens, in equal shards, divided by `data.validation_fraction`."""
    count = min(max(1, -(-corpus_bytes // int(data.slice_bytes))), _MOST_SHARDS)
    dtype: TokenType = "uint16" if vocab_size <= 2**16 else "uint32"

    def shards(total: int) -> tuple[Shard, ...]:
        each = total // count
        size = shard_size(each, 1, dtype)
        shard = Shard(name="", tokens=each, documents=1, utf8_bytes=0, characters=0, size=size, sha256="")
        return (shard,) * count

    validation = round(tokens * data.validation_fraction)
    return Manifest(
        fingerprint="", tokenizer_fingerprint="", vocab_size=vocab_size, dtype=dtype, eod_id=0, seed=data.seed,
        validation_fraction=data.validation_fraction, split_rule="", train=shards(tokens - validation),
        validation=shards(validation), statistics={},
    )  # fmt: skip
