"""The listing of a corpus: the files that are read, with formats and sizes, and the files that are left out and why."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from job import amounts
from job.data.dataset_files import LibraryReader
from job.data.file_forms import Format, without_suffixes
from job.data.json_stream import Compression

_MAX_SHOWN_NAMES = 3


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus.

    Whether JSON holds an array or lines is decided when the file is read, because the name does not tell.
    """

    index: int
    """Position among the files, which are sorted by URL."""
    url: str
    """Name of the file, the same for every worker."""
    path: str
    """Path or URL that is opened: `url`, or the local copy of a file on a hub."""
    size: int
    """Size in bytes, as stored."""
    format: Format
    compression: Compression | None
    library_reader: LibraryReader | None = None
    """Reader of the `datasets` library for the file; None if the file is read without the library."""


@dataclass(frozen=True)
class LeftOut:
    """A file that is not part of the corpus."""

    name: str
    """Path below the source. If a whole folder is left out, the path of the folder, with ``/`` at its end."""
    size: int
    reason: str


@dataclass(frozen=True)
class Listing:
    """Everything that was found at a source."""

    source: str
    files: tuple[CorpusFile, ...]
    names: tuple[str, ...]
    """Path of each file below the source."""
    by_content: tuple[str, ...]
    """Names of the files whose format is known only from their content."""
    left_out: tuple[LeftOut, ...]

    @property
    def size(self) -> int:
        """Size in bytes of all files of the corpus, as stored."""
        return sum(file.size for file in self.files)

    def rows(self) -> list[tuple[str, str]]:
        """Return the table that is shown to the user, as rows of name and value."""
        rows = [("files taken", _amount(len(self.files), self.size))]
        rows += [("  names", shorten_names(self.names))]
        sizes_by_format = defaultdict[str, list[int]](list)
        for file in self.files:
            sizes_by_format[_format_name(file)].append(file.size)
        rows += [(f"  {name}", _amount(len(sizes), sum(sizes))) for name, sizes in sorted(sizes_by_format.items())]
        if self.by_content:
            rows.append(("  JSON lines, detected by content", shorten_names(self.by_content)))
        rows += [(f"left out: {reason}", names) for reason, names in self._left_out_by_reason()]
        duplicates = self.in_several_forms()
        rows += [("possible duplicates", " and ".join(names)) for names in duplicates[:_MAX_SHOWN_NAMES]]
        if (more := len(duplicates) - _MAX_SHOWN_NAMES) > 0:
            rows.append(("possible duplicates", f"{more:,} more"))
        return rows

    def left_out_line(self) -> str:
        """Return the files that are left out and the reasons, on one line; "" if there are none."""
        return "; ".join(f"{reason}: {names}" for reason, names in self._left_out_by_reason())

    def in_several_forms(self) -> list[tuple[str, ...]]:
        """Return groups of names that differ only in their suffixes, such as ``x.json`` and ``x.jsonl.gz``."""
        return _groups_with_equal_key(self.names, without_suffixes)

    def _left_out_by_reason(self) -> Iterable[tuple[str, str]]:
        by_reason = defaultdict[str, list[LeftOut]](list)
        for item in self.left_out:
            by_reason[item.reason].append(item)
        for reason, items in sorted(by_reason.items()):
            names = list(dict.fromkeys(item.name for item in items))
            size = sum(item.size for item in items)
            amount = f" ({_amount(len(items), size)})" if len(items) > len(names) or size else ""
            yield reason, f"{shorten_names(names)}{amount}"


def same_content(names: Sequence[str], contents: Sequence[object | None]) -> list[tuple[str, ...]]:
    """Return groups of names with equal contents; a content of None is unknown and equals no other."""
    known = {name: content for name, content in zip(names, contents, strict=True) if content is not None}
    return _groups_with_equal_key(list(known), known.__getitem__)


def _groups_with_equal_key(names: Sequence[str], key: Callable[[str], object]) -> list[tuple[str, ...]]:
    """Return the groups of two or more names that have the same key."""
    groups = defaultdict[object, list[str]](list)
    for name in names:
        groups[key(name)].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _format_name(file: CorpusFile) -> str:
    if file.library_reader is not None:
        return f"{file.library_reader.builder}, by the datasets library"
    name = "Parquet" if file.format == "parquet" else "JSON"
    return f"{name}, {file.compression}" if file.compression else name


def _amount(files: int, size: int) -> str:
    return f"{amounts.files(files)}, {amounts.size(size)}"


def shorten_names(names: Sequence[str]) -> str:
    """Return the first names, joined by commas, and the number of the others."""
    more = len(names) - _MAX_SHOWN_NAMES
    return ", ".join(names[:_MAX_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")
