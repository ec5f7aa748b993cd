"""Slices, the units of work that a corpus is cut into, as their readers yield them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from job.data.documents import BadRecord, Document


@dataclass(frozen=True)
class SliceStart:
    """The records of this slice follow."""

    index: int


@dataclass(frozen=True)
class SliceEnd:
    """That was the whole slice."""

    index: int
    is_last: bool
    """True if the file, or the group of files, has no slice after this one."""


SliceItem = SliceStart | Document | BadRecord | SliceEnd


class Cursor:
    """The position among its slices of a reader that passes over every record of a file.

    Args:
        wanted: asked once for each slice, in order, when reading comes to it.
    """

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self._wanted = wanted
        self._index = -1
        self.is_wanted = False
        """True if the records of the slice that was come to last are to be read."""

    def advance(self, index: int) -> Iterator[SliceStart | SliceEnd]:
        """Come to a slice; yield the ends and the starts of wanted slices on the way."""
        while self._index < index:
            if self.is_wanted:
                yield SliceEnd(self._index, False)
            self._index += 1
            self.is_wanted = self._wanted(self._index)
            if self.is_wanted:
                yield SliceStart(self._index)

    def finish(self) -> Iterator[SliceEnd]:
        """Yield the end of the file's last slice, if that is wanted."""
        if self.is_wanted:
            yield SliceEnd(self._index, True)
