"""The table of a corpus: which files are taken, which are left out and why, their formats and sizes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from job.data.dataset_files import Rows
from job.data.json_stream import Compression

Format = Literal["json", "parquet", "rows"]
"""``rows``: what the `datasets` library reads."""
_SHOWN = 3
_MEGABYTES_FROM = 10**5


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus. Whether JSON holds an array or lines is seen when it is read: names do not tell."""

    index: int
    """Its place among the files, sorted by URL."""
    url: str
    """Its name, which is the same for every worker."""
    path: str
    """What is opened: the URL, or this machine's copy of a hub's file."""
    size: int
    """Bytes, as stored."""
    format: Format
    compression: Compression | None
    rows: Rows | None = None
    """How the `datasets` library reads it; None if it does not."""


@dataclass(frozen=True)
class LeftOut:
    """A file, or a folder and all in it, that is no part of the corpus."""

    name: str
    """Path below the source; of a file in a folder that is left out as a whole, the folder's, with a ``/``."""
    size: int
    reason: str


@dataclass(frozen=True)
class Listing:
    """What is at a source."""

    source: str
    files: tuple[CorpusFile, ...]
    names: tuple[str, ...]
    """Path below the source of each file."""
    by_content: tuple[str, ...]
    """Names of the files whose form was seen in their content alone."""
    left_out: tuple[LeftOut, ...]

    @property
    def size(self) -> int:
        """Bytes of all files that are taken, as stored."""
        return sum(one.size for one in self.files)

    def rows(self) -> list[tuple[str, str]]:
        """The table, as rows of name and value."""
        rows = [("files taken", _amount(len(self.files), self.size))]
        rows += [("  names", some(self.names))]
        formats = defaultdict[str, list[int]](list)
        for file in self.files:
            formats[_format(file)].append(file.size)
        rows += [(f"  {name}", _amount(len(sizes), sum(sizes))) for name, sizes in sorted(formats.items())]
        if self.by_content:
            rows.append(("  JSON lines by their content", some(self.by_content)))
        rows += [(f"left out: {reason}", what) for reason, what in self._reasons()]
        rows += [("the same twice?", " and ".join(names)) for names in self.in_two_forms()[:_SHOWN]]
        if (more := len(self.in_two_forms()) - _SHOWN) > 0:
            rows.append(("the same twice?", f"{more:,} more"))
        return rows

    def what_is_left_out(self) -> str:
        """All that is left out, on one line; empty if there is nothing."""
        return "; ".join(f"{reason}: {what}" for reason, what in self._reasons())

    def in_two_forms(self) -> list[tuple[str, ...]]:
        """Names that differ in their suffixes alone, such as ``x.json`` and ``x.jsonl.gz``."""
        return _alike(self.names, without_suffixes)

    def _reasons(self) -> Iterable[tuple[str, str]]:
        reasons = defaultdict[str, list[LeftOut]](list)
        for one in self.left_out:
            reasons[one.reason].append(one)
        for reason, found in sorted(reasons.items()):
            names = list(dict.fromkeys(one.name for one in found))
            size = sum(one.size for one in found)
            files = f" ({_amount(len(found), size)})" if len(found) > len(names) or size else ""
            yield reason, f"{some(names)}{files}"


def same_content(names: Sequence[str], contents: Sequence[object | None]) -> list[tuple[str, ...]]:
    """The names with equal contents, where these are known."""
    known = {name: content for name, content in zip(names, contents, strict=True) if content is not None}
    return _alike(list(known), known.__getitem__)


def without_suffixes(name: str) -> str:
    """`name` without what says how a file is packed and written."""
    for suffixes in ((".gz", ".zst"), (".json", ".jsonl", ".ndjson", ".parquet")):
        name = next((name.removesuffix(one) for one in suffixes if name.endswith(one)), name)
    return name


def _alike(names: Sequence[str], key: Callable[[str], object]) -> list[tuple[str, ...]]:
    found = defaultdict[object, list[str]](list)
    for name in names:
        found[key(name)].append(name)
    return [tuple(alike) for alike in found.values() if len(alike) > 1]


def _format(file: CorpusFile) -> str:
    if file.rows is not None:
        return f"{file.rows.builder}, by the datasets library"
    name = {"json": "JSON", "parquet": "Parquet"}[file.format]
    return f"{name}, {file.compression}" if file.compression else name


def _amount(files: int, size: int) -> str:
    shown = f"{size / 1e6:,.1f} MB" if size >= _MEGABYTES_FROM else f"{size / 1e3:,.1f} kB"
    return f"{files:,} file{'s' * (files != 1)}, {shown}"


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
