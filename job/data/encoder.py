"""Many texts to tokens, by a tokenizer faster than the reference, for as long as the two agree.

The reference is the tokenizer itself, in Hugging Face's `tokenizers`. `fastokens` reads the same tokenizer.json and is
more than ten times as fast; that it gives the same ids is not taken on trust:

1. The reference alone makes the first tokens of a run. On that text, and on texts made to be hard, the other must agree
   with it id by id before it is used at all.
2. From then on every text must be spelled, byte for byte, by the tokens made of it, special tokens spelling nothing.
3. One text in 500, chosen by its content, is made by both, and must agree.
4. What the two may see differently, since each has Unicode's tables of another year, is left to the reference.

What falls short of 1, or fails, is not used, and that is said; on 2 and 3 `Disagreement` is raised, and whoever keeps
tokens of the run makes them again with the reference.
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
"""Ids of several texts in a row (`[tokens]`), and where each text's end (`[texts]`)."""

TRIAL_CHARACTERS = 2**19
ONE_IN = 500


class Disagreement(Exception):
    """The faster tokenizer gave other tokens than the reference, or some that do not spell the text."""


class Encoder:
    """Tokens of texts, which are the reference's.

    Args:
        tokenizer: the reference.
        engine: ``reference`` to use nothing else.
        on_notice: told in one line why the faster tokenizer is not used.
    """

    def __init__(self, tokenizer: TextTokenizer, engine: Engine, on_notice: Callable[[str], None]) -> None:
        self._tokenizer, self._on_notice = tokenizer, on_notice
        self._on_trial = engine == "auto" and tokenizer.normalization in (None, "NFC")
        self._seen: list[tuple[str, list[int]]] = []
        self._seen_characters = 0
        self._fast: Callable[[list[str]], Tokens] | None = None

    def encode(self, texts: Sequence[str], spelled: Sequence[bytes]) -> Tokens:
        """Tokens of `texts`, nothing added; `spelled` are the same in UTF-8.

        Raises:
            Disagreement: the faster tokenizer is not to be trusted, nor is what it made before.
        """
        if self._fast is None:
            encoded = self._tokenizer.encode(texts)
            if self._on_trial:
                self._seen += zip(texts, encoded, strict=True)
                self._seen_characters += sum(map(len, texts))
                if self._seen_characters >= TRIAL_CHARACTERS:
                    self._try()
            return _flat(encoded)
        by_reference = [i for i, text in enumerate(texts) if self._is_uncertain(text)]
        easy, bytes_of_easy = list(texts), list(spelled)
        for i in by_reference:
            easy[i], bytes_of_easy[i] = "", b""
        try:
            ids, ends = self._fast(easy)
        except BaseException as error:
            self._fast = None
            self._give_up(error)
            return _flat(self._tokenizer.encode(texts))
        self._check(easy, bytes_of_easy, ids, ends)
        if not by_reference:
            return ids, ends
        exact = self._tokenizer.encode([texts[i] for i in by_reference])
        lengths = np.diff(ends, prepend=0)
        lengths[by_reference] = [len(one) for one in exact]
        between = np.split(ids, ends[by_reference])
        in_order = chain.from_iterable(zip(between, [np.array(one, np.uint32) for one in exact], strict=False))
        return np.concatenate([*in_order, between[-1]]), np.cumsum(lengths)

    def _try(self) -> None:
        """Takes the faster tokenizer into use, should it agree on all that was seen and on what is hard."""
        hard = self._hard_texts()
        seen, self._seen, self._on_trial = (
            [*self._seen, *zip(hard, self._tokenizer.encode(hard), strict=True)],
            [],
            False,
        )
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
            self._on_notice("fastokens gives other tokens than the reference; the reference makes them all, slowly")

    def _give_up(self, error: BaseException) -> None:
        # A panic in Rust is no Exception, so that Python code does not catch it by chance.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        why = f"{type(error).__name__}: {one_line(str(error))[:200]}"
        self._on_notice(f"fastokens cannot be used ({why}); the reference makes the tokens, slowly")

    def _is_uncertain(self, text: str) -> bool:
        # U+180E was white space until Unicode 6.3, and is for some regular expressions.
        return "\u180e" in text or (
            self._tokenizer.normalization is not None and not unicodedata.is_normalized("NFC", text)
        )

    def _check(self, texts: list[str], spelled: list[bytes], ids: NDArray[np.uint32], ends: NDArray[np.int64]) -> None:
        if not self._spell(spelled, ids, ends):
            raise Disagreement("tokens made by fastokens do not spell their text")
        sample = [i for i, one in enumerate(spelled) if one and zlib.crc32(one) % ONE_IN == 0]
        for i, exact in zip(sample, self._tokenizer.encode([texts[i] for i in sample]), strict=True):
            if not np.array_equal(ids[ends[i - 1] if i else 0 : ends[i]], exact):
                raise Disagreement(f"fastokens gives other tokens than the reference for {texts[i][:40]!r}...")

    def _spell(self, spelled: list[bytes], ids: NDArray[np.uint32], ends: NDArray[np.int64]) -> bool:
        """Whether each text's tokens, put together, are its bytes."""
        letters, starts, sizes = self._table
        if len(ends) != len(spelled) or (len(ids) and ids.max() >= len(sizes)):
            return False
        own = sizes[ids]
        stops = np.cumsum(own)
        if not np.array_equal(np.append(0, stops)[ends], np.cumsum([len(one) for one in spelled])):
            return False
        places = np.repeat(starts[ids] - (stops - own).astype(np.int32), own)
        places += np.arange(len(places), dtype=np.int32)
        return letters.take(places, mode="clip").tobytes() == b"".join(spelled)

    @cached_property
    def _table(self) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]:
        """The bytes of all tokens in a row, where each token's start in it, and how many they are."""
        tokens = self._tokenizer.token_bytes
        sizes = np.array([len(token) for token in tokens], np.int32)
        return np.frombuffer(b"".join(tokens), np.uint8), np.cumsum(sizes, dtype=np.int32) - sizes, sizes

    def _hard_texts(self) -> list[str]:
        """Texts on which two tokenizers may differ where on any usual text they agree."""
        names = [f"前{token}{space}{token}后" for token in self._tokenizer.added_tokens for space in ("", " ", "\n")]
        characters = [
            *range(0x180),
            *range(0x180, 0x3400, 7),
            *range(0x3400, 0xD800, 401),
            *range(0xE000, 0x110000, 397),
        ]
        in_all_places = [f"字{c}a{c} {c}1.{c}\n{c}'s" for c in map(chr, characters)]
        return [text for text in [*_HARD, *names, *in_all_places] if not self._is_uncertain(text)]


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
    ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
    return np.fromiter(chain.from_iterable(encoded), np.uint32, int(ends[-1]) if encoded else 0), ends


def _fastokens(tokenizer: TextTokenizer) -> Callable[[list[str]], Tokens]:
    """Encodes by the package of that name: https://github.com/crusoecloud/fastokens."""
    import fastokens

    engine = fastokens.Tokenizer.from_json_str((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    engine.no_truncation()
    engine.no_padding()

    def encode(texts: list[str]) -> Tokens:
        ids, edges = engine.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(edges, "<u8")[1:].astype(np.int64)

    return encode
