"""What lies on Hugging Face and ModelScope: data sets and models, downloaded into the hubs' own caches.

Downloaded and not streamed: a JSON array must be read from its start, so that n processes would fetch it n times; a
download is resumed and done once per machine; and a machine without a network finds what was fetched before.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from job.errors import UserError, one_line
from job.invocation import python

MODELSCOPE = "modelscope://"
_HUGGING_FACE = "hf://datasets/"
OWN_FOLDER = "data/"
"""No owner on a hub: the defaults are data/shards and data/run, and `job tokenizer` may write data/tokenizer."""
_SCHEME = re.compile(f"{_HUGGING_FACE}|{MODELSCOPE}")
_DATA_SET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<files>.+))?")
_FILES_AT_ONCE = 200

# huggingface_hub reads this when it is imported, and then tells the hub nothing but what it needs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def has_scheme(source: str) -> bool:
    """Whether `source` says itself that it is a data set on a hub."""
    return _SCHEME.match(source) is not None


def is_name(source: str) -> bool:
    """Whether `source` reads as ``owner/name`` or ``owner/name@revision``, and not as a path of ours."""
    match = _DATA_SET.fullmatch(source)
    return match is not None and match["files"] is None and not is_own_path(source)


def is_own_path(source: str) -> bool:
    """Whether `source` lies in ``data/``, the folder of our defaults: that is a path, whether it is there or not."""
    return source.startswith(OWN_FOLDER)


def files_of(source: str) -> str | None:
    """The part of `source`, or of a file's URL, that names files in the data set; None where there is none."""
    scheme = _SCHEME.match(source)
    place = _DATA_SET.fullmatch(source[scheme.end() :] if scheme else source)
    return place and place["files"]


def download(source: str, patterns: list[str]) -> list[tuple[str, str, int]]:
    """The files of a data set that match any of `patterns`, on this machine.

    Args:
        source: ``owner/name`` (Hugging Face), ``hf://datasets/owner/name`` or ``modelscope://owner/name``; each may go
            on with ``@revision`` (a ``/`` in it written ``%2F``) and, with a scheme, with ``/folder`` or ``/glob``,
            which then replaces `patterns`.

    Returns:
        For each file its URL, which holds the revision, the path of the copy, and the size in bytes.

    Raises:
        UserError: no such data set, no permission, or the hub cannot be reached.
    """
    scheme, place, repository = _parsed(source)
    if place["files"]:
        patterns = [place["files"].rstrip("/"), place["files"].rstrip("/") + "/*"]
    if scheme == MODELSCOPE:
        folder = repository.from_modelscope(patterns)
        prefix = f"{MODELSCOPE}{place['name']}" + (f"@{place['revision']}" if place["revision"] else "")
    else:
        folder = repository.from_hugging_face(patterns)
        prefix = f"{_HUGGING_FACE}{place['name']}@{folder.name}"  # a snapshot's folder is named after its commit
    copies = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return [
        (f"{prefix}/{name}", str(path), path.stat().st_size)
        for name, path in copies.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def pinned(source: str) -> tuple[str, str]:
    """Name of a data set on Hugging Face's hub, and the commit of its revision.

    Raises:
        UserError: as `download`; or `source` is on ModelScope, or names files.
    """
    scheme, place, repository = _parsed(source)
    if scheme == MODELSCOPE:
        expected = "data.subset and data.source_split are read from Hugging Face's hub and from local folders alone"
        raise UserError("data.source", source, expected, f"name files: {MODELSCOPE}{place['name']}/FOLDER/*.parquet")
    if place["files"]:
        expected = "data.subset and data.source_split are of a whole data set, and this names files"
        raise UserError("data.source", source, expected, "name owner/name, or unset them")
    return place["name"], repository.commit()


def described(name: str, commit: str, files: list[str]) -> list[tuple[str, int, str]]:
    """Path, size in bytes and the hub's own hash of files of a data set; those that are not there are left out."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = []
    for first in range(0, len(files), _FILES_AT_ONCE):
        some = files[first : first + _FILES_AT_ONCE]
        found += HfApi().get_paths_info(name, some, revision=commit, repo_type="dataset")
    entries = [one for one in found if isinstance(one, RepoFile)]
    return [(one.path, one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in entries]


def _parsed(source: str) -> tuple[str, re.Match[str], "Repository"]:
    """The scheme of a data set on a hub, or nothing; its parts; and its repository."""
    scheme = _SCHEME.match(source)
    place = _DATA_SET.fullmatch(source[scheme.end() :] if scheme else source)
    if place is None:
        raise UserError("data.source", source, "expected owner/name, owner/name@revision or owner/name/files*.json")
    revision = place["revision"] and place["revision"].replace("%2F", "/")
    return scheme[0] if scheme else "", place, Repository("dataset", place["name"], revision, "data.source", source)


def identity(url: str, path: str) -> tuple[str | None, str | None]:
    """The revision and the hub's own hash of a file that `download` has listed; None for what is not known.

    Args:
        url: its URL, which holds the revision.
        path: the copy on this machine. In Hugging Face's cache it is a link to a file that is named after the hash:
            https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return None, None
    place = _DATA_SET.fullmatch(url[scheme.end() :])
    copy = Path(path)
    is_named_after_hash = scheme[0] == _HUGGING_FACE and copy.is_symlink() and copy.readlink().parent.name == "blobs"
    return place and place["revision"], copy.readlink().name if is_named_after_hash else None


@dataclass(frozen=True)
class Repository:
    """A data set or a model on a hub."""

    kind: Literal["dataset", "model"]
    name: str
    """``owner/name``"""
    revision: str | None
    setting: str
    """The setting that names it, for errors."""
    source: str
    """What that setting says."""

    def from_hugging_face(self, patterns: list[str]) -> Path:
        """A local folder with the files that match; from the cache where the hub cannot be reached.

        Raises:
            UserError: nothing of that name, no permission, or neither hub nor cache has it.
        """
        from huggingface_hub import errors, snapshot_download

        # It warns of what this program tells as an error, or looks for in another way.
        logging.getLogger(snapshot_download.__module__).setLevel(logging.ERROR)
        unreachable: Exception | None = None
        with self._explained():
            try:
                self._ask()  # snapshot_download asks the same, but without any timeout
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
                raise
            except Exception as error:  # the hub's, its HTTP client's and the system's errors have no base in common
                unreachable = error
            try:
                folder = snapshot_download(
                    self.name,
                    repo_type=self.kind,
                    revision=self.revision,
                    allow_patterns=patterns,
                    local_files_only=unreachable is not None,
                )
            except Exception as error:
                raise error from (unreachable or error.__cause__)
            return Path(folder)

    def commit(self) -> str:
        """The commit of the revision, as Hugging Face's hub says now. Raises UserError as `from_hugging_face` does."""
        with self._explained():
            return self._ask()

    def _ask(self) -> str:
        from huggingface_hub import HfApi, constants

        asked, timeout = self.revision or constants.DEFAULT_REVISION, constants.HF_HUB_ETAG_TIMEOUT
        return str(HfApi().repo_info(self.name, repo_type=self.kind, revision=asked, timeout=timeout).sha)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Make a UserError of what the hub's library raises."""
        from huggingface_hub import constants, errors

        try:
            yield
        except errors.GatedRepoError:
            page = f"{constants.ENDPOINT}/{'datasets/' * (self.kind == 'dataset')}{self.name}"
            expected = f"this {self._what} is given only to those who asked for it"
            raise self._error(expected, f"ask for access at {page} and set HF_TOKEN") from None
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            expected = f"no such path here, and no such {self._what} on the hub {constants.ENDPOINT}"
            raise self._error(expected, "check the name; a private one needs HF_TOKEN") from None
        except errors.RevisionNotFoundError:
            raise self._error(f"the {self._what} has no revision {self.revision!r}") from None
        except Exception as error:
            cause = error.__cause__ or error
            reason = one_line(f"{type(cause).__name__}: {cause}")[:200]
            if constants.HF_HUB_OFFLINE:
                reason = "HF_HUB_OFFLINE is set, and the files are not all in the cache"
            answer = "refuses it" if isinstance(cause, errors.HfHubHTTPError) else "cannot be reached"
            expected = f"no such path here, and the hub {constants.ENDPOINT} {answer} ({reason})"
            remedy = "set HF_ENDPOINT (for example https://hf-mirror.com), or use modelscope://owner/name, or a URL"
            raise self._error(expected, remedy) from None

    def from_modelscope(self, patterns: list[str]) -> Path:
        """A local folder with the files that match.

        Raises:
            UserError: ModelScope's package is not installed, or does not get them.
        """
        try:
            from modelscope import snapshot_download
        except ImportError:
            raise self._error("needs a package that is not here", f"{python()} -m pip install modelscope") from None
        try:
            folder = snapshot_download(self.name, repo_type=self.kind, revision=self.revision, allow_patterns=patterns)
        except Exception as error:  # modelscope documents no error types
            expected = f"ModelScope does not give it ({one_line(f'{type(error).__name__}: {error}')[:200]})"
            raise self._error(expected, "check the name and the network") from None
        return Path(folder)

    @property
    def _what(self) -> str:
        return {"dataset": "data set", "model": "model"}[self.kind]

    def _error(self, expected: str, remedy: str = "") -> UserError:
        return UserError(self.setting, self.source, expected, remedy)
