"""Download data sets and models from Hugging Face and ModelScope into the caches of their own libraries.

Files are downloaded and not streamed, for three reasons: a JSON array can only be read from its start, so n processes
would fetch it n times; a download can be resumed and is done once per machine; and a machine without a network finds
what was downloaded before.
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
"""Never an owner on a hub: data/shards and data/run are defaults, and `job tokenizer` may write data/tokenizer."""
_SCHEME = re.compile(f"{_HUGGING_FACE}|{MODELSCOPE}")
_DATA_SET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<files>.+))?")
_FILES_PER_REQUEST = 200
_MAX_REASON_CHARACTERS = 200

# huggingface_hub reads this variable when it is imported, and then sends the hub nothing but what it needs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def has_scheme(source: str) -> bool:
    """Return True if `source` starts with the scheme of a hub."""
    return _SCHEME.match(source) is not None


def is_name(source: str) -> bool:
    """Return True if `source` has the form ``owner/name`` or ``owner/name@revision`` and is not below ``data/``."""
    match = _DATA_SET.fullmatch(source)
    return match is not None and match["files"] is None and not is_own_path(source)


def is_own_path(source: str) -> bool:
    """Return True if `source` is below ``data/``, as in our defaults: it is a local path, not a name on a hub."""
    return source.startswith(OWN_FOLDER)


def files_part(source: str) -> str | None:
    """Return the part of `source`, or of a file's URL, that names files in the data set; None if there is none."""
    _, match = _split_scheme(source)
    return match and match["files"]


def download(source: str, patterns: list[str]) -> list[tuple[str, str, int]]:
    """Download the files of a data set that match any of `patterns`.

    Args:
        source: ``owner/name`` (Hugging Face), ``hf://datasets/owner/name`` or ``modelscope://owner/name``. Each may be
            followed by ``@revision`` (with ``%2F`` for a ``/`` in it) and, if it has a scheme, by ``/folder`` or
            ``/glob``, which then replaces `patterns`.
        patterns: patterns of paths in the data set, as `fnmatch` takes them.

    Returns:
        For each file its URL, which holds the revision; the path of the local copy; and its size in bytes.

    Raises:
        UserError: there is no such data set, access is refused, or the hub cannot be reached.
    """
    scheme, match, repository = _parse(source)
    if match["files"]:
        patterns = [match["files"].rstrip("/"), match["files"].rstrip("/") + "/*"]
    if scheme == MODELSCOPE:
        folder = repository.from_modelscope(patterns)
        prefix = f"{MODELSCOPE}{match['name']}" + (f"@{match['revision']}" if match["revision"] else "")
    else:
        folder = repository.from_hugging_face(patterns)
        # The folder of a snapshot is named after its commit.
        prefix = f"{_HUGGING_FACE}{match['name']}@{folder.name}"
    copies = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return [
        (f"{prefix}/{name}", str(path), path.stat().st_size)
        for name, path in copies.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def resolve_commit(source: str) -> tuple[str, str]:
    """Return the name of a data set on Hugging Face's hub, and the commit that its revision is at now.

    Raises:
        UserError: as `download`; or `source` is on ModelScope, or names files.
    """
    scheme, match, repository = _parse(source)
    if scheme == MODELSCOPE:
        expected = "data.subset and data.source_split work with Hugging Face and local folders, not with ModelScope"
        raise UserError(
            "data.source",
            source,
            expected,
            f"remove both, and set data.source to files, such as {MODELSCOPE}{match['name']}/FOLDER/*.parquet",
        )
    if match["files"]:
        expected = "names files, but data.subset and data.source_split need a whole data set"
        raise UserError("data.source", source, expected, "set data.source to owner/name, or unset the other two")
    return match["name"], repository.commit()


def describe_files(name: str, commit: str, files: list[str]) -> list[tuple[str, int, str]]:
    """Return (path, size in bytes, hash recorded by the hub) for each of these files that is in a data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    entries = []
    for first in range(0, len(files), _FILES_PER_REQUEST):
        paths = files[first : first + _FILES_PER_REQUEST]
        entries += HfApi().get_paths_info(name, paths, revision=commit, repo_type="dataset")
    found = [entry for entry in entries if isinstance(entry, RepoFile)]
    return [(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in found]


def identity(url: str, path: str) -> tuple[str | None, str | None]:
    """Return the revision and the hub's hash of a file that `download` returned; None for each that is unknown.

    Args:
        url: URL of the file, which holds the revision.
        path: the local copy. In Hugging Face's cache it is a link to a file that is named after the hash:
            https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    scheme, match = _split_scheme(url)
    if not scheme:
        return None, None
    copy = Path(path)
    is_named_after_hash = scheme == _HUGGING_FACE and copy.is_symlink() and copy.readlink().parent.name == "blobs"
    return match and match["revision"], copy.readlink().name if is_named_after_hash else None


def _split_scheme(source: str) -> tuple[str, re.Match[str] | None]:
    """Return the scheme of a hub ("" if there is none), and the match of the rest with `_DATA_SET`."""
    scheme = _SCHEME.match(source)
    return scheme[0] if scheme else "", _DATA_SET.fullmatch(source[scheme.end() :] if scheme else source)


def _parse(source: str) -> tuple[str, re.Match[str], "Repository"]:
    """Return the scheme of a data set on a hub ("" if there is none), its parts, and its repository."""
    scheme, match = _split_scheme(source)
    if match is None:
        raise UserError("data.source", source, "expected owner/name, owner/name@revision or owner/name/files*.json")
    revision = match["revision"] and match["revision"].replace("%2F", "/")
    return scheme, match, Repository("dataset", match["name"], revision, "data.source", source)


@dataclass(frozen=True)
class Repository:
    """A data set or a model on a hub."""

    kind: Literal["dataset", "model"]
    name: str
    """``owner/name``."""
    revision: str | None
    setting: str
    """Setting that names the repository, for error messages."""
    source: str
    """Value of that setting."""

    def from_hugging_face(self, patterns: list[str]) -> Path:
        """Download the files that match and return their folder; use the cache if the hub cannot be reached.

        Raises:
            UserError: the repository does not exist, access is refused, or neither the hub nor the cache has it.
        """
        from huggingface_hub import errors, snapshot_download

        # Its warnings are about what this program reports as an error or works around.
        logging.getLogger(snapshot_download.__module__).setLevel(logging.ERROR)
        unreachable: Exception | None = None
        with self._as_user_errors():
            try:
                # snapshot_download sends the same request, but without a timeout.
                self._request_commit()
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
                raise
            except Exception as error:
                # The errors of the hub, of its HTTP client and of the system have no base class in common.
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
        """Return the commit of the revision, as Hugging Face's hub has it now.

        Raises:
            UserError: the repository does not exist, access is refused, or the hub cannot be reached.
        """
        with self._as_user_errors():
            return self._request_commit()

    def _request_commit(self) -> str:
        from huggingface_hub import HfApi, constants

        revision, timeout_seconds = self.revision or constants.DEFAULT_REVISION, constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().repo_info(self.name, repo_type=self.kind, revision=revision, timeout=timeout_seconds)
        return str(info.sha)

    @contextmanager
    def _as_user_errors(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into a UserError."""
        from huggingface_hub import constants, errors

        try:
            yield
        except errors.GatedRepoError:
            page = f"{constants.ENDPOINT}/{'datasets/' * (self.kind == 'dataset')}{self.name}"
            expected = f"access to this {self._kind_name} is granted only on request"
            raise self._error(expected, f"ask for access at {page} and set HF_TOKEN") from None
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            expected = f"no such path here, and no such {self._kind_name} on the hub {constants.ENDPOINT}"
            raise self._error(expected, "check the name; a private one needs HF_TOKEN") from None
        except errors.RevisionNotFoundError:
            raise self._error(f"the {self._kind_name} has no revision {self.revision!r}") from None
        except Exception as error:
            cause = error.__cause__ or error
            reason = one_line(f"{type(cause).__name__}: {cause}")[:_MAX_REASON_CHARACTERS]
            if constants.HF_HUB_OFFLINE:
                reason = "HF_HUB_OFFLINE is set, and the files are not all in the cache"
            answer = "refuses access" if isinstance(cause, errors.HfHubHTTPError) else "cannot be reached"
            expected = f"no such path here, and the hub {constants.ENDPOINT} {answer} ({reason})"
            remedy = "set HF_ENDPOINT (for example https://hf-mirror.com), or use modelscope://owner/name, or a URL"
            if self.setting == "tokenizer.source":
                remedy += ", or an empty folder, where `prepare` trains a tokenizer"
            if self.source.startswith(self.name):  # It has no scheme.
                remedy += f"; if you mean a folder here, write ./{self.source}"
            raise self._error(expected, remedy) from None

    def from_modelscope(self, patterns: list[str]) -> Path:
        """Download the files that match and return their folder.

        Raises:
            UserError: the package `modelscope` is not installed, or it cannot download them.
        """
        try:
            from modelscope import snapshot_download
        except ImportError:
            expected = "needs the package modelscope, which is not installed"
            raise self._error(expected, f"install it: {python()} -m pip install modelscope") from None
        try:
            folder = snapshot_download(self.name, repo_type=self.kind, revision=self.revision, allow_patterns=patterns)
        except Exception as error:  # modelscope documents no error types.
            reason = one_line(f"{type(error).__name__}: {error}")[:_MAX_REASON_CHARACTERS]
            raise self._error(f"ModelScope cannot provide it ({reason})", "check the name and the network") from None
        return Path(folder)

    @property
    def _kind_name(self) -> str:
        return {"dataset": "data set", "model": "model"}[self.kind]

    def _error(self, expected: str, remedy: str = "") -> UserError:
        return UserError(self.setting, self.source, expected, remedy)
