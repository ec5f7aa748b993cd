"""The items that a reader of a slice yields: its start, its documents and bad records, its end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from job.data.documents import BadRecord, Document


@dataclass(frozen=True)
class SliceStart:
    """The start of a slice; its records follow."""

    index: int


@dataclass(frozen=True)
class SliceEnd:
    """The end of a slice."""

    index: int
    is_last: bool
    """True if the file, or the group of files, has no slice after this one."""


SliceItem = SliceStart | Document | BadRecord | SliceEnd


class Cursor:
    """The current slice of a reader that passes over every record of a file.

    Args:
        wanted: tells whether to read a slice; called once for each slice, in order, when the reader reaches it.
    """

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self._wanted = wanted
        self._index = -1
        self.is_wanted = False
        """True if the records of the current slice are to be read."""

    def advance(self, index: int) -> Iterator[SliceStart | SliceEnd]:
        """Move on to a slice; yield the ends and starts of the wanted slices on the way."""
        while self._index < index:
            if self.is_wanted:
                yield SliceEnd(self._index, False)
            self._index += 1
            self.is_wanted = self._wanted(self._index)
            if self.is_wanted:
                yield SliceStart(self._index)

    def finish(self) -> Iterator[SliceEnd]:
        """Yield the end of the file's last slice, if that slice is wanted."""
        if self.is_wanted:
            yield SliceEnd(self._index, True)
