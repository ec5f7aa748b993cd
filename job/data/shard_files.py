"""The files of a split's shards on this machine: where they are, whether they are verified, and how they are copied."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from job import storage
from job.data.cache_quota import CacheQuota
from job.data.manifest import Shard
from job.data.verification_notes import FileChanged, Signature, hash_file, is_noted, signature_of, write_note
from job.errors import UserError
from job.invocation import command

_CHUNK_BYTES = 2**20
_MOST_COPIES = 2
"""Downloads of a shard before it is reported as damaged."""
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT}
"""Errors of the cache folder that only a person can solve."""


def copy_name(shard: Shard) -> str:
    """Return the file name of a shard's copy in the cache folder."""
    return f"{_name(shard)}.shard"


def _name(shard: Shard) -> str:
    return f"{shard.sha256[:16]}-{Path(shard.name).name}"


class ShardFiles:
    """The files of a split's shards; a file may be used after its sha256 was verified.

    Methods name a shard by its index in `shards`.

    Args:
        shards_url: folder or URL of the data set. Shards in a folder of this machine are used there, without a copy.
        shards: the shards of the split.
        folder: the cache folder, with the copies of remote shards and the notes on verified files.
        quota: tells which files in the folder belong to this user, and counts the room for copies.
    """

    def __init__(self, shards_url: str, shards: Sequence[Shard], folder: Path, quota: CacheQuota) -> None:
        self._shards, self._folder, self._quota = shards, folder, quota
        self.are_copies = storage.is_remote(shards_url)
        """True if the files are copies in the cache folder; False if they are the data set's own files."""
        self.urls = [storage.join(shards_url, shard.name) for shard in shards]
        self.names = [_name(shard) for shard in shards]
        """Names of the shards in the cache folder, from which the names of copies, locks and notes are made."""
        if self.are_copies:
            self.paths = [folder / copy_name(shard) for shard in shards]
            self._notes = [folder / f"{name}.verified" for name in self.names]
        else:
            self.paths = [storage.path_of(url).absolute() for url in self.urls]
            path_hashes = [hashlib.sha256(os.fsencode(path)).hexdigest()[:16] for path in self.paths]
            notes = [f"{name}.{path_hash}.verified" for name, path_hash in zip(self.names, path_hashes, strict=True)]
            self._notes = [folder / note for note in notes]
        self._verified: dict[int, Signature] = {}  # Signatures of the files that this process knows to be verified.

    def is_verified(self, index: int) -> bool:
        """Return True if the shard's file exists and was verified."""
        try:
            status = self.paths[index].stat(follow_symlinks=not self.are_copies)
        except OSError:
            return False
        return self._has_verified_status(index, status)

    def exists(self, index: int) -> bool:
        """Return True if the shard's file exists, verified or not."""
        return os.path.lexists(self.paths[index])

    def open_verified(self, index: int) -> BinaryIO | None:
        """Open the shard's file, unbuffered; return None if the file that was opened is not verified yet.

        Raises:
            OSError: the file does not exist or cannot be opened.
        """
        file = self._open(index)
        if self._has_verified_status(index, os.fstat(file.fileno())):
            return file
        file.close()
        return None

    def is_unchanged(self, index: int, file: BinaryIO) -> bool:
        """Return True if nobody has written to an open file since it was verified; call it after reading."""
        signature, verified = signature_of(os.fstat(file.fileno())), self._verified.get(index)
        # Deleting the file's name, which makes room in the cache, changes ctime but not the content.
        return verified is not None and signature._replace(ctime_ns=0) == verified._replace(ctime_ns=0)

    def verify(self, index: int, on_bytes: Callable[[int], None]) -> str:
        """Compare the sha256 of the shard's file with the manifest; return what is wrong with it, or an empty string.

        A file with nothing wrong may be used from then on.

        Args:
            index: of the shard.
            on_bytes: called with the number of bytes of each piece that was read; an exception from it ends the read.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        shard = self._shards[index]
        try:
            with self._open(index) as file:
                status = os.fstat(file.fileno())
                if self.are_copies and not self._quota.is_ours(status):
                    return f"this file does not belong to you, but to the user with uid {status.st_uid}"
                if status.st_size != shard.size:
                    return f"this shard is damaged: it has {status.st_size} bytes, the manifest says {shard.size}"
                if self.are_copies and not self._quota.is_ours_alone(status):
                    os.fchmod(file.fileno(), 0o600)
                sha256, signature = hash_file(file.fileno(), on_bytes)
        except FileNotFoundError:
            raise
        except FileChanged:
            return "this shard was changed while it was read"
        except OSError as error:
            return f"this shard cannot be read: {error.strerror}"
        if sha256 != shard.sha256:
            return _damaged(shard, sha256)
        self._note(index, signature)
        return ""

    def copy(self, index: int, partial: Path, on_bytes: Callable[[int], None], on_copy: Callable[[], None]) -> None:
        """Copy a shard from the store and verify it; a copy that arrives damaged is fetched once more.

        Args:
            index: of the shard.
            partial: the file that was reserved for the copy; it is renamed when the copy is verified.
            on_bytes: called with the number of bytes of each piece; an exception from it ends the copying.
            on_copy: called after each copy, also after a damaged one.

        Raises:
            UserError: the shard is missing or damaged in the store.
            StoreError: the store failed until its deadline.
        """
        shard, sha256 = self._shards[index], ""
        for _ in range(_MOST_COPIES):
            descriptor = os.open(partial, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "wb") as file:
                sha256 = self._copy_once(index, file, on_bytes)
                on_copy()
                if sha256 == shard.sha256:
                    self._quota.keep(partial, self.paths[index])
                    self._note(index, signature_of(os.fstat(file.fileno())))
                    return
        remedy = f"delete it and run `{command('prepare')}` again"
        raise UserError("data.shards", self.urls[index], _damaged(shard, sha256), remedy)

    def missing_error(self, index: int) -> UserError:
        """Return the error for a shard that the manifest names and that does not exist."""
        expected = "the manifest names this shard, but it does not exist"
        return UserError("data.shards", self.urls[index], expected, f"run `{command('prepare')}` again")

    def folder_error(self, error: OSError) -> Exception:
        """Return a UserError for an error of the cache folder that a person can solve; otherwise `error` itself."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            expected, remedy = "the disk became full before it held data.cache_bytes", "set data.cache_bytes to less"
        elif error.errno in _UNUSABLE and not isinstance(error, storage.StoreError):
            expected = f"cannot be used: {error.strerror}: {error.filename}"
            remedy = "set it to a folder on a local disk that only you can write to"
        else:
            return error
        return UserError("data.cache_dir", str(self._folder), expected, remedy)

    def _has_verified_status(self, index: int, status: os.stat_result) -> bool:
        """Return True if a file with this status is the one that a process of this node has verified."""
        if self.are_copies and not self._quota.is_ours_alone(status):
            return False
        signature = signature_of(status)
        if self._verified.get(index) == signature:
            return True
        if not is_noted(self._notes[index], self._shards[index].sha256, signature, self._quota.is_ours_alone):
            return False
        self._verified[index] = signature
        return True

    def _open(self, index: int) -> BinaryIO:
        """Open the shard's file. A copy must not be a link, and opening a pipe must not wait for its other end."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if self.are_copies else 0)
        descriptor = os.open(self.paths[index], flags)
        try:
            return os.fdopen(descriptor, "rb", buffering=0)
        except OSError:  # The path is a folder.
            os.close(descriptor)
            raise

    def _note(self, index: int, signature: Signature) -> None:
        """Record that the file with this signature is verified: for this process, and in a note for the others."""
        write_note(self._notes[index], self._shards[index].sha256, signature)
        self._verified[index] = signature

    def _copy_once(self, index: int, target: BinaryIO, on_bytes: Callable[[int], None]) -> str:
        """Copy a shard from the store into an open file; return the sha256 of what was received."""
        digest, left = hashlib.sha256(), self._shards[index].size
        try:
            source = storage.open_read(self.urls[index])
        except FileNotFoundError:
            raise self.missing_error(index) from None
        with source:
            while left >= 0 and (chunk := source.read(_CHUNK_BYTES)):  # A shard that is too long is damaged anyway.
                on_bytes(len(chunk))
                digest.update(chunk)
                target.write(chunk)
                left -= len(chunk)
        target.flush()
        os.fsync(target.fileno())
        return digest.hexdigest()


def _damaged(shard: Shard, sha256: str) -> str:
    return f"this shard is damaged: its sha256 is {sha256}, the manifest says {shard.sha256}"
