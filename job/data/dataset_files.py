"""Select the files of saved data sets, configurations and splits, and of formats that the `datasets` library reads.

    folder of save_to_disk → its split → its Arrow files
    data set on Hugging Face's hub, or local folder → configuration (data.subset), split (data.source_split) → files
    text, CSV, TSV, Arrow and WebDataset files → how the library reads each of them

JSON, JSON lines and Parquet files that are selected here are read by `job.data.corpus`, without the library.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from job import storage
from job.data import hub
from job.data.dataset_library import cache_dir, describe_error, library
from job.data.file_forms import (
    COMPRESSION_SUFFIXES,
    LIBRARY_KINDS,
    LIBRARY_SUFFIXES_TEXT,
    form_by_name,
    library_kind,
)
from job.errors import UserError

TextDocuments = Literal["paragraph", "line", "file"]
_SAMPLE_BY = {"paragraph": "paragraph", "line": "line", "file": "document"}
"""Value of the text builder's option `sample_by` for each kind of text document."""
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "txt": ("text", {}),
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t"}),
    "arrow": ("arrow", {}),
    "tar": ("webdataset", {}),
}
"""Builder of the library, and its options, for each of `LIBRARY_KINDS`."""
_HUB_PATTERNS = [f"*.{kind}{suffix}" for kind in LIBRARY_KINDS for suffix in ("", *COMPRESSION_SUFFIXES)]
_NOT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}
"""Fields of a builder's configuration that are not options of reading."""


@dataclass(frozen=True)
class LibraryReader:
    """The builder of the `datasets` library that reads a file, and its options."""

    builder: str
    """``text``, ``csv``, ``arrow``, ``webdataset``, ``json`` or ``parquet``."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options that differ from the builder's defaults, as (name, value) sorted by name."""
    revision: str | None = None
    """Commit of the data set, if the file is read from the hub."""
    hub_hash: str | None = None
    """Hash of the content, as the hub records it."""

    def __str__(self) -> str:
        return " ".join([self.builder, *(f"{name}={value!r}" for name, value in self.options)])


@dataclass(frozen=True)
class Choice:
    """The configuration, the split and the kind of text document that the user chose."""

    subset: str | None = None
    split: str | None = None
    documents: TextDocuments | None = None
    """The part of a text file that is one document; None for the data set's own choice, or else a paragraph."""

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that are set, by dotted name."""
        settings = {"subset": self.subset, "source_split": self.split, "text_documents": self.documents}
        return {f"data.{name}": value for name, value in settings.items() if value is not None}


ALL = Choice()


class SourceFile(NamedTuple):
    """A file of the corpus, and how it is read."""

    url: str
    path: str
    """Path or URL that is opened."""
    size: int
    """Size in bytes."""
    library_reader: LibraryReader | None
    """Settings with which `datasets` reads the file; None for JSON, JSON lines and Parquet, which do not need it."""


def select_files(source: str, choice: Choice) -> list[SourceFile] | None:
    """Return the files of a saved data set, or of a configuration and split; None if `source` is neither.

    Args:
        source: value of data.source.
        choice: the configuration and split to select.

    Raises:
        UserError: there is no such configuration or split, or several; or the data set is damaged or cannot be read.
    """
    subset, split = choice.subset, choice.split
    local = storage.path_of(source)
    may_be_folder = form_by_name(source) is None and not library_kind(source)
    if may_be_folder and _is_folder_with(source, "dataset_dict.json"):
        return _saved_files(_saved_split_folder(source, split), subset)
    if may_be_folder and _is_folder_with(source, "state.json") and _is_folder_with(source, "dataset_info.json"):
        if split is not None:
            expected = f"{source} is one data set without splits"
            raise UserError("data.source_split", split, expected, "unset data.source_split")
        return _saved_files(source, subset)
    if subset is None and split is None:
        return None
    if not storage.is_remote(source) and local.is_dir():
        return _configured_files(source, str(local.absolute()), None, choice)
    if is_on_hub(source):
        return _configured_files(source, *hub.resolve_commit(source), choice)
    setting, value = ("data.subset", subset) if subset is not None else ("data.source_split", split)
    expected = f"data.source {source} has neither configurations nor splits"
    remedy = f"unset {setting}, or set data.source to a data set on Hugging Face or to a local folder"
    raise UserError(setting, value, expected, remedy)


def is_on_hub(source: str) -> bool:
    """Return True if `source` names a data set on a hub: with a scheme, or as ``owner/name`` that is not a path."""
    if hub.has_scheme(source):
        return True
    return hub.is_name(source) and form_by_name(source) is None and not Path(source).exists()


def library_files(
    source: str, listed: Sequence[tuple[str, str, int]], documents: TextDocuments | None
) -> list[SourceFile]:
    """Return the files that the library reads, for a source without JSON and Parquet files.

    A data set on Hugging Face's hub is streamed, if it has only one configuration and one split. A data set on
    ModelScope is downloaded.

    Args:
        source: value of data.source.
        listed: URL, path and size of each file at the source.
        documents: the part of a text file that is one document; None for the data set's own choice on a hub, or else
            a paragraph.

    Raises:
        UserError: the files are of several formats, or the data set has several configurations or splits.
    """
    if not listed and is_on_hub(source) and not hub.files_part(source):
        if not source.startswith(hub.MODELSCOPE):
            name, commit = hub.resolve_commit(source)
            return _configured_files(source, name, commit, Choice(documents=documents), is_own_form_allowed=False)
        listed = hub.download(source, _HUB_PATTERNS)
    files = [SourceFile(*file, _reader_of_kind(kind, documents)) for file in listed if (kind := library_kind(file[0]))]
    builders = sorted({file.library_reader.builder for file in files if file.library_reader is not None})
    if len(builders) > 1:
        expected = f"holds files of several formats: {' and '.join(builders)}"
        raise UserError("data.source", source, expected, "name files of one format, for example FOLDER/*.txt")
    return files


def _reader_of_kind(kind: str, documents: TextDocuments | None) -> LibraryReader:
    builder, options = _BUILDERS[kind]
    return LibraryReader(builder, _sorted_options(options | _text_options(builder, documents or "paragraph")))


def _text_options(builder: str, documents: TextDocuments | None) -> dict[str, Any]:
    return {"sample_by": _SAMPLE_BY[documents]} if builder == "text" and documents else {}


def _sorted_options(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


# ---- Folders of save_to_disk ----


def _is_folder_with(source: str, name: str) -> bool:
    """Return True if `source` is a folder that holds a file of this name."""
    if any(character in source for character in "*?[") or hub.has_scheme(source):
        return False
    if storage.is_remote(source):
        return source.startswith("s3://") and storage.exists(storage.join(source, name))
    return (storage.path_of(source) / name).is_file()


def _saved_split_folder(folder: str, split: str | None) -> str:
    """Return the folder of one split of a saved `DatasetDict`."""
    names = _read_description(folder, "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names or not all(_is_plain_name(name) for name in names):
        _raise_damaged(folder, "dataset_dict.json", "it names no splits")
    return storage.join(folder, _choose_split(names, split, folder))


def _saved_files(folder: str, subset: str | None) -> list[SourceFile]:
    """Return the Arrow files that the state.json of a saved `Dataset` lists.

    Other Arrow files in the folder are caches or left over from an earlier save.
    """
    if subset is not None:
        expected = f"{folder} was made by save_to_disk and has no subsets"
        raise UserError("data.subset", subset, expected, "unset data.subset")
    state = _read_description(folder, "state.json")
    data_files = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in data_files or []]
    if not isinstance(data_files, list) or not all(_is_plain_name(name) for name in names):
        _raise_damaged(folder, "state.json", "it names no data files")
    if state.get("_indices_data_files"):
        expected = "was saved by an old version of datasets, with the order of the rows in a separate file"
        raise UserError("data.source", folder, expected, "load it with load_from_disk, and save it again")
    files = []
    for url in (storage.join(folder, str(name)) for name in names):
        try:
            files.append(SourceFile(url, url, storage.size(url), LibraryReader("arrow")))
        except FileNotFoundError:
            expected = "is missing, though state.json names it"
            raise UserError("data.source", url, expected, "save the data set again with save_to_disk") from None
    return files


def _read_description(folder: str, name: str) -> dict[str, Any]:
    try:
        return storage.read_record(storage.join(folder, name), dict[str, Any])
    except FileNotFoundError:
        _raise_damaged(folder, name, "it is missing")
    except ValueError as error:
        _raise_damaged(folder, name, str(error))


def _raise_damaged(folder: str, name: str, fault: str) -> NoReturn:
    url = storage.join(folder, name)
    raise UserError("data.source", url, f"is damaged: {fault}", "save the data set again with save_to_disk") from None


def _is_plain_name(name: object) -> bool:
    """Return True if `name` is a file name without a folder in it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _choose_split(names: Sequence[str], split: str | None, source: str) -> str:
    """Return the split that the user named, or the only one."""
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    expected = f"{source} has the split{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
    raise UserError("data.source_split", split, expected, "set data.source_split to one of them")


# ---- Configurations and splits ----


def _configured_files(
    source: str, path: str, commit: str | None, choice: Choice, is_own_form_allowed: bool = True
) -> list[SourceFile]:
    """Return the files of a configuration and split.

    Args:
        source: value of data.source, for error messages.
        path: local folder, or name of a data set on the hub.
        commit: commit of the data set on the hub; None for a local folder.
        choice: the configuration and split to select.
        is_own_form_allowed: whether JSON and Parquet files are read without the library.
    """
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
    urls = sorted(files[_choose_split(list(files), choice.split, source)])
    options = {
        field.name: getattr(builder.config, field.name)
        for field in fields(builder.config)
        if field.name not in _NOT_OPTIONS and getattr(builder.config, field.name) != field.default
    }
    is_own_form = all(is_own_form_allowed and form_by_name(url) is not None for url in urls)
    needs_library = not is_own_form or (builder.name in ("json", "parquet") and bool(options))
    reader = _reader_of_files(source, urls, builder.name, options, choice.documents) if needs_library else None
    if commit is None:
        return [SourceFile(url, url, storage.size(url), reader) for url in urls]
    prefix = f"hf://datasets/{path}@{commit}"
    names = [url.removeprefix(f"{prefix}/") for url in urls]
    if reader is None:
        return [SourceFile(*file, None) for file in hub.download(prefix, [glob.escape(name) for name in names])]
    try:
        described = hub.describe_files(path, commit, names)
    except Exception as error:
        expected = f"the hub did not answer what files it has: {describe_error(error, 'look into', source)}"
        raise UserError("data.source", source, expected, "try again later") from None
    return [
        SourceFile(f"{prefix}/{name}", f"{prefix}/{name}", size, replace(reader, revision=commit, hub_hash=hub_hash))
        for name, size, hub_hash in described
    ]


def _reader_of_files(
    source: str, urls: Sequence[str], builder: str, options: dict[str, Any], documents: TextDocuments | None
) -> LibraryReader:
    """Return how the library reads the files of a configuration.

    The library would use the builder of the first configuration for all of them, and so read JSON as CSV. Here the
    file names decide, and the options count only if they are options of the same builder.
    """
    kinds = {library_kind(url) for url in urls}
    if kinds == {""} and builder in ("json", "parquet") and options:
        return LibraryReader(builder, _sorted_options(options))
    kind = kinds.pop()
    if kinds or not kind:
        shown = ", ".join(sorted({url.rpartition("/")[2] for url in urls})[:3])
        expected = (
            f"its files (such as {shown}) are not of one readable format, "
            f"expected JSON, JSON lines or Parquet, or {LIBRARY_SUFFIXES_TEXT}"
        )
        raise UserError("data.source", source, expected, "name files of one format")
    named_builder, defaults = _BUILDERS[kind]
    combined = defaults | (options if builder == named_builder else {})
    if named_builder == "text":
        combined = {"sample_by": "line"} | combined | _text_options(named_builder, documents)
    return LibraryReader(named_builder, _sorted_options(combined))


def _raise_unresolved(error: Exception, source: str, subset: str | None) -> NoReturn:
    """Raise a one-line UserError that says why `datasets` finds no files for this subset of the source."""
    reason = describe_error(error, "look into", source).partition(" Example of usage")[0]
    if "Config name is missing" in reason or "BuilderConfig" in reason:
        raise UserError("data.subset", subset, reason, "set data.subset to one of these names") from None
    if "scripts are no longer supported" in reason:
        expected = "needs its own Python script to be loaded; such scripts are never run"
        raise UserError(
            "data.source", source, expected, "set data.source to its data files, or to a version without a script"
        ) from None
    raise UserError("data.source", source, reason, "name a data set or folder with JSON, Parquet, text or CSV files")
