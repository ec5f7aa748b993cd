"""Which files a corpus consists of where the `datasets` library has a say: saved data sets, configurations, splits.

    folder of save_to_disk → its split → its Arrow files
    data set on Hugging Face's hub, or local folder → configuration (data.subset), split (data.source_split) → files
    text, CSV, TSV, Arrow and WebDataset files → how each is read

JSON, JSON lines and Parquet files that are found so are read by `job.data.corpus` like any others.
"""

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from job import storage
from job.data import hub
from job.data.dataset_library import cache_dir, fault, library
from job.errors import UserError

TextDocuments = Literal["paragraph", "line", "file"]
_SAMPLE_BY = {"paragraph": "paragraph", "line": "line", "file": "document"}
"""Name of each kind of text document in the library's text builder."""
_FILE = re.compile(r"\.(txt|csv|tsv|arrow|tar)(?:\.(?:gz|zst))?$", re.IGNORECASE)
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "txt": ("text", {}),
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t"}),
    "arrow": ("arrow", {}),
    "tar": ("webdataset", {}),
}
_HUB_PATTERNS = [f"*.{kind}{end}" for kind in _BUILDERS for end in ("", ".gz", ".zst")]
ENDINGS = ".txt, .csv, .tsv, .arrow or .tar"
_NOT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}


@dataclass(frozen=True)
class Rows:
    """The builder of the library that reads a file, and its options."""

    builder: str
    """``text``, ``csv``, ``arrow``, ``webdataset``, ``json`` or ``parquet``"""
    options: tuple[tuple[str, Any], ...] = ()
    """Settings of the builder that differ from its own defaults, by name."""
    revision: str | None = None
    """Commit of the data set, if the file is read from the hub."""
    hub_hash: str | None = None
    """The hub's own hash of the content."""

    def __str__(self) -> str:
        return " ".join([self.builder, *(f"{name}={value!r}" for name, value in self.options)])


@dataclass(frozen=True)
class Choice:
    """The configuration, the split and the kind of text document that the user asks for."""

    subset: str | None = None
    split: str | None = None
    documents: TextDocuments | None = None
    """The part of a text file that is a document; None: a paragraph, or the part that the data set names."""

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that are set, by name."""
        settings = {"subset": self.subset, "source_split": self.split, "text_documents": self.documents}
        return {f"data.{name}": value for name, value in settings.items() if value is not None}


ALL = Choice()


class Found(NamedTuple):
    """A file of the corpus."""

    url: str
    path: str
    """The path or URL that is opened."""
    size: int
    rows: Rows | None
    """None: it is JSON, JSON lines or Parquet, and read without the library."""


def chosen_files(source: str, choice: Choice, reads_itself: Callable[[str], bool]) -> list[Found] | None:
    """The files of a saved data set, or of a configuration and split; None if `source` names files and nothing else.

    Args:
        source: data.source.
        choice: what of it is taken.
        reads_itself: tells by its name whether a file is JSON, JSON lines or Parquet.

    Raises:
        UserError: there is no such configuration or split, or several; or the data set is damaged or cannot be read.
    """
    subset, split = choice.subset, choice.split
    local = Path(source.removeprefix("file://")).expanduser()
    may_be_folder = not reads_itself(source) and not ending(source)
    if may_be_folder and _is_saved(source, "dataset_dict.json"):
        return _saved(_of_split(source, split), subset)
    if may_be_folder and _is_saved(source, "state.json") and _is_saved(source, "dataset_info.json"):
        if split is not None:
            raise UserError("data.source_split", split, f"{source} is one data set without splits", "unset it")
        return _saved(source, subset)
    if subset is None and split is None:
        return None
    if not storage.is_remote(source) and local.is_dir():
        return _configured(source, str(local.absolute()), None, choice, reads_itself)
    if is_on_hub(source):
        return _configured(source, *hub.pinned(source), choice, reads_itself)
    setting, value = ("data.subset", subset) if subset is not None else ("data.source_split", split)
    expected = f"data.source {source} has neither configurations nor splits"
    raise UserError(setting, value, expected, "unset it, or name a data set on Hugging Face or a local folder")


def is_on_hub(source: str) -> bool:
    """Return True if `source` names a data set on a hub."""
    return hub.has_scheme(source) or (hub.is_name(source) and not Path(source).exists())


def other_files(source: str, found: Sequence[tuple[str, str, int]], documents: TextDocuments | None) -> list[Found]:
    """The files that the library reads of a source without JSON and Parquet files; none if there are none.

    A data set on Hugging Face's hub is streamed, its only configuration and split; one on ModelScope is downloaded.

    Args:
        source: data.source.
        found: URL, path and size of the files that are there.
        documents: what of a text file is a document; None: a paragraph, in a data set on a hub what that says.

    Raises:
        UserError: they are of several kinds; or the data set has several configurations or splits.
    """
    if not found and is_on_hub(source) and not hub.files_of(source):
        if not source.startswith(hub.MODELSCOPE):
            return _configured(source, *hub.pinned(source), Choice(documents=documents), lambda url: False)
        found = hub.download(source, _HUB_PATTERNS)
    files = [Found(*one, _rows(name, documents)) for one in found if (name := ending(one[0]))]
    kinds = sorted({one.rows.builder for one in files if one.rows is not None})
    if len(kinds) > 1:
        expected = f"holds files of several kinds, which are {' and '.join(kinds)}"
        raise UserError("data.source", source, expected, "name one kind, for example FOLDER/*.txt")
    return files


def ending(url: str) -> str:
    """How the name of a file ends, compression apart; nothing if the library is not to read it."""
    path = storage.url_path(url)
    name, match = path.rpartition("/")[2], _FILE.search(path)
    is_cache = name.startswith("cache-") and name.endswith(".arrow")  # of datasets.map, beside a saved data set
    return match[1].lower() if match and not name.startswith(".") and not is_cache else ""


def _rows(kind: str, documents: TextDocuments | None) -> Rows:
    builder, options = _BUILDERS[kind]
    return Rows(builder, _sorted(options | _text_options(builder, documents or "paragraph")))


def _text_options(builder: str, documents: TextDocuments | None) -> dict[str, Any]:
    return {"sample_by": _SAMPLE_BY[documents]} if builder == "text" and documents else {}


def _sorted(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


# ---- Folders of save_to_disk ----


def _is_saved(source: str, name: str) -> bool:
    """Whether `source` is a folder with this file of `save_to_disk`."""
    if any(character in source for character in "*?[") or hub.has_scheme(source):
        return False
    if storage.is_remote(source):
        return source.startswith("s3://") and storage.exists(storage.join(source, name))
    return (Path(source.removeprefix("file://")).expanduser() / name).is_file()


def _of_split(folder: str, split: str | None) -> str:
    """The folder of one split of a saved `DatasetDict`."""
    names = _description(folder, "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names or not all(_is_name(name) for name in names):
        _raise_damaged(folder, "dataset_dict.json", "it names no splits")
    return storage.join(folder, _one_of(names, split, folder))


def _saved(folder: str, subset: str | None) -> list[Found]:
    """The Arrow files of a saved `Dataset`, as its state.json lists them: others there are caches, or left over."""
    if subset is not None:
        raise UserError("data.subset", subset, f"{folder} was made by save_to_disk and has no subsets", "unset it")
    state = _description(folder, "state.json")
    listed = state.get("_data_files")
    names = [one.get("filename") if isinstance(one, dict) else None for one in listed or []]
    if not isinstance(listed, list) or not all(_is_name(name) for name in names):
        _raise_damaged(folder, "state.json", "it names no data files")
    if state.get("_indices_data_files"):
        expected = "was saved by an old version of datasets, with an order of rows apart from the rows"
        raise UserError("data.source", folder, expected, "load it with load_from_disk, and save it again")
    found = []
    for url in (storage.join(folder, str(name)) for name in names):
        try:
            found.append(Found(url, url, storage.size(url), Rows("arrow")))
        except FileNotFoundError:
            raise UserError("data.source", url, "is missing, though state.json names it", "save it again") from None
    return found


def _description(folder: str, name: str) -> dict[str, Any]:
    try:
        return storage.read_record(storage.join(folder, name), dict[str, Any])
    except FileNotFoundError:
        _raise_damaged(folder, name, "it is missing")
    except ValueError as error:
        _raise_damaged(folder, name, str(error))


def _raise_damaged(folder: str, name: str, fault: str) -> NoReturn:
    url = storage.join(folder, name)
    raise UserError("data.source", url, f"is damaged: {fault}", "save the data set again with save_to_disk") from None


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _one_of(names: Sequence[str], split: str | None, source: str) -> str:
    """The split that is asked for, or the only one."""
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    expected = f"{source} has the split{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
    raise UserError("data.source_split", split, expected, "set data.source_split to one of them")


# ---- Configurations and splits ----


def _configured(
    source: str,
    path: str,
    commit: str | None,
    choice: Choice,
    reads_itself: Callable[[str], bool],
) -> list[Found]:
    datasets = library()
    try:
        builder = datasets.load_dataset_builder(
            path,
            choice.subset,
            revision=commit,
            cache_dir=cache_dir(),
            download_config=datasets.DownloadConfig(cache_dir=cache_dir(), disable_tqdm=True),
        )
        files = {str(name): list(dict.fromkeys(urls)) for name, urls in (builder.config.data_files or {}).items()}
    except Exception as error:
        _raise_unresolved(error, source, choice.subset)
    urls = sorted(files[_one_of(list(files), choice.split, source)])
    options = {
        one.name: getattr(builder.config, one.name)
        for one in fields(builder.config)
        if one.name not in _NOT_OPTIONS and getattr(builder.config, one.name) != one.default
    }
    is_fast = all(map(reads_itself, urls)) and not (builder.name in ("json", "parquet") and options)
    rows = None if is_fast else _rows_of(source, urls, builder.name, options, choice.documents)
    if commit is None:
        return [Found(url, url, storage.size(url), rows) for url in urls]
    prefix = f"hf://datasets/{path}@{commit}"
    names = [url.removeprefix(f"{prefix}/") for url in urls]
    if rows is None:
        return [Found(*one, None) for one in hub.download(prefix, [glob.escape(name) for name in names])]
    try:
        described = hub.described(path, commit, names)
    except Exception as error:
        expected = f"the hub does not describe its files: {fault(error, 'look into', source)}"
        raise UserError("data.source", source, expected, "try again later") from None
    return [
        Found(f"{prefix}/{name}", f"{prefix}/{name}", size, replace(rows, revision=commit, hub_hash=hub_hash))
        for name, size, hub_hash in described
    ]


def _rows_of(
    source: str, urls: Sequence[str], builder: str, options: dict[str, Any], documents: TextDocuments | None
) -> Rows:
    """How the files of a configuration are read.

    The library takes the builder of the first configuration for all of them, which would read JSON as if it were CSV.
    Here the names decide, and the options count where they are of the right builder.
    """
    kinds = {ending(url) for url in urls}
    if kinds == {""} and builder in ("json", "parquet") and options:
        return Rows(builder, _sorted(options))
    kind = kinds.pop()
    if kinds or not kind:
        shown = ", ".join(sorted({url.rpartition("/")[2] for url in urls})[:3])
        expected = f"consists of files that are not of one readable kind, such as {shown}"
        raise UserError("data.source", source, expected, f"expected JSON, JSON lines or Parquet, or {ENDINGS}")
    named, defaults = _BUILDERS[kind]
    says = defaults | (options if builder == named else {})
    if named == "text":
        says = {"sample_by": "line"} | says | _text_options(named, documents)
    return Rows(named, _sorted(says))


def _raise_unresolved(error: Exception, source: str, subset: str | None) -> NoReturn:
    """Raise in one line why the library finds no files of a configuration."""
    reason = fault(error, "look into", source).partition(" Example of usage")[0]
    if "Config name is missing" in reason or "BuilderConfig" in reason:
        raise UserError("data.subset", subset, reason, "set data.subset to one of them") from None
    if "scripts are no longer supported" in reason:
        expected = "is a data set with a program of its own, which is never run"
        raise UserError("data.source", source, expected, "name its files, or another version of it") from None
    raise UserError("data.source", source, reason, "name a data set or folder with JSON, Parquet, text or CSV files")
