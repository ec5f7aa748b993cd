"""Byte-level tokenizers: loaded from a hub, a folder or a URL, or trained here; they turn text into tokens and back."""

import codecs
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from job import storage
from job.data import hub
from job.data.tokenizer_download import download_tokenizer, is_hub_name
from job.data.tokenizer_files import (
    PLAIN_CLASS,
    QWEN2_CLASS,
    RESTORE_FILE,
    TOKENIZER_FILES,
    read_description,
    write_description,
)
from job.errors import UserError, one_line
from job.invocation import command
from job.json_record import parse_record

END_OF_DOCUMENT = "<|endoftext|>"
"""The end-of-document token of a tokenizer trained here. It is also Qwen2's, so both kinds of models share it."""

SPLIT_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern by which a tokenizer trained here splits a text into pieces; a token never crosses two pieces.

Words, single digits, punctuation and white space are pieces of their own. Chinese has no blanks, so the text between
two punctuation marks is one piece, in which training can find words and phrases.

The pattern is byte for byte the one that llama.cpp calls ``qwen35`` (`LLAMA_VOCAB_PRE_TYPE_QWEN35` in its
src/llama-vocab.cpp), so that other programs know it already."""


@dataclass(frozen=True)
class TextTokenizer:
    """A byte-level tokenizer in a local folder, ready to encode.

    A document that contains the name of a special token is encoded as text, not as that token.
    """

    folder: Path
    """The folder with the Hugging Face files that `AutoTokenizer` reads."""
    eod_id: int
    """Id of the end-of-document token (the tokenizer's ``eos_token``)."""
    fingerprint: str
    """sha256 of tokenizer.json and of the end-of-document token."""
    _backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        # The other process opens the files again: the library's own pickle forgets that special tokens are text.
        return _open_tokenizer, (self.folder, str(self.folder))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of entries, added tokens and unused ids included."""
        return max(self.vocabulary.values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without added tokens."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens appear as their names."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def files(self) -> list[Path]:
        """Return the paths of the tokenizer's files that exist."""
        return [path for name in TOKENIZER_FILES if (path := self.folder / name).is_file()]

    @cached_property
    def normalization(self) -> str | None:
        """The Unicode normalization that is applied to a text first: ``NFC`` (Qwen2's), ``other``, or None."""
        normalizer = self._backend.normalizer
        return None if normalizer is None else "NFC" if isinstance(normalizer, normalizers.NFC) else "other"

    def is_changed_by_normalizer(self, text: str) -> bool:
        """Return True if the tokenizer's normalizer changes this text."""
        # Python's check is a hundred times as fast as the library's. Its Unicode version is newer, and a text that is
        # normalized in a newer version is so in an older one: characters that are unknown there combine with nothing.
        if self.normalization is None or (self.normalization == "NFC" and unicodedata.is_normalized("NFC", text)):
            return False
        return str(self._backend.normalizer.normalize_str(text)) != text

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added tokens included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def eos_token(self) -> str:
        """The end-of-document token."""
        return str(self._backend.id_to_token(self.eod_id))

    @cached_property
    def is_qwen2(self) -> bool:
        """True if its files name Qwen2's class of transformers, which ignores most of tokenizer.json."""
        return read_description(self.folder, str(self.folder)).tokenizer_class in (QWEN2_CLASS, f"{QWEN2_CLASS}Fast")

    @cached_property
    def surrounding_tokens(self) -> list[str]:
        """Tokens that other programs add before and after each text, as tokenizer.json says; training does not."""
        return list(self._backend.encode("", add_special_tokens=True).tokens)

    @cached_property
    def added_tokens(self) -> list[str]:
        """Tokens that were added to the trained vocabulary, special ones and others."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for (`[vocab_size]`); empty for special tokens and unused ids."""
        token_bytes = [b""] * self.vocab_size
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        for token, index in self.vocabulary.items():
            if index not in special:
                token_bytes[index] = _bytes_of(token)
        return token_bytes

    @cached_property
    def token_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """UTF-8 bytes and characters of each token, two arrays of `[vocab_size]`; 0 for special tokens.

        A character is counted in the token that holds its first byte. So sums over a whole text are exact, even if a
        token ends inside a character.
        """
        characters = [sum(byte & 0xC0 != 0x80 for byte in token) for token in self.token_bytes]
        return np.array([len(token) for token in self.token_bytes]), np.array(characters)


def load_tokenizer(source: str, cache_dir: str | Path) -> TextTokenizer:
    """Load the tokenizer at `source`; its files are downloaded if they are not on this machine.

    Args:
        source: a Hugging Face id, ``modelscope://owner/name``, or a folder or URL that holds tokenizer.json.
        cache_dir: a local folder for downloads from a URL.

    Raises:
        UserError: there is no tokenizer, the hub cannot be reached, or it is not byte-level with an eos_token.
    """
    return _open_tokenizer(download_tokenizer(source, Path(cache_dir).expanduser()), source)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> TextTokenizer:
    """Train a byte-level BPE tokenizer and save it in the local `folder` as a Hugging Face fast tokenizer.

    The same texts give the same file. All 256 bytes are in the alphabet, so any Unicode text can be encoded.
    Method: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2, after a split by `SPLIT_PATTERN`.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_description(folder, PLAIN_CLASS, END_OF_DOCUMENT)
    return _open_tokenizer(folder, str(folder))


def refuse_hub_id(destination: str) -> None:
    """Raise a UserError if a tokenizer would be written to a hub's ``owner/name``, which cannot be written.

    ``owner/name`` is a path if the folder ``owner`` exists here.
    """
    if destination.startswith(hub.MODELSCOPE):
        expected = f"is a hub's owner/name, but `{command('tokenizer')}` writes to a folder or a URL (s3://...)"
        raise UserError("tokenizer.source", destination, expected, "set it to a folder or a URL")
    folder = destination.partition("/")[0]
    if is_hub_name(destination) and not Path(folder).is_dir():
        expected = f"looks like a hub's owner/name, since there is no folder {folder} here"
        remedy = f"write ./{destination} for a folder, or give a URL (s3://...)"
        raise UserError("tokenizer.source", destination, expected, remedy)


def refuse_surrounding_tokens(tokenizer: TextTokenizer, setting: str, source: str) -> None:
    """Raise a UserError if `AutoTokenizer` would put tokens around every text; training does not add them."""
    if tokens := " ".join(tokenizer.surrounding_tokens):
        expected = f"its tokenizer.json makes AutoTokenizer put {tokens} around every text, but training does not"
        raise UserError(setting, source, expected, "set post_processor in tokenizer.json to null and prepare with it")


def store_tokenizer(tokenizer: TextTokenizer, destination: str, setting: str = "tokenizer.source") -> None:
    """Copy the tokenizer's files to a folder or URL; do nothing if the same tokenizer is there already.

    tokenizer.json is the last one: a folder with it has all of them.

    Raises:
        UserError: another tokenizer is there; the message names `setting`.
    """
    for path in reversed(tokenizer.files()):
        target, content = storage.join(destination, path.name), path.read_bytes()
        if not storage.create_bytes(target, content) and storage.read_bytes(target) != content:
            expected = "another tokenizer is there already"
            raise UserError(setting, destination, expected, "choose another folder or URL, or delete that tokenizer")


def store_new_tokenizer(tokenizer: TextTokenizer, destination: str) -> None:
    """Do `store_tokenizer`; if that fails or is interrupted, delete the files that were not there before.

    Raises:
        UserError: another tokenizer is there, or there is no room for this one.
    """
    targets = [storage.join(destination, path.name) for path in tokenizer.files()]
    new = [target for target in targets if not storage.exists(target)]
    try:
        store_tokenizer(tokenizer, destination)
    except BaseException:
        storage.delete(new)
        raise


def replace_tokenizer(tokenizer: TextTokenizer, destination: str) -> None:
    """Write the tokenizer's files to a folder or URL, and delete files that an earlier tokenizer left there."""
    kept = {path.name for path in tokenizer.files()}
    storage.delete(storage.join(destination, name) for name in TOKENIZER_FILES if name not in kept)
    for path in tokenizer.files():
        storage.write_bytes(storage.join(destination, path.name), path.read_bytes())


# ---- Checks of a tokenizer ----

_LARGEST_ID = 2**24
"""Far above the ids of any tokenizer, and a table with that many entries still fits into memory."""


@dataclass(frozen=True)
class _TokenizerModel:
    """Fields that are empty in a byte-level model. Other values in a damaged file make the library end the process."""

    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None


@dataclass(frozen=True)
class _TokenizerFile:
    model: _TokenizerModel


@contextmanager
def _panic_as_value_error() -> Iterator[None]:
    """Raise a ValueError for a panic of the library, which is not a subclass of Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def _open_tokenizer(folder: Path, source: str) -> TextTokenizer:
    """Open the tokenizer in a local folder; check that it is byte-level and has an end-of-document token.

    Raises:
        UserError: it is damaged, not byte-level, or has no end-of-document token.
    """
    try:
        content = (folder / "tokenizer.json").read_bytes()
        parse_record(content, _TokenizerFile)
        with _panic_as_value_error():
            backend = tokenizers.Tokenizer.from_buffer(content)
            largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest > _LARGEST_ID:
            raise ValueError(f"it has a token with the id {largest}")
    except Exception as error:  # The library raises bare Exceptions for a damaged file.
        expected = f"tokenizer.json cannot be read: {one_line(str(error))[:200]}"
        raise UserError("tokenizer.source", source, expected, RESTORE_FILE) from None
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    if not _is_byte_level(backend):
        expected = "expected a byte-level tokenizer (like those of GPT-2, Qwen, Llama 3); this one changes a text"
        raise UserError("tokenizer.source", source, expected, f"train one with `{command('tokenizer')}`")
    eos = read_description(folder, source).eos
    eod_id = backend.token_to_id(eos) if eos else None
    if eod_id is None:
        expected = f"its eos_token ({eos!r}) is not in its vocabulary, so the end of a document cannot be marked"
        remedy = "set eos_token in tokenizer_config.json to a token of the vocabulary"
        raise UserError("tokenizer.source", source, expected, remedy)
    return TextTokenizer(folder, eod_id, hashlib.sha256(content + str(eos).encode()).hexdigest(), backend)


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Return True if the tokens' bytes and the decoded text are the text itself.

    The text that is tried holds every byte that can occur in UTF-8.
    """
    code_points = [*range(0x800), *range(0x800, 0xD800, 0x7F), *range(0xE000, 0x110000, 0x1FFF)]
    text = "".join(map(chr, code_points))
    try:
        with _panic_as_value_error():
            if backend.normalizer is not None:
                text = str(backend.normalizer.normalize_str(text))
            encoded = backend.encode(text, add_special_tokens=False)
            decoded = backend.decode(encoded.ids, skip_special_tokens=False)
    except Exception:  # A character is not in the vocabulary, and there is no token for unknown characters.
        return False
    token_bytes = b"".join(map(_bytes_of, encoded.tokens))
    return token_bytes == text.encode() and decoded == text


def _byte_alphabet() -> dict[int, int]:
    """Return the byte of each printable character that a byte-level vocabulary uses for it (GPT-2's convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """Return the bytes that a vocabulary entry stands for; an added token is written as itself."""
    try:
        return codecs.charmap_encode(token, "strict", _BYTES)[0]
    except UnicodeEncodeError:
        return token.encode()
