"""Choose which files of a folder are uploaded as a data set: prepared shards or corpus files only.

A folder with a manifest.json written by `job prepare` is a prepared data set: the files that the manifest lists are
sent. Any other folder is a corpus: the files that `job prepare` reads are sent, chosen by name and, if they are small,
by content. Links that lead out of the folder are not followed. Every file that is left out has a reason, which is
printed.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.discovery import is_corpus_name, is_hidden_name
from job.data.manifest import MANIFEST_NAME, load_manifest
from job.data.tokenizer_files import TOKENIZER_FILES
from job.errors import UserError
from launch.swanlab.secret_scan import find_secret, is_secret_file_name

_INSPECTED_BYTES = 2**20
"""JSON files up to this size are read to decide: settings and keys of other programs are small, a corpus is not."""


@dataclass(frozen=True)
class Selection:
    """Files that are sent, and those that are left out."""

    files: dict[str, Path]
    """Local paths by path in the data set, sorted."""
    excluded: dict[str, str]
    """Reason by path for each file that is not sent. A folder left out as a whole is listed without its files."""


def select(source: Path) -> Selection:
    """Choose the files to send from `source`, a file or folder.

    Raises:
        UserError: there is nothing to send, or a file of a prepared data set is missing or not in the folder.
    """
    if not source.exists():
        raise UserError("upload", str(source), "there is no such file or folder")
    if source.is_file():
        if reason := _why_not_corpus(source):
            raise UserError("upload", str(source), f"is not sent: it is {reason}", _EXPECTED)
        return Selection({source.name: source}, {})
    files: dict[str, Path] = {}
    excluded: dict[str, str] = {}
    required = _data_set_files(source) if (source / MANIFEST_NAME).is_file() else None
    for name, path, why_not in _walk(source, source.resolve()):
        if reason := why_not or _why_not_sent(name, path, required):
            excluded[name] = reason
        else:
            files[name] = path
    _check_complete(source, files, required, excluded)
    return Selection(dict(sorted(files.items())), dict(sorted(excluded.items())))


_EXPECTED = "expected a folder made by `job prepare`, or .json, .jsonl, .json.gz, .json.zst or .parquet files"


def _why_not_sent(name: str, path: Path, required: dict[str, int | None] | None) -> str:
    if required is None:
        return _why_not_corpus(path)
    return "" if name in required else "not part of the data set: manifest.json does not list it"


def _check_complete(
    source: Path, files: dict[str, Path], required: dict[str, int | None] | None, excluded: dict[str, str]
) -> None:
    for name, size_bytes in (required or {}).items():
        if size_bytes is not None and name not in files:
            reason = excluded.get(name, "missing")
            remedy = "copy the file into the folder"
            raise UserError("upload", str(source / name), f"belongs to the data set and is {reason}", remedy)
        if size_bytes is not None and (found := files[name].stat().st_size) != size_bytes:
            expected = f"has {found:,} bytes, but manifest.json says {size_bytes:,}"
            raise UserError("upload", str(source / name), expected, "prepare the data set again")
    if not files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(excluded.items())[:3])
        expected = f"there is nothing to send ({reasons or 'the folder is empty'})"
        raise UserError("upload", str(source), expected, _EXPECTED)


def _data_set_files(folder: Path) -> dict[str, int | None]:
    """Return the files of a prepared data set by path: the size in bytes if training needs the file, else None."""
    try:
        manifest = load_manifest(str(folder))
    except UserError as error:
        raise UserError("upload", str(folder), error.expected, error.remedy) from None
    sizes: dict[str, int | None] = {shard.name: shard.size for shard in manifest.train + manifest.validation}
    sizes |= {f"{manifest.tokenizer}/{name}": None for name in TOKENIZER_FILES}
    for name in (MANIFEST_NAME, f"{manifest.tokenizer}/tokenizer.json"):
        path = folder / name
        sizes[name] = path.stat().st_size if path.is_file() else 0
    return sizes


def _walk(source: Path, root: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield (path in the data set, local path, reason why it is not sent or "") for each file below `source`.

    A folder that is left out as a whole is yielded once, without its files.
    """
    for folder, folders, names in os.walk(source):
        for name in sorted(folders):
            path = Path(folder, name)
            if reason := "hidden" if is_hidden_name(name) else _why_not_followed(path, root):
                folders.remove(name)
                yield path.relative_to(source).as_posix(), path, reason
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            reason = "hidden" if is_hidden_name(name) else _why_not_followed(path, root)
            yield path.relative_to(source).as_posix(), path, reason or ("" if path.is_file() else "not a file")


def _why_not_followed(path: Path, root: Path) -> str:
    """Return why a link is not followed; empty if `path` is not a link or links to a file below `root`."""
    if not path.is_symlink():
        return ""
    target = path.resolve()
    if not target.is_relative_to(root):
        return "a link that leads out of the folder"
    if any(map(is_hidden_name, target.relative_to(root).parts)):
        return "a link to something hidden"
    return "a link to a folder" if target.is_dir() else ""


# ---- Corpus files ----


def _why_not_corpus(path: Path) -> str:
    """Return what the file is instead of a corpus file; empty if it is a corpus file."""
    if is_secret_file_name(path.name):
        return "a file that holds secrets, judging by its name"
    if is_hidden_name(path.name):
        return "hidden"
    if not is_corpus_name(path.name):
        return "not a corpus file, judging by its name"
    if path.suffix not in (".json", ".jsonl", ".ndjson") or path.stat().st_size > _INSPECTED_BYTES:
        return ""
    content = path.read_bytes().decode("utf-8", errors="replace")
    if (found := find_secret(content)) is not None:
        return f"a file whose line {found[0]} looks like {found[1]}"
    return "" if _holds_records(content) else "not a corpus file: it holds no JSON objects with a text value"


def _holds_records(content: str) -> bool:
    """Return True if a JSON array or JSON lines begin with an object that has a text value."""
    try:
        whole = json.loads(content)
        first = whole[0] if isinstance(whole, list) and whole else whole
    except ValueError:
        first = _parse_or_none(next((line for line in content.splitlines() if line.strip()), ""))
    return isinstance(first, dict) and any(isinstance(value, str) for value in first.values())


def _parse_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
