"""Find the files of a corpus at a source, and decide for each file whether it is read or left out.

    source → files there, links followed → without hidden ones → without our own output → of a known form → once each

The decision depends only on names and content, so all workers, on any machine, read the same files.
"""

import io
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from job import storage
from job.data import dataset_files, hub
from job.data.dataset_files import ALL, Choice, SourceFile
from job.data.documents import RecordError, json_value
from job.data.file_forms import (
    COMPRESSION_SUFFIXES,
    JSON_SUFFIXES,
    LIBRARY_SUFFIXES_TEXT,
    PARQUET_SUFFIX,
    Form,
    form_by_name,
    library_kind,
)
from job.data.folders import Pattern, files_below
from job.data.json_stream import ByteStream, Compression, without_blank
from job.data.listing import CorpusFile, LeftOut, Listing
from job.data.outputs import Outputs
from job.errors import UserError
from job.redaction import redacted_urls
from job.storage.local import PARTIAL

_MAGIC_BYTES: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_HUB_PATTERNS = [
    f"*{PARQUET_SUFFIX}",
    *(f"*{suffix}{compression}" for suffix in JSON_SUFFIXES for compression in ("", *COMPRESSION_SUFFIXES)),
]
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""Files that hubs and the `datasets` library put beside the data."""
_PATTERN_CHARACTERS = re.compile(r"[*?[]")
_HEAD_BYTES = 2**16
"""Bytes read from the start of a file to detect its format."""
_STARTS_OBJECT = re.compile(rb'\{\s*"')
_PARALLEL_READS = 8

HIDDEN = "hidden, the name begins with . or _"
DESCRIPTION = "describes a data set"
NO_RECORDS = "no known suffix, and the content is not JSON lines"
UNREADABLE = "cannot be read"
OTHER_FORMAT = "another format, while there are JSON or Parquet files"
OTHER_NAME = "another name of a file that is taken"


class _FoundFile(NamedTuple):
    """A file at the source."""

    name: str
    """Path below the source."""
    url: str
    path: str
    """Path or URL that is opened."""
    size: int
    """Size in bytes, as stored."""
    real_path: str | None = None
    """Path with all links resolved; None if the file is not on this machine."""


@dataclass
class _Search:
    """Everything that was found at a source."""

    files: list[_FoundFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    is_single_file: bool = False
    """True if the source names this one file, which is then the corpus under any name."""
    read: Callable[[str], bytes | None] = lambda name: None
    """Returns the content of a file by its path below the source; None if there is no such file."""


def discover(source: str, choice: Choice = ALL) -> Listing:
    """Return the files of the corpus, sorted by URL, and the files at the source that are left out.

    Args:
        source, choice: see `corpus.list_corpus`.

    Raises:
        UserError: no file was found, no file can be read, or the hub refuses access.
    """
    selected = dataset_files.select_files(source, choice)
    if selected is not None:
        return _listing_of_selected(source, selected, [])
    search = _find(source)
    left_out = search.left_out
    candidates = search.files if search.is_single_file else _without_outputs(search)
    by_name = {file.url: form for file in candidates if (form := form_by_name(file.url)) is not None}
    unknown = [file for file in candidates if file.url not in by_name]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        detected = dict(zip((file.url for file in unknown), pool.map(_form_by_content, unknown), strict=True))
    by_content = {url: form for url, form in detected.items() if isinstance(form, tuple)}
    left_out += [
        LeftOut(file.name, file.size, OTHER_FORMAT if library_kind(file.url) else str(detected[file.url]))
        for file in unknown
        if file.url not in by_content
    ]
    readable = [file for file in candidates if file.url in by_name or file.url in by_content]
    taken = _once_each(readable, lambda file: file.url in by_content, left_out)
    if not taken:
        listed = [(file.url, file.path, file.size) for file in unknown]
        if for_library := dataset_files.library_files(source, listed, choice.documents):
            names = {file.name for file in unknown if library_kind(file.url)}
            return _listing_of_selected(source, for_library, [item for item in left_out if item.name not in names])
    listing = Listing(
        redacted_urls(source),
        tuple(
            CorpusFile(index, file.url, file.path, file.size, *(by_name | by_content)[file.url])
            for index, file in enumerate(taken)
        ),
        tuple(printable(file.name) for file in taken),
        tuple(printable(file.name) for file in taken if file.url in by_content),
        _printable_left_out(left_out),
    )
    if not taken:
        if not left_out and _is_missing_here(source):
            sought = "" if storage.path_of(source).is_absolute() else f" (looked in {Path.cwd()})"
            raise UserError("data.source", source, f"no such file or folder{sought}", "correct the path")
        expected = "no file found"
        if left_out:
            expected = f"no file there can be read as a corpus: {listing.left_out_line()}"
        remedy = f"expected .json, .jsonl, .json.gz, .json.zst or .parquet files, or {LIBRARY_SUFFIXES_TEXT}"
        raise UserError("data.source", source, expected, remedy)
    return listing


def _is_missing_here(source: str) -> bool:
    """Return True if `source` is a path on this machine, without pattern characters, where there is nothing."""
    if storage.is_remote(source) or hub.has_scheme(source) or _PATTERN_CHARACTERS.search(source):
        return False
    return not storage.path_of(source).exists()


def _listing_of_selected(source: str, files: list[SourceFile], left_out: list[LeftOut]) -> Listing:
    """Return the listing of files that `dataset_files` has selected, sorted by URL."""
    files = sorted(files, key=lambda file: file.url)
    forms: list[Form] = [
        ("library", None) if file.library_reader else form_by_name(file.url) or ("json", None) for file in files
    ]
    return Listing(
        redacted_urls(source),
        tuple(
            CorpusFile(index, file.url, file.path, file.size, *form, file.library_reader)
            for index, (file, form) in enumerate(zip(files, forms, strict=True))
        ),
        tuple(printable(storage.url_path(file.url).removeprefix(f"{source.rstrip('/')}/")) for file in files),
        (),
        _printable_left_out(left_out),
    )


def _printable_left_out(left_out: list[LeftOut]) -> tuple[LeftOut, ...]:
    return tuple(LeftOut(printable(item.name), item.size, item.reason) for item in left_out)


def printable(name: str) -> str:
    r"""Return a file name as valid text: bytes that are not UTF-8, as in a name in GBK, become ``\xb1``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


# ---- Find the files at the source ----


def _find(source: str) -> _Search:
    if dataset_files.is_on_hub(source):
        return _find_on_hub(source)
    if storage.is_web(source):
        return _single_file(source, storage.size(source)) if storage.exists(source) else _Search()
    if storage.is_remote(source):
        return _find_in_store(source)
    return _find_on_this_machine(source, storage.path_of(source))


def _single_file(url: str, size: int) -> _Search:
    return _Search([_FoundFile(storage.url_path(url).rpartition("/")[2], url, url, size)], is_single_file=True)


def _find_on_hub(source: str) -> _Search:
    """Download the files of a data set on a hub."""
    files = hub.download(source, _HUB_PATTERNS)
    pattern = hub.files_part(source)
    root = files[0][0].removesuffix(hub.files_part(files[0][0]) or "") if files else source
    return _search_of(root, files, Pattern(source, pattern) if pattern else None)


def _find_in_store(source: str) -> _Search:
    """Find the files in an S3 store; a name that exists is never a pattern, whatever characters it has."""
    is_folder = source.endswith("/") or source.count("/") == 2
    if not is_folder and storage.exists(source):
        return _single_file(source, storage.size(source))
    root, pattern = f"{source.removesuffix('/')}/", None
    entries = storage.list_files(source)
    if not entries and not is_folder and _PATTERN_CHARACTERS.search(source):
        root, pattern = _split_pattern(source, source)
        entries = storage.glob(source)
    return _search_of(root, [(entry.url, entry.url, entry.size) for entry in entries], pattern)


def _search_of(root: str, entries: Iterable[tuple[str, str, int]], pattern: Pattern | None) -> _Search:
    """Return the result of a search that lists (URL, path, size) of the files below a folder's URL."""
    search = _Search()
    for url, path, size in sorted(entries):
        name = url.removeprefix(root)
        if hidden := _hidden_part(name, pattern):
            search.left_out.append(LeftOut(hidden, size, HIDDEN))
        else:
            search.files.append(_FoundFile(name, url, path, size))
    paths = {file.name: file.path for file in search.files}
    # In the store, a pattern lists only the files that it matches, but our outputs are known by other files.
    unlisted_root = root if pattern is not None and root.startswith("s3://") else None
    search.read = lambda name: _content(paths.get(name, f"{unlisted_root}{name}" if unlisted_root else None))
    return search


def _find_on_this_machine(source: str, path: Path) -> _Search:
    if path.is_file():
        return _single_file(str(path), path.stat().st_size)
    search, root, pattern = _Search(), path, None
    if not path.exists() and _PATTERN_CHARACTERS.search(str(path)):
        folder, pattern = _split_pattern(source, str(path))
        root = Path(folder or ".")

    def is_hidden(name: str) -> bool:
        if _hidden_part(name, pattern) is None:
            return False
        is_folder = (root / name).is_dir()
        may_match = pattern is None or (pattern.may_match_below(name) if is_folder else pattern.matches(name))
        if may_match and not name.endswith(PARTIAL):
            search.left_out.append(LeftOut(f"{name}/" if is_folder else name, 0, HIDDEN))
        return True

    def leave_out(name: str, reason: str) -> None:
        if pattern is None or pattern.matches(name):
            search.left_out.append(LeftOut(name, 0, reason))

    for file in files_below(root, pattern, is_hidden, leave_out):
        if pattern is None or pattern.matches(file.name):
            url = str(root / file.name)
            search.files.append(_FoundFile(file.name, url, url, file.size, file.real_path))
    search.read = lambda name: _content(str(root / name))
    return search


def _split_pattern(source: str, path: str) -> tuple[str, Pattern]:
    """Split a path with pattern characters into its literal folder, which ends with ``/``, and the pattern below it."""
    literal = path[: _PATTERN_CHARACTERS.search(path).start()]  # type: ignore[union-attr]
    folder = literal[: literal.rfind("/") + 1]
    return folder, Pattern(source, path.removeprefix(folder))


def is_hidden_name(name: str) -> bool:
    """Return True if files and folders of this name are never part of a corpus."""
    return name.startswith((".", "_"))


def _hidden_part(name: str, pattern: Pattern | None) -> str | None:
    """Return the part of a path down to its first hidden folder or file; None if no part is hidden.

    The part ends with ``/`` if it is a folder. A name is not hidden if the pattern asks for its first character.
    """
    parts = name.split("/")
    for depth, part in enumerate(parts, 1):
        if is_hidden_name(part) and not (pattern is not None and pattern.names_hidden(part)):
            return "/".join(parts[:depth]) + "/" * (depth < len(parts))
    return None


def _content(url: str | None) -> bytes | None:
    """Return the content of a file; None if it does not exist or cannot be read."""
    try:
        return None if url is None else storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, storage.IntegrityError):
        return None


# ---- Decide which files are taken ----


def _without_outputs(search: _Search) -> list[_FoundFile]:
    """Return the files that are neither this program's output nor descriptions; add the others to those left out."""
    outputs, files = Outputs(search.read), []
    for file in search.files:
        if owner := outputs.owner(file.name):
            folder, kind = owner
            search.left_out.append(LeftOut(folder or file.name, file.size, kind))
        elif _is_description(file.name):
            search.left_out.append(LeftOut(file.name, file.size, DESCRIPTION))
        else:
            files.append(file)
    return files


def _is_description(name: str) -> bool:
    return name.rpartition("/")[2] in _DESCRIPTIONS


def _once_each(
    files: list[_FoundFile], is_guessed: Callable[[_FoundFile], bool], left_out: list[LeftOut]
) -> list[_FoundFile]:
    """Keep one name of each real file, and add its other names to those left out.

    A name with a known suffix is preferred; otherwise the first name is kept. It does not matter which of the names are
    links, because that may differ between machines.

    Args:
        files: the files, under all their names.
        is_guessed: tells whether the format of a file is known only from its content.
        left_out: the list to which the other names are added.

    Returns:
        The files that are kept, sorted by URL.
    """
    chosen: dict[str, _FoundFile] = {}
    for file in sorted(files, key=lambda file: (is_guessed(file), file.url)):
        if file is not chosen.setdefault(file.real_path or file.url, file):
            left_out.append(LeftOut(file.name, file.size, OTHER_NAME))
    return sorted(chosen.values(), key=lambda file: file.url)


def is_corpus_name(name: str) -> bool:
    """Return True if the name alone shows that a file is read as part of a corpus."""
    return not _is_description(name) and form_by_name(name) is not None


def _form_by_content(file: _FoundFile) -> Form | str:
    """Return the form of a file that holds JSON lines; for any other file, return why it is left out."""
    if file.size == 0:
        return NO_RECORDS
    try:
        head = _head(file)
        compression = next((name for magic, name in _MAGIC_BYTES.items() if head.startswith(magic)), None)
        chunks = iter(ByteStream(io.BytesIO(head), compression, _HEAD_BYTES))
        line, line_end, _ = without_blank(next(chunks, b"")).partition(b"\n")
        if line_end or (len(head) >= file.size and next(chunks, None) is None):
            is_object = isinstance(json_value(line), dict)
        else:
            # The first line is longer than the head, so only its beginning can be checked.
            is_object = _STARTS_OBJECT.match(line) is not None
        return ("json", compression) if is_object else NO_RECORDS
    except RecordError:
        return NO_RECORDS
    except (PermissionError, FileNotFoundError):
        # A file that another program is working on may have been removed meanwhile.
        return UNREADABLE


def _head(file: _FoundFile) -> bytes:
    """Return the first bytes of a file, not decompressed."""
    try:
        return storage.open_ranges(file.path).read(0, min(_HEAD_BYTES, file.size))
    except storage.NoRanges:
        with storage.open_read(file.path) as source:
            return source.read(_HEAD_BYTES)
