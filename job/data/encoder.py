"""Texts to tokens, by a tokenizer that is faster than the reference, for as long as both give the same tokens.

The reference is the tokenizer itself, in Hugging Face's `tokenizers`. `fastokens` reads the same tokenizer.json and is
more than ten times as fast. It is checked in four ways:

1. The reference makes the first tokens of a run. fastokens must give the same ids for that text, and for texts that are
   made to be hard, before it is used at all.
2. From then on, the bytes of the tokens of every text must be the bytes of the text. Special tokens have no bytes.
3. One text in 500, chosen by its content, is encoded by both, and the ids must be the same.
4. Texts that the two may treat differently, because they have different versions of Unicode, go to the reference.

If fastokens fails, or does not pass check 1, it is not used, and a notice says so. If check 2 or 3 fails,
`Disagreement` is raised: the tokens made so far cannot be trusted, and the caller makes them again with the reference.
"""

import unicodedata
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from job.data.tokenizer import TextTokenizer
from job.errors import one_line

Engine = Literal["auto", "reference"]
Tokens: TypeAlias = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Ids of several texts in a row (`[tokens]`), and the end of each text among them (`[texts]`)."""

TRIAL_CHARACTERS = 2**19
"""Characters of text that the reference encodes before fastokens is compared with it."""
CHECK_ONE_IN = 500
"""One text in this number is encoded by both (check 3)."""


class Disagreement(Exception):
    """fastokens gave other tokens than the reference, or tokens whose bytes are not the text."""


class Encoder:
    """Encodes texts into the tokens that the reference gives.

    Args:
        tokenizer: the reference.
        engine: ``auto`` to use fastokens after it has passed the checks; ``reference`` to use only the reference.
        on_notice: called with one line that says why fastokens is not used.
    """

    def __init__(self, tokenizer: TextTokenizer, engine: Engine, on_notice: Callable[[str], None]) -> None:
        self._tokenizer, self._on_notice = tokenizer, on_notice
        self._on_trial = engine == "auto" and tokenizer.normalization in (None, "NFC")
        self._seen: list[tuple[str, list[int]]] = []
        self._seen_characters = 0
        self._fast: Callable[[list[str]], Tokens] | None = None

    def encode(self, texts: Sequence[str], utf8_texts: Sequence[bytes]) -> Tokens:
        """Return the tokens of `texts`, without added tokens.

        Args:
            texts: the texts.
            utf8_texts: the same texts in UTF-8.

        Raises:
            Disagreement: fastokens was wrong; the tokens that this encoder made before may be wrong too.
        """
        if self._fast is None:
            encoded = self._tokenizer.encode(texts)
            if self._on_trial:
                self._seen += zip(texts, encoded, strict=True)
                self._seen_characters += sum(map(len, texts))
                if self._seen_characters >= TRIAL_CHARACTERS:
                    self._start_fast()
            return _flat(encoded)
        uncertain = [i for i, text in enumerate(texts) if self._is_uncertain(text)]
        # fastokens gets an empty text in the place of each uncertain one, so that the numbering stays the same.
        certain, utf8_certain = list(texts), list(utf8_texts)
        for i in uncertain:
            certain[i], utf8_certain[i] = "", b""
        try:
            ids, ends = self._fast(certain)
        except BaseException as error:
            self._fast = None
            self._give_up(error)
            return _flat(self._tokenizer.encode(texts))
        self._check(certain, utf8_certain, ids, ends)
        if not uncertain:
            return ids, ends
        by_reference = self._tokenizer.encode([texts[i] for i in uncertain])
        lengths = np.diff(ends, prepend=0)
        lengths[uncertain] = [len(text_ids) for text_ids in by_reference]
        between = np.split(ids, ends[uncertain])
        inserted = [np.array(text_ids, np.uint32) for text_ids in by_reference]
        in_order = chain.from_iterable(zip(between, inserted, strict=False))
        return np.concatenate([*in_order, between[-1]]), np.cumsum(lengths)

    def _start_fast(self) -> None:
        """Use fastokens from now on if it gives the same ids for the texts seen so far and for the hard texts."""
        hard = self._hard_texts()
        seen = [*self._seen, *zip(hard, self._tokenizer.encode(hard), strict=True)]
        self._seen, self._on_trial = [], False
        try:
            fast = _fastokens(self._tokenizer)
            ids, ends = fast([text for text, _ in seen])
            exact, exact_ends = _flat([encoded for _, encoded in seen])
            same = np.array_equal(ids, exact) and np.array_equal(ends, exact_ends)
        except BaseException as error:
            self._give_up(error)
            return
        if same:
            self._fast = fast
        else:
            self._on_notice("fastokens gives other tokens than the reference, which therefore makes all tokens, slowly")

    def _give_up(self, error: BaseException) -> None:
        # A panic in Rust is not an Exception, so it must be told apart from a request to stop by its name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        why = f"{type(error).__name__}: {one_line(str(error))[:200]}"
        self._on_notice(f"fastokens cannot be used ({why}); the reference makes the tokens, slowly")

    def _is_uncertain(self, text: str) -> bool:
        # U+180E was white space until Unicode 6.3, and some regular expressions still treat it so.
        return "\u180e" in text or (
            self._tokenizer.normalization is not None and not unicodedata.is_normalized("NFC", text)
        )

    def _check(
        self, texts: list[str], utf8_texts: list[bytes], ids: NDArray[np.uint32], ends: NDArray[np.int64]
    ) -> None:
        """Raise a Disagreement unless these ids pass checks 2 and 3."""
        if not self._have_bytes_of(utf8_texts, ids, ends):
            raise Disagreement("the bytes of fastokens' tokens are not those of their text")
        sample = [i for i, utf8 in enumerate(utf8_texts) if utf8 and zlib.crc32(utf8) % CHECK_ONE_IN == 0]
        for i, exact in zip(sample, self._tokenizer.encode([texts[i] for i in sample]), strict=True):
            if not np.array_equal(ids[ends[i - 1] if i else 0 : ends[i]], exact):
                raise Disagreement(f"fastokens gives other tokens than the reference for {texts[i][:40]!r}...")

    def _have_bytes_of(self, utf8_texts: list[bytes], ids: NDArray[np.uint32], ends: NDArray[np.int64]) -> bool:
        """Return True if the bytes of each text's tokens are the bytes of the text."""
        token_bytes, starts, sizes = self._token_table
        if len(ends) != len(utf8_texts) or (len(ids) and ids.max() >= len(sizes)):
            return False
        id_sizes = sizes[ids]
        stops = np.cumsum(id_sizes)
        if not np.array_equal(np.append(0, stops)[ends], np.cumsum([len(utf8_text) for utf8_text in utf8_texts])):
            return False
        indices = np.repeat(starts[ids] - (stops - id_sizes).astype(np.int32), id_sizes)
        indices += np.arange(len(indices), dtype=np.int32)
        return token_bytes.take(indices, mode="clip").tobytes() == b"".join(utf8_texts)

    @cached_property
    def _token_table(self) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]:
        """The bytes of all tokens in a row, and the start and the number of each token's bytes in that row."""
        tokens = self._tokenizer.token_bytes
        sizes = np.array([len(token) for token in tokens], np.int32)
        return np.frombuffer(b"".join(tokens), np.uint8), np.cumsum(sizes, dtype=np.int32) - sizes, sizes

    def _hard_texts(self) -> list[str]:
        """Return texts on which two tokenizers may differ even if they agree on all usual texts."""
        names = [f"前{token}{space}{token}后" for token in self._tokenizer.added_tokens for space in ("", " ", "\n")]
        characters = [
            *range(0x180),
            *range(0x180, 0x3400, 7),
            *range(0x3400, 0xD800, 401),
            *range(0xE000, 0x110000, 397),
        ]
        around = [f"字{c}a{c} {c}1.{c}\n{c}'s" for c in map(chr, characters)]
        return [text for text in [*_HARD, *names, *around] if not self._is_uncertain(text)]


_HARD = [
    *(
        "",
        " ",
        "  \t\n\r\n \u3000 字",
        "\x00\x07",
        "\ufeff",
        "1234567890",
        "a1b2",
        "I'LL don't ſ's",
        "…——！？",
        "\U0010ffff",
    ),
    *("👩\u200d👩\u200d👧👍🏽🇨🇳", "𠀀𪚥\U00030000", "é\u0323\u0302", "각\u11a8", "नमस्ते", "שָׁלוֹם", "﨎﨑", "ﬁ²½Ⅷ"),
    *("哈" * 20_000, "a" * 20_000, " " * 20_000, "\n" * 5_000, "!?" * 10_000, "ab c\n" * 10_000),
]


def _flat(encoded: list[list[int]]) -> Tokens:
    """Return the ids of several texts as `Tokens`."""
    ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
    return np.fromiter(chain.from_iterable(encoded), np.uint32, int(ends[-1]) if encoded else 0), ends


def _fastokens(tokenizer: TextTokenizer) -> Callable[[list[str]], Tokens]:
    """Return a function that encodes texts with fastokens: https://github.com/crusoecloud/fastokens."""
    import fastokens

    engine = fastokens.Tokenizer.from_json_str((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    engine.no_truncation()
    engine.no_padding()

    def encode(texts: list[str]) -> Tokens:
        ids, edges = engine.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(edges, "<u8")[1:].astype(np.int64)

    return encode
