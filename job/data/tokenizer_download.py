"""Download of a tokenizer's files from a hub or a URL to a local folder."""

import hashlib
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from job import storage
from job.data import hub
from job.data.tokenizer_files import TOKENIZER_FILES
from job.errors import UserError, one_line
from job.invocation import command
from job.local_dirs import private_folder

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
"""``owner/name`` or ``owner/name@revision`` on a hub."""


def download_tokenizer(source: str, cache_dir: Path) -> Path:
    """Return a local folder with the tokenizer.json of the tokenizer at `source`, downloaded if need be.

    The arguments and errors are those of `job.data.tokenizer.load_tokenizer`.
    """
    local = storage.path_of(source)
    if source.startswith(hub.MODELSCOPE):
        folder = _from_hub(source)
    elif storage.is_remote(source):
        folder = _from_url(source, cache_dir)
    elif local.is_dir():
        folder = local
    elif is_hub_name(source):
        folder = _from_hub(source)
    else:
        not_a_name = f"; a name that begins with {hub.OWN_FOLDER} is a folder on this machine, never a name on a hub"
        expected = f"no such folder{not_a_name if hub.is_own_path(source) else ''}"
        raise UserError("tokenizer.source", source, expected, _remedy())
    if not (folder / "tokenizer.json").is_file():
        folder = _convert(folder, source, cache_dir)
    return folder


def is_hub_name(source: str) -> bool:
    """Return True if `source` has the form of a name on a hub and is not below our own folder ``data/``."""
    return _HUB_ID.fullmatch(source) is not None and not hub.is_own_path(source)


def has_no_tokenizer_yet(source: str) -> bool:
    """Return True if `source` is a folder or URL, and a new tokenizer may be stored there.

    That is so if it does not exist, is empty, or has only files that an interrupted `store_tokenizer` leaves. A folder
    with other files is probably a mistake, and a name on a hub cannot be written.
    """
    local = storage.path_of(source)
    if hub.has_scheme(source) or (not storage.is_remote(source) and not local.is_dir() and is_hub_name(source)):
        return False
    if local.is_file() or storage.exists(storage.join(source, "tokenizer.json")):
        return False
    names = {entry.url.rsplit("/", 1)[-1] for entry in storage.list_files(storage.join(source, ""))}
    return names <= set(TOKENIZER_FILES) - {"tokenizer.json", "vocab.json"}


def _remedy() -> str:
    """Return what to do if there is no tokenizer where the setting says."""
    return f"make a tokenizer with `{command('tokenizer')}`, or name a folder or a hub's OWNER/NAME"


def _from_url(url: str, cache_dir: Path) -> Path:
    """Download a tokenizer's files; return the local folder that holds them."""
    contents: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            contents[name] = storage.read_bytes(storage.join(url, name))
    if not contents.keys() & {"tokenizer.json", "vocab.json"}:
        raise UserError("tokenizer.source", url, "no tokenizer.json there", _remedy())
    return _save_in_cache(contents, cache_dir)


def _save_in_cache(contents: Mapping[str, bytes], cache_dir: Path) -> Path:
    """Write these files to a folder that is named by their content; return the folder.

    A changed tokenizer thus gets another folder. The files are written again each time, into a folder where no other
    user can change them.
    """
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    folder = private_folder(cache_dir / "tokenizers", "data.cache_dir") / digest.hexdigest()[:16]
    for name, content in contents.items():
        storage.write_bytes(str(folder / name), content)
    return folder


def _from_hub(source: str) -> Path:
    """Download a tokenizer's files from a hub; return the local folder that holds them."""
    name, _, revision = source.removeprefix(hub.MODELSCOPE).partition("@")
    repository = hub.Repository("model", name, revision or None, "tokenizer.source", source)
    is_modelscope = source.startswith(hub.MODELSCOPE)
    return (repository.from_modelscope if is_modelscope else repository.from_hugging_face)(list(TOKENIZER_FILES))


def _convert(folder: Path, source: str, cache_dir: Path) -> Path:
    """Make a fast tokenizer from vocab.json and merges.txt, the older format; return the folder that holds it.

    It is taken for Qwen2's kind if no file names another kind.
    """
    if not (folder / "vocab.json").is_file():
        raise UserError("tokenizer.source", source, "no tokenizer.json there", _remedy())
    from transformers import AutoTokenizer, Qwen2Tokenizer

    names_its_class = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        try:
            loader = AutoTokenizer if names_its_class else Qwen2Tokenizer
            loaded = loader.from_pretrained(folder, trust_remote_code=False)
            loaded.save_pretrained(scratch)
        except Exception as error:  # transformers raises many kinds of errors for a file that is not a tokenizer.
            raise UserError("tokenizer.source", source, f"not a tokenizer: {one_line(str(error))[:200]}") from None
        paths = [path for name in TOKENIZER_FILES if (path := Path(scratch, name)).is_file()]
        return _save_in_cache({path.name: path.read_bytes() for path in paths}, cache_dir)
