"""Which files are the corpus: found at a source, and each taken, or left out with a reason.

    source → files there, links followed → without hidden ones → without our own output → of a known form → once each

Everything is decided by names and content, so that all workers, on whatever machines, take the same files.
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
from job.data.dataset_files import ALL, Choice, Found
from job.data.documents import Unfit, json_value
from job.data.folders import Pattern, files_below
from job.data.json_stream import COMPRESSIONS, ByteStream, Compression, without_blank
from job.data.listing import CorpusFile, Format, LeftOut, Listing
from job.data.outputs import Outputs
from job.errors import UserError
from job.redaction import redacted_urls
from job.storage.local import PARTIAL

Form = tuple[Format, Compression | None]
_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_JSON_NAMES = ("json", "jsonl", "ndjson")
_DATA_FILE = re.compile(
    rf"\.(?:(?:{'|'.join(_JSON_NAMES)})(?:\.({'|'.join(COMPRESSIONS)}))?|(parquet))$", re.IGNORECASE
)
_HUB_PATTERNS = ["*.parquet", *(f"*.{one}{end}" for one in _JSON_NAMES for end in ("", ".gz", ".zst"))]
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""What hubs and the `datasets` library put beside the data."""
_MAGIC_CHARACTERS = re.compile(r"[*?[]")
_HEAD_BYTES = 2**16
"""How much of a file is read to see what it holds."""
_BEGINS_OBJECT = re.compile(rb'\{\s*"')
_PARALLEL_READS = 8

HIDDEN = "hidden, the name begins with . or _"
DESCRIPTION = "describes a data set"
NO_RECORDS = "no suffix that says what it is, and no JSON lines in it"
UNREADABLE = "cannot be read"
OTHER_KIND = "of another kind than JSON and Parquet, which are there"
OTHER_NAME = "another name of a file that is taken"


class _File(NamedTuple):
    """A file that was found."""

    name: str
    """Path below the source."""
    url: str
    path: str
    size: int
    real: str | None = None
    """Path without links, where links are known."""


@dataclass
class _Found:
    """What is at a source."""

    files: list[_File] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    is_named: bool = False
    """True if the source names this one file: then it is the corpus, whatever its name."""
    read: Callable[[str], bytes | None] = lambda name: None
    """Gives the content of a file by its name; None where there is none."""


def discover(source: str, choice: Choice = ALL) -> Listing:
    """The files of the corpus, sorted by URL, and what else is there.

    Args:
        source, choice: see `corpus.list_corpus`.

    Raises:
        UserError: there is nothing, or nothing readable, or the hub does not give it.
    """
    chosen = dataset_files.chosen_files(source, choice, lambda url: _form_by_name(url) is not None)
    if chosen is not None:
        return _listing_of(source, chosen, [])
    found = _find(source)
    left_out = found.left_out
    candidates = found.files if found.is_named else _without_outputs(found)
    forms = {one.url: form for one in candidates if (form := _form_by_name(one.url)) is not None}
    unknown = [one for one in candidates if one.url not in forms]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        seen = dict(zip((one.url for one in unknown), pool.map(_form_by_content, unknown), strict=True))
    by_content = {url: form for url, form in seen.items() if isinstance(form, tuple)}
    left_out += [
        LeftOut(one.name, one.size, OTHER_KIND if dataset_files.ending(one.url) else str(seen[one.url]))
        for one in unknown
        if one.url not in by_content
    ]
    readable = [one for one in candidates if one.url in forms or one.url in by_content]
    taken = _once_each(readable, lambda one: one.url in by_content, left_out)
    if not taken:
        others = dataset_files.other_files(source, [(one.url, one.path, one.size) for one in unknown], choice.documents)
        if others:
            names = {one.name for one in unknown if dataset_files.ending(one.url)}
            return _listing_of(source, others, [one for one in left_out if one.name not in names])
    listing = Listing(
        redacted_urls(source),
        tuple(
            CorpusFile(index, one.url, one.path, one.size, *(forms | by_content)[one.url])
            for index, one in enumerate(taken)
        ),
        tuple(shown(one.name) for one in taken),
        tuple(shown(one.name) for one in taken if one.url in by_content),
        tuple(LeftOut(shown(one.name), one.size, one.reason) for one in left_out),
    )
    if not taken:
        expected = "there is no file"
        if left_out:
            expected = f"none of the files there is a corpus: {listing.what_is_left_out()}"
        remedy = f"give .json, .jsonl, .json.gz, .json.zst or .parquet files, or {dataset_files.ENDINGS}"
        raise UserError("data.source", source, expected, remedy)
    return listing


def _listing_of(source: str, files: list[Found], left_out: list[LeftOut]) -> Listing:
    """What the `datasets` library has a say in: its files, sorted by URL."""
    files = sorted(files, key=lambda one: one.url)
    forms: list[Form] = [("rows", None) if one.rows else _form_by_name(one.url) or ("json", None) for one in files]
    return Listing(
        redacted_urls(source),
        tuple(
            CorpusFile(index, one.url, one.path, one.size, *form, one.rows)
            for index, (one, form) in enumerate(zip(files, forms, strict=True))
        ),
        tuple(shown(storage.url_path(one.url).removeprefix(f"{source.rstrip('/')}/")) for one in files),
        (),
        tuple(LeftOut(shown(one.name), one.size, one.reason) for one in left_out),
    )


def shown(name: str) -> str:
    r"""`name` as text: bytes that are no UTF-8, such as those of a name in GBK, as ``\xb1``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


# ---- What is there ----


def _find(source: str) -> _Found:
    if hub.has_scheme(source):
        return _on_hub(source)
    if storage.is_web(source):
        return _named(source, storage.size(source)) if storage.exists(source) else _Found()
    if storage.is_remote(source):
        return _in_store(source)
    path = Path(source.removeprefix("file://")).expanduser()
    if not path.exists() and hub.is_name(source) and _form_by_name(source) is None:
        return _on_hub(source)
    return _on_this_machine(source, path)


def _named(url: str, size: int) -> _Found:
    return _Found([_File(storage.url_path(url).rpartition("/")[2], url, url, size)], is_named=True)


def _on_hub(source: str) -> _Found:
    """What a hub has, downloaded to this machine now."""
    files = hub.download(source, _HUB_PATTERNS)
    asked = hub.files_of(source)
    root = files[0][0].removesuffix(hub.files_of(files[0][0]) or "") if files else source
    return _below(root, files, Pattern(source, asked) if asked else None)


def _in_store(source: str) -> _Found:
    """What an S3 store has; a name that exists is no pattern, whatever its characters."""
    is_folder = source.endswith("/") or source.count("/") == 2
    if not is_folder and storage.exists(source):
        return _named(source, storage.size(source))
    root, pattern = f"{source.removesuffix('/')}/", None
    entries = storage.list_files(source)
    if not entries and not is_folder and _MAGIC_CHARACTERS.search(source):
        root, pattern = _pattern(source, source)
        entries = storage.glob(source)
    return _below(root, [(entry.url, entry.url, entry.size) for entry in entries], pattern)


def _below(root: str, entries: Iterable[tuple[str, str, int]], pattern: Pattern | None) -> _Found:
    """Files that were listed, as URL, path and size, below a folder's URL."""
    found = _Found()
    for url, path, size in sorted(entries):
        name = url.removeprefix(root)
        if hidden := _hidden_part(name, pattern):
            found.left_out.append(LeftOut(hidden, size, HIDDEN))
        else:
            found.files.append(_File(name, url, path, size))
    paths = {one.name: one.path for one in found.files}
    # A pattern has listed what it matches alone, in the store.
    beyond = root if pattern is not None and root.startswith("s3://") else None
    found.read = lambda name: _content(paths.get(name, f"{beyond}{name}" if beyond else None))
    return found


def _on_this_machine(source: str, path: Path) -> _Found:
    if path.is_file():
        return _named(str(path), path.stat().st_size)
    found, root, pattern = _Found(), path, None
    if not path.exists() and _MAGIC_CHARACTERS.search(str(path)):
        folder, pattern = _pattern(source, str(path))
        root = Path(folder or ".")

    def is_hidden(name: str) -> bool:
        if _hidden_part(name, pattern) is None:
            return False
        is_folder = (root / name).is_dir()
        may_match = pattern is None or (pattern.may_match_below(name) if is_folder else pattern.matches(name))
        if may_match and not name.endswith(PARTIAL):
            found.left_out.append(LeftOut(f"{name}/" if is_folder else name, 0, HIDDEN))
        return True

    def leave_out(name: str, reason: str) -> None:
        if pattern is None or pattern.matches(name):
            found.left_out.append(LeftOut(name, 0, reason))

    for one in files_below(root, pattern, is_hidden, leave_out):
        if pattern is None or pattern.matches(one.name):
            url = str(root / one.name)
            found.files.append(_File(one.name, url, url, one.size, one.real))
    found.read = lambda name: _content(str(root / name))
    return found


def _pattern(source: str, path: str) -> tuple[str, Pattern]:
    """The folder that a pattern begins with, ``/`` included, and what is below it as a pattern."""
    literal = path[: _MAGIC_CHARACTERS.search(path).start()]  # type: ignore[union-attr]
    folder = literal[: literal.rfind("/") + 1]
    return folder, Pattern(source, path.removeprefix(folder))


def is_hidden_name(name: str) -> bool:
    """Return whether a file or folder of this name is no part of a corpus."""
    return name.startswith((".", "_"))


def _hidden_part(name: str, pattern: Pattern | None) -> str | None:
    """The part of a name down to the first hidden folder or file in it, with ``/`` after a folder; None if none is.

    What a pattern asks for by that character is not hidden.
    """
    parts = name.split("/")
    for depth, part in enumerate(parts, 1):
        if is_hidden_name(part) and not (pattern is not None and pattern.names_hidden(part)):
            return "/".join(parts[:depth]) + "/" * (depth < len(parts))
    return None


def _content(url: str | None) -> bytes | None:
    try:
        return None if url is None else storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, storage.IntegrityError):
        return None


# ---- What of it is taken ----


def _without_outputs(found: _Found) -> list[_File]:
    """The files that are neither this program's own nor descriptions; the others are added to those left out."""
    outputs, taken = Outputs(found.read), []
    for one in found.files:
        if owner := outputs.owner(one.name):
            folder, kind = owner
            found.left_out.append(LeftOut(folder or one.name, one.size, kind))
        elif one.name.rpartition("/")[2] in _DESCRIPTIONS:
            found.left_out.append(LeftOut(one.name, one.size, DESCRIPTION))
        else:
            taken.append(one)
    return taken


def _once_each(files: list[_File], is_guessed: Callable[[_File], bool], left_out: list[LeftOut]) -> list[_File]:
    """One name for each real file: one that says what the file is before one that does not, then the first in order.

    Which of the names are links does not count: that may differ between machines.
    """
    chosen: dict[str, _File] = {}
    for one in sorted(files, key=lambda one: (is_guessed(one), one.url)):
        if one is not chosen.setdefault(one.real or one.url, one):
            left_out.append(LeftOut(one.name, one.size, OTHER_NAME))
    return sorted(chosen.values(), key=lambda one: one.url)


def is_corpus_name(name: str) -> bool:
    """Return whether the name alone says that a file is read as a part of the corpus."""
    return name.rpartition("/")[2] not in _DESCRIPTIONS and _form_by_name(name) is not None


def _form_by_name(url: str) -> Form | None:
    """How the name says that a file is read: format and compression."""
    match = _DATA_FILE.search(storage.url_path(url).rpartition("/")[2])
    if match is None:
        return None
    return "parquet" if match[2] else "json", COMPRESSIONS.get((match[1] or "").lower())


def _form_by_content(file: _File) -> Form | str:
    """The same from the content of a file that holds JSON lines; of any other why it is left out."""
    if file.size == 0:
        return NO_RECORDS
    try:
        stored = _head(file)
        compression = next((name for magic, name in _MAGIC.items() if stored.startswith(magic)), None)
        chunks = iter(ByteStream(io.BytesIO(stored), compression, _HEAD_BYTES))
        line, line_end, _ = without_blank(next(chunks, b"")).partition(b"\n")
        if line_end or (len(stored) >= file.size and next(chunks, None) is None):
            is_object = isinstance(json_value(line), dict)
        else:  # the line is longer than the head
            is_object = _BEGINS_OBJECT.match(line) is not None
        return ("json", compression) if is_object else NO_RECORDS
    except Unfit:
        return NO_RECORDS
    except (PermissionError, FileNotFoundError):  # a file that another program has at work may be gone already
        return UNREADABLE


def _head(file: _File) -> bytes:
    try:
        return storage.open_ranges(file.path).read(0, min(_HEAD_BYTES, file.size))
    except storage.NoRanges:
        with storage.open_read(file.path) as source:
            return source.read(_HEAD_BYTES)
