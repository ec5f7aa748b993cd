"""Which files of a folder are sent as a data set: prepared shards or corpus files, nothing else, no link out of it.

A folder with a manifest.json of ours is a data set: the files that the manifest names are sent. Any other folder is a
corpus: files that `job prepare` reads, by their names and, where they are small, by what is in them. What is left out
has a reason, which the person who uploads is told.
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
from launch.swanlab.leaks import secret_in, secret_name

_INSPECTED_BYTES = 2**20
"""A JSON file up to this size is read: settings and keys of other programs are small, a corpus is not."""


@dataclass(frozen=True)
class Selection:
    """What is sent, and what is not."""

    files: dict[str, Path]
    """By path in the data set, sorted."""
    left_out: dict[str, str]
    """Files and folders that stay here, and why; of a folder that is left out as a whole, no file is named."""


def select(source: Path) -> Selection:
    """Choose the files of a file or folder that are sent.

    Raises:
        UserError: there is nothing to send, or a file that belongs to a prepared data set is missing or elsewhere.
    """
    if not source.exists():
        raise UserError("upload", str(source), "there is no such file or folder")
    if source.is_file():
        if reason := _why_no_corpus(source):
            raise UserError("upload", str(source), f"is not sent: it is {reason}", _EXPECTED)
        return Selection({source.name: source}, {})
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    wanted = _data_set(source) if (source / MANIFEST_NAME).is_file() else None
    for name, path, why_not in _walk(source, source.resolve()):
        if reason := why_not or _why_not_sent(name, path, wanted):
            left_out[name] = reason
        else:
            files[name] = path
    _refuse_unless_whole(source, files, wanted, left_out)
    return Selection(dict(sorted(files.items())), dict(sorted(left_out.items())))


_EXPECTED = "expected a folder made by `job prepare`, or .json, .jsonl, .json.gz, .json.zst or .parquet files"


def _why_not_sent(name: str, path: Path, wanted: dict[str, int | None] | None) -> str:
    if wanted is None:
        return _why_no_corpus(path)
    return "" if name in wanted else "no part of the data set, which is what manifest.json names"


def _refuse_unless_whole(
    source: Path, files: dict[str, Path], wanted: dict[str, int | None] | None, left_out: dict[str, str]
) -> None:
    for name, size in (wanted or {}).items():
        if size is not None and name not in files:
            reason = left_out.get(name, "missing")
            raise UserError("upload", str(source / name), f"belongs to the data set and is {reason}", "put it there")
        if size is not None and (found := files[name].stat().st_size) != size:
            expected = f"has {found:,} bytes, manifest.json says {size:,}"
            raise UserError("upload", str(source / name), expected, "prepare the data set again")
    if not files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError("upload", str(source), f"there is nothing to send ({reasons or 'it is empty'})", _EXPECTED)


def _data_set(folder: Path) -> dict[str, int | None]:
    """The files of a prepared data set by their paths, with the size of those that training cannot do without."""
    try:
        manifest = load_manifest(str(folder))
    except UserError as error:
        raise UserError("upload", str(folder), error.expected, error.remedy) from None
    found: dict[str, int | None] = {shard.name: shard.size for shard in manifest.train + manifest.validation}
    found |= {f"{manifest.tokenizer}/{name}": None for name in TOKENIZER_FILES}
    for name in (MANIFEST_NAME, f"{manifest.tokenizer}/tokenizer.json"):
        path = folder / name
        found[name] = path.stat().st_size if path.is_file() else 0
    return found


def _walk(source: Path, root: Path) -> Iterator[tuple[str, Path, str]]:
    """Every file below a folder, or a folder that is left out as a whole: its path, where it is, and why not, or ""."""
    for folder, folders, names in os.walk(source):
        for name in sorted(folders):
            path = Path(folder, name)
            if reason := "hidden" if is_hidden_name(name) else _why_no_link(path, root):
                folders.remove(name)
                yield path.relative_to(source).as_posix(), path, reason
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            reason = "hidden" if is_hidden_name(name) else _why_no_link(path, root)
            yield path.relative_to(source).as_posix(), path, reason or ("" if path.is_file() else "no file")


def _why_no_link(path: Path, root: Path) -> str:
    """Why a link is not followed; empty for one to a file in the same folder, and for what is no link."""
    if not path.is_symlink():
        return ""
    target = path.resolve()
    if not target.is_relative_to(root):
        return "a link that leads out of the folder"
    if any(map(is_hidden_name, target.relative_to(root).parts)):
        return "a link to something hidden"
    return "a link to a folder" if target.is_dir() else ""


# ---- A corpus file ----


def _why_no_corpus(path: Path) -> str:
    """What a file is that is no corpus file; empty if it is one."""
    if secret_name(path.name):
        return "a file whose name says that it holds secrets"
    if is_hidden_name(path.name):
        return "hidden"
    if not is_corpus_name(path.name):
        return "no corpus file by its name"
    if path.suffix not in (".json", ".jsonl", ".ndjson") or path.stat().st_size > _INSPECTED_BYTES:
        return ""
    content = path.read_bytes().decode("utf-8", errors="replace")
    if (found := secret_in(content)) is not None:
        return f"a file whose line {found[0]} looks like {found[1]}"
    return "" if _holds_records(content) else "no corpus file: it does not hold JSON objects with a text in them"


def _holds_records(content: str) -> bool:
    """Whether a JSON array or JSON lines begin with an object that has a text."""
    try:
        whole = json.loads(content)
        first = whole[0] if isinstance(whole, list) and whole else whole
    except ValueError:
        first = _parsed(next((line for line in content.splitlines() if line.strip()), ""))
    return isinstance(first, dict) and any(isinstance(value, str) for value in first.values())


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
