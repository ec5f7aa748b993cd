"""Text to tokens and back: a byte-level tokenizer from a hub, from a folder or URL, or trained here."""

import codecs
import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from job.data.tokenizer_files import PLAIN_CLASS, PUT_BACK, QWEN2_CLASS, TOKENIZER_FILES, described, write_description
from job.errors import UserError, one_line
from job.invocation import command
from job.json_record import parse_record
from job.local_dirs import private_folder

END_OF_DOCUMENT = "<|endoftext|>"
"""The end-of-document token of a tokenizer trained here; it is Qwen2's, so that a model can change between the two."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
PIECES = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where a tokenizer trained here cuts a text before it merges: words, single digits, punctuation and white space are
never merged with each other. Chinese has no blanks, so the text between two punctuation marks is one piece, and merges
may find words and phrases in it.

The pattern is the one that llama.cpp calls ``qwen35`` (`LLAMA_VOCAB_PRE_TYPE_QWEN35` in its src/llama-vocab.cpp), byte
for byte, so that other programs need not be taught a new one."""


@dataclass(frozen=True)
class TextTokenizer:
    """A byte-level tokenizer in a local folder, ready to encode.

    Text is always text: a document that contains the words of a special token does not become one.
    """

    folder: Path
    """Holds the Hugging Face files that `AutoTokenizer` reads."""
    eod_id: int
    """Id of the end-of-document token (the tokenizer's ``eos_token``)."""
    fingerprint: str
    """sha256 of tokenizer.json and of the end-of-document token."""
    _backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        # Opened again in the other process: the library's own pickle forgets that special tokens are text.
        return _opened, (self.folder, str(self.folder))

    @cached_property
    def vocab_size(self) -> int:
        """Entries, added tokens and gaps between ids included: one more than the largest id."""
        return max(self.vocabulary.values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with nothing added."""
        return [one.ids for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included as their names."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def files(self) -> list[Path]:
        """The files of the tokenizer that are there."""
        return [path for name in TOKENIZER_FILES if (path := self.folder / name).is_file()]

    @cached_property
    def normalization(self) -> str | None:
        """What is done to a text before it is cut into tokens: ``NFC`` (Qwen2's), ``other``, or None for nothing."""
        normalizer = self._backend.normalizer
        return None if normalizer is None else "NFC" if isinstance(normalizer, normalizers.NFC) else "other"

    def changes(self, text: str) -> bool:
        """Whether the tokenizer's normalizer makes another text of this one."""
        # Python answers a hundred times sooner. Its Unicode is the newer one, and what is normalized by a newer one is
        # by an older one: characters that it does not know yet combine with nothing.
        if self.normalization is None or (self.normalization == "NFC" and unicodedata.is_normalized("NFC", text)):
            return False
        return str(self._backend.normalizer.normalize_str(text)) != text

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of every entry, added tokens included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def eos_token(self) -> str:
        """The end-of-document token."""
        return str(self._backend.id_to_token(self.eod_id))

    @cached_property
    def is_qwen2(self) -> bool:
        """Whether its files say that it is Qwen2's, whose class in transformers ignores most of tokenizer.json."""
        return described(self.folder, str(self.folder)).tokenizer_class in (QWEN2_CLASS, f"{QWEN2_CLASS}Fast")

    @cached_property
    def surrounding_tokens(self) -> list[str]:
        """The tokens that tokenizer.json has other programs put around every text, and that training does not."""
        return list(self._backend.encode("", add_special_tokens=True).tokens)

    @cached_property
    def added_tokens(self) -> list[str]:
        """The tokens that were put beside the vocabulary, special ones and others."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for (`[vocab]`); special tokens and gaps stand for none."""
        spelled = [b""] * self.vocab_size
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        for token, index in self.vocabulary.items():
            if index not in special:
                spelled[index] = _bytes_of(token)
        return spelled

    @cached_property
    def token_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """UTF-8 bytes and characters of each token, two arrays of `[vocab]`; special tokens have none.

        A character counts where its first byte is, so that sums over a whole text are exact even where a token ends
        inside a character.
        """
        characters = [sum(byte & 0xC0 != 0x80 for byte in token) for token in self.token_bytes]
        return np.array([len(token) for token in self.token_bytes]), np.array(characters)


def load_tokenizer(source: str, cache_dir: str | Path) -> TextTokenizer:
    """The tokenizer at `source`, brought to this machine.

    Args:
        source: a Hugging Face id, ``modelscope://owner/name``, or a folder or URL that holds tokenizer.json.
        cache_dir: a local folder for what comes from a URL.

    Raises:
        UserError: nothing is there, no hub can be reached, or it is not a byte-level tokenizer with an eos_token.
    """
    cache = Path(cache_dir).expanduser()
    local = Path(source.removeprefix("file://")).expanduser()
    if source.startswith(hub.MODELSCOPE):
        folder = _from_hub(source)
    elif storage.is_remote(source):
        folder = _from_url(source, cache)
    elif local.is_dir():
        folder = local
    elif _HUB_ID.fullmatch(source) and not hub.is_own_path(source):
        folder = _from_hub(source)
    else:
        is_name = f"; what begins with {hub.OWN_FOLDER} is a path here, and no hub's owner/name"
        expected = f"no such folder{is_name if hub.is_own_path(source) else ''}"
        raise UserError("tokenizer.source", source, expected, f"make it with `{command('tokenizer')}`")
    if not (folder / "tokenizer.json").is_file():
        folder = _converted(folder, source, cache)
    return _opened(folder, source)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> TextTokenizer:
    """Trains a byte-level BPE and saves it in the local `folder` as a Hugging Face fast tokenizer.

    The same texts give the same file. All 256 bytes are in its alphabet, so any Unicode text can be encoded.
    Method: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2; texts are cut by `PIECES` first.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
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
    return _opened(folder, str(folder))


def refuse_hub_id(destination: str) -> None:
    """Raises a UserError where a tokenizer is to be written to what reads as a hub's ``owner/name``.

    It is a path where the folder exists that it would lie in.
    """
    if destination.startswith(hub.MODELSCOPE):
        expected = "is a hub's owner/name; `job tokenizer` writes to a folder or a URL (s3://...)"
        raise UserError("tokenizer.source", destination, expected)
    folder = destination.partition("/")[0]
    is_name = _HUB_ID.fullmatch(destination) and not destination.startswith(".") and not hub.is_own_path(destination)
    if is_name and not Path(folder).is_dir():
        expected = f"reads as a hub's owner/name, since there is no folder {folder} here"
        remedy = f"write ./{destination} for a folder, or give a URL (s3://...)"
        raise UserError("tokenizer.source", destination, expected, remedy)


def refuse_surrounding_tokens(tokenizer: TextTokenizer, setting: str, place: str) -> None:
    """Raise a UserError if `AutoTokenizer` would put tokens around every text that training puts around none."""
    if around := " ".join(tokenizer.surrounding_tokens):
        expected = f"its tokenizer.json has AutoTokenizer put {around} around every text, and training does not"
        raise UserError(setting, place, expected, "set post_processor in tokenizer.json to null and prepare with it")


def store_tokenizer(tokenizer: TextTokenizer, destination: str, setting: str = "tokenizer.source") -> None:
    """Copies the tokenizer's files to a folder or URL; does nothing if the same tokenizer is there already.

    Raises:
        UserError: another tokenizer is there; it names `setting`.
    """
    for path in tokenizer.files():
        target, content = storage.join(destination, path.name), path.read_bytes()
        if not storage.create_bytes(target, content) and storage.read_bytes(target) != content:
            expected = "another tokenizer is there already"
            raise UserError(setting, destination, expected, "choose another place, or delete it")


def replace_tokenizer(tokenizer: TextTokenizer, destination: str) -> None:
    """Write the tokenizer's files to a folder or URL, and delete those of another tokenizer there."""
    kept = {path.name for path in tokenizer.files()}
    storage.delete(storage.join(destination, name) for name in TOKENIZER_FILES if name not in kept)
    for path in tokenizer.files():
        storage.write_bytes(storage.join(destination, path.name), path.read_bytes())


# ---- Where tokenizers come from ----


def _from_url(url: str, cache_dir: Path) -> Path:
    contents: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            contents[name] = storage.read_bytes(storage.join(url, name))
    if not contents.keys() & {"tokenizer.json", "vocab.json"}:
        raise UserError("tokenizer.source", url, "no tokenizer.json there", f"make it with `{command('tokenizer')}`")
    return _kept(contents, cache_dir)


def _kept(contents: Mapping[str, bytes], cache_dir: Path) -> Path:
    """A folder of these files, named after what they are, so that a changed one is not mistaken for the former.

    They are written anew each time, into a folder where no other user can change them.
    """
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    folder = private_folder(cache_dir / "tokenizers", "data.cache_dir") / digest.hexdigest()[:16]
    for name, content in contents.items():
        storage.write_bytes(str(folder / name), content)
    return folder


def _from_hub(source: str) -> Path:
    name, _, revision = source.removeprefix(hub.MODELSCOPE).partition("@")
    repository = hub.Repository("model", name, revision or None, "tokenizer.source", source)
    is_modelscope = source.startswith(hub.MODELSCOPE)
    return (repository.from_modelscope if is_modelscope else repository.from_hugging_face)(list(TOKENIZER_FILES))


def _converted(folder: Path, source: str, cache_dir: Path) -> Path:
    """A fast tokenizer made of vocab.json and merges.txt, the older form; of Qwen2's kind where nothing says which."""
    if not (folder / "vocab.json").is_file():
        raise UserError("tokenizer.source", source, "no tokenizer.json there", f"make it with `{command('tokenizer')}`")
    from transformers import AutoTokenizer, Qwen2Tokenizer

    says_which = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        try:
            loaded = (AutoTokenizer if says_which else Qwen2Tokenizer).from_pretrained(folder, trust_remote_code=False)
            loaded.save_pretrained(scratch)
        except Exception as error:  # whatever a file that is not a tokenizer's makes transformers raise
            raise UserError("tokenizer.source", source, f"not a tokenizer: {one_line(str(error))[:200]}") from None
        return _kept(
            {name: path.read_bytes() for name in TOKENIZER_FILES if (path := Path(scratch, name)).is_file()}, cache_dir
        )


# ---- What a tokenizer must be ----

_LARGEST_ID = 2**24
"""Far above those of any tokenizer; a table of so many entries still fits into memory."""


@dataclass(frozen=True)
class _TokenizerModel:
    """Fields that a byte-level model leaves empty. In a damaged file they make the library end the process."""

    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None


@dataclass(frozen=True)
class _TokenizerFile:
    model: _TokenizerModel


@contextmanager
def _no_panic() -> Iterator[None]:
    """Makes a ValueError of a panic in the library, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def _opened(folder: Path, source: str) -> TextTokenizer:
    """The tokenizer in a local folder, after checking that its tokens are bytes and that it can end a document."""
    try:
        content = (folder / "tokenizer.json").read_bytes()
        parse_record(content, _TokenizerFile)
        with _no_panic():
            backend = tokenizers.Tokenizer.from_buffer(content)
            largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest > _LARGEST_ID:
            raise ValueError(f"it has a token with the id {largest}")
    except Exception as error:  # the library raises bare Exceptions for a damaged file
        expected = f"tokenizer.json cannot be read: {one_line(str(error))[:200]}"
        raise UserError("tokenizer.source", source, expected, PUT_BACK) from None
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    if not _spells_every_byte(backend):
        expected = "expected a byte-level tokenizer (as GPT-2's, Qwen's, Llama 3's); this one does not give a text back"
        raise UserError("tokenizer.source", source, expected, f"train one with `{command('tokenizer')}`")
    eos = described(folder, source).eos
    eod_id = backend.token_to_id(eos) if eos else None
    if eod_id is None:
        expected = f"its eos_token ({eos!r}) is not in its vocabulary, so documents cannot be closed"
        raise UserError("tokenizer.source", source, expected, "set eos_token in tokenizer_config.json")
    return TextTokenizer(folder, eod_id, hashlib.sha256(content + str(eos).encode()).hexdigest(), backend)


def _spells_every_byte(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of a text with every byte that UTF-8 can have are, put together, that text."""
    code_points = [*range(0x800), *range(0x800, 0xD800, 0x7F), *range(0xE000, 0x110000, 0x1FFF)]
    text = "".join(map(chr, code_points))
    try:
        with _no_panic():
            if backend.normalizer is not None:
                text = str(backend.normalizer.normalize_str(text))
            encoded = backend.encode(text, add_special_tokens=False)
            decoded = backend.decode(encoded.ids, skip_special_tokens=False)
    except Exception:  # a character that is not in its vocabulary, and no token for unknown ones
        return False
    spelled = b"".join(map(_bytes_of, encoded.tokens))
    return spelled == text.encode() and decoded == text


def _byte_alphabet() -> dict[int, int]:
    """The bytes, by the printable characters that a byte-level vocabulary writes for them (GPT-2's convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for; an added token is written as itself."""
    try:
        return codecs.charmap_encode(token, "strict", _BYTES)[0]
    except UnicodeEncodeError:
        return token.encode()
