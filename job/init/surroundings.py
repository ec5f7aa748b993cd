"""Find the text, and the processors, memory, disk and variables of this machine, for `init`."""

import codecs
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from job import storage
from job.config import Config
from job.data.corpus import BadRecord, CorpusFile, Document, Listing, SliceEnd, list_corpus, read_slices
from job.data.dataset_files import Choice, is_on_hub
from job.data.discovery import is_hidden_name
from job.data.documents import CONVERT_GBK
from job.data.folders import files_below
from job.data.outputs import Outputs
from job.errors import UserError
from job.launcher.environment import detect_environment
from job.launcher.gpus import find_gpus
from job.preflight import nvidia_smi
from job.preflight.assumed_data import read_sample
from job.preflight.machine import memory_bytes

_STORE_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL")
_SAMPLE_BYTES = 2**20
"""Bytes at the start of the first file in which a record with text is looked for."""
_SHOWN_ROWS = ("left out: ", "possible duplicates")
"""Beginnings of the rows of a listing that say what the user might not expect."""
_TEXT_BUILDERS = ("text", "csv", "json")
"""Builders of the `datasets` library whose files are text, in UTF-8."""


@dataclass(frozen=True)
class Corpus:
    """The text of the corpus, as far as its first records tell."""

    source: str
    text_field: str
    files: int
    stored_bytes: int
    text_bytes: int | None
    """Estimated bytes of text in UTF-8; None if the corpus is on a hub."""
    remarks: tuple[str, ...] = ()
    """Lines about files that are left out or may be there twice, as `prepare` prints them."""


@dataclass(frozen=True)
class Machine:
    """This machine, or the part of it that this process may use."""

    gpus: int
    gpu_source: str
    """The variable or program that gave the number of GPUs."""
    gpu_names: tuple[str, ...]
    """Names that nvidia-smi gives; empty if it gives none."""
    cores: int
    memory_bytes: int | None
    """Free main memory; None if the system does not say."""
    disk_bytes: int
    """Free bytes on the disk of the working directory."""
    place: str
    """Scheduler or platform, or ``this machine``."""
    store_variables: tuple[str, ...]
    """Names of the variables that lead to an object store."""


def look_at_corpus(config: Config, source: str) -> Corpus | None:
    """Return what is known of the corpus at `source`; None if there is no such folder or it holds no corpus files.

    Raises:
        UserError: there are files, but the first of them has no field with text, or cannot be read.
    """
    data = config.data
    if is_on_hub(source):
        return Corpus(source, data.text_field, 0, 0, None)
    folder = storage.path_of(source)
    if "://" not in source and folder.is_dir() and not any(folder.iterdir()):
        return None
    listings: list[Listing] = []
    files = list_corpus(source, listings.append, Choice(data.subset, data.source_split, data.text_documents))
    first = next((file for file in files if file.size > 0), None)
    if first is None:
        raise UserError("data.source", source, "all files are empty", "put a text into them, or name another corpus")
    text_field = _text_field(first, data.text_field, data.id_field)
    share = read_sample(first, data.model_copy(update={"text_field": text_field})).share
    stored_bytes = sum(file.size for file in files)
    remarks = tuple(
        f"corpus {listing.source}: {name}: {value}"
        for listing in listings
        for name, value in listing.rows()
        if name.startswith(_SHOWN_ROWS)
    )
    return Corpus(source, text_field, len(files), stored_bytes, round(stored_bytes * share), remarks)


def holds_no_foreign_files(folder: str) -> bool:
    """Return True if a folder holds nothing but hidden files and what this program has written there."""
    root, unusable = Path(folder), list[str]()

    def read(name: str) -> bytes | None:
        try:
            return (root / name).read_bytes()
        except OSError:
            return None

    def is_hidden(name: str) -> bool:
        return is_hidden_name(name.rpartition("/")[2])

    outputs = Outputs(read)
    files = files_below(root, None, is_hidden, lambda name, reason: unusable.append(name))
    return all(outputs.owner(file.name) is not None for file in files) and not unusable


def _text_field(file: CorpusFile, wanted: str, id_field: str) -> str:
    """Return the field that holds the text in the first usable record. Raises UserError if no record has text."""
    fault: BadRecord | None = None
    fields = [wanted]
    for field in fields:  # A record without this field may add the field that it has instead.
        fault = None
        for item in read_slices(file, _SAMPLE_BYTES, lambda index: index == 0, field, id_field):
            if isinstance(item, Document):
                return field
            if isinstance(item, BadRecord):
                fault = fault or item
                likely = item.likely_field
                if likely is not None and likely not in fields and _can_be_set(likely):
                    fields.append(likely)
                    break
            if isinstance(item, SliceEnd):
                break  # The rest of a JSON array would be read to its end.
    expected = "no text was found at its start"
    if (byte := _first_byte_not_utf8(file)) is not None:
        expected = f"{expected}: it is not UTF-8, from byte {byte:,} on"
        raise UserError("data.source", file.url, expected, f"{CONVERT_GBK}{_names_to_convert(file.url)}")
    reason = "it has no records" if fault is None else f"{fault.position}: {fault.reason}"
    raise UserError("data.source", file.url, f"{expected}: {reason}", "name another corpus")


def _can_be_set(field: str) -> bool:
    """Return True if `data.text_field` can name a field: it has characters, and all of them can be written."""
    try:
        return bool(field.encode())
    except UnicodeEncodeError:  # Half a surrogate pair, or a byte that is not UTF-8.
        return False


def _first_byte_not_utf8(file: CorpusFile) -> int | None:
    """Return where the start of a text file is not UTF-8; None if it is, or if the file is not plain text."""
    is_text = file.format == "json" if file.library_reader is None else file.library_reader.builder in _TEXT_BUILDERS
    if not is_text or file.compression is not None:
        return None
    with storage.open_read(file.path) as source:
        head = source.read(_SAMPLE_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _names_to_convert(url: str) -> str:
    """Return the rest of the command that converts a file on this machine; for any other file, what to do with it."""
    if storage.is_remote(url):
        return ", and use the new file in its place"
    path = Path(url.removeprefix("file://"))
    # The new file is outside of the folder of the corpus, which would otherwise hold the text twice.
    new = f"{path.stem}-utf8{path.suffix}"
    return f" {shlex.quote(str(path))} > {shlex.quote(new)}, and use that in its place"


def look_at_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """Return what this machine has, without importing torch."""
    gpus = find_gpus(environment)
    installed, _ = nvidia_smi.find_gpus() if gpus.number or gpus.may_be else ([], "")
    try:
        place = detect_environment(environment).kind
    except UserError as error:  # `check` and `train` raise it; it does not decide what is written.
        place = f"not clear: {error}"
    return Machine(
        gpus=gpus.number,
        gpu_source=gpus.source,
        gpu_names=tuple(gpu.name for gpu in installed),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        disk_bytes=shutil.disk_usage(".").free,
        place=place,
        store_variables=tuple(name for name in _STORE_VARIABLES if environment.get(name)),
    )
