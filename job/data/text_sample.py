"""A sample of a corpus' text, chosen by a hash of each document, for training a tokenizer.

    documents → training or validation split → the smallest hashes of each, up to a number of bytes

The sample comes from everywhere in the corpus. It depends only on the documents, the seed and the sizes: not on the
order of the documents, or on the files that hold them.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from heapq import heappop, heappush

from job.data.corpus import BadRecord, Document, OnListed, SliceEnd, list_corpus, read_slices
from job.data.recipe import OnBadRecord, Recipe
from job.data.split import is_validation

_PURPOSE = b"tokenizer sample"
"""Personalization of the hash (16 bytes, its full length): the validation split uses the same function without it, so
the two choices are independent."""

OnRead = Callable[[int, int], None]
"""Called with the number of documents, and of UTF-8 bytes of text, that were read so far."""


class TextSample:
    """The texts with the smallest hashes among those that are added, up to a number of bytes.

    A text that is added several times is taken once. A sample of less text than the limit is all of it. Otherwise the
    last text, the one with the largest hash, is cut so that the sample has the limit's size. The hash is of the text
    and not of its id, so that an id shared by many documents does not select all of them together.

    Args:
        limit_bytes: the largest size of the sample, in bytes of UTF-8 text. Memory stays below about twice as much.
        seed: key of the hash.
    """

    def __init__(self, limit_bytes: int, seed: int) -> None:
        self._limit_bytes, self._key = limit_bytes, seed.to_bytes(8, "little")
        self._kept: list[tuple[int, bytes]] = []
        """Heap of the negative hash and the text, so the text with the largest hash comes first."""
        self._hashes = set[int]()
        self._kept_bytes = 0
        self.documents = 0
        """Documents that were added, without empty ones."""
        self.utf8_bytes = 0
        """Bytes of text that were added."""

    def add(self, text: str) -> None:
        """Offer the text of a document to the sample. An empty text is ignored."""
        content = text.encode()
        if not content:
            return
        self.documents += 1
        self.utf8_bytes += len(content)
        digest = blake2b(content, digest_size=16, key=self._key, person=_PURPOSE).digest()
        hashed = int.from_bytes(digest, "little")
        is_full = self._kept_bytes >= self._limit_bytes
        if (is_full and hashed > -self._kept[0][0]) or hashed in self._hashes:
            return
        content = content[: self._limit_bytes]
        heappush(self._kept, (-hashed, content))
        self._hashes.add(hashed)
        self._kept_bytes += len(content)
        while self._kept_bytes - len(self._kept[0][1]) >= self._limit_bytes:
            removed, content = heappop(self._kept)
            self._hashes.remove(-removed)
            self._kept_bytes -= len(content)

    def __len__(self) -> int:
        """Return the number of texts in the sample."""
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes of UTF-8 text in the sample; up to 3 more if the last text is cut inside a character."""
        return min(self._kept_bytes, self._limit_bytes)

    def texts(self) -> Iterator[str]:
        """Yield the texts of the sample, the smallest hash first."""
        left = self._limit_bytes
        for _, content in sorted(self._kept, reverse=True):
            yield content[:left].decode(errors="ignore")  # What is ignored is a character that is cut at the end.
            left -= len(content)


def sample_corpus(
    recipe: Recipe,
    train_bytes: int,
    validation_bytes: int,
    on_read: OnRead = lambda documents, utf8_bytes: None,
    on_bad_record: OnBadRecord = lambda record: None,
    on_listed: OnListed = lambda listing: None,
) -> tuple[TextSample, TextSample]:
    """Read the whole corpus; return a sample of the training split and one of the validation split.

    Args:
        recipe: the settings of the corpus and of the split.
        train_bytes: the largest size of the first sample, in bytes of UTF-8 text.
        validation_bytes: the same of the second sample.
        on_read: called after each slice.
        on_bad_record: called with each record that is left out.
        on_listed: called with what was found at the source.

    Raises:
        UserError: the corpus cannot be read, or has a bad record that is not to be left out.
    """
    train, validation = TextSample(train_bytes, recipe.seed), TextSample(validation_bytes, recipe.seed)
    for file in list_corpus(recipe.source, on_listed, recipe.choice):
        for item in read_slices(file, recipe.slice_bytes, lambda _: True, recipe.text_field, recipe.id_field):
            match item:
                case Document(document_id, text):
                    for_validation = is_validation(document_id, text, recipe.seed, recipe.validation_fraction)
                    (validation if for_validation else train).add(text)
                case BadRecord():
                    recipe.tolerate(item)
                    on_bad_record(item)
                case SliceEnd():
                    on_read(train.documents + validation.documents, train.utf8_bytes + validation.utf8_bytes)
    return train, validation
