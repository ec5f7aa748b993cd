"""The files of a split's shards on this machine: where each is, whether it may be used, and how it is copied anew."""

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from job import storage
from job.data.cache_quota import Room
from job.data.manifest import Shard
from job.data.verification_notes import Changed, Signature, hash_file, is_noted, signature, write_note
from job.errors import UserError
from job.invocation import command

_CHUNK_BYTES = 2**20
_COPIES = 2
"""Downloads of a shard before it is reported as damaged."""
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT}
"""Errors of the cache's folder that only a person can mend."""


def copy_name(shard: Shard) -> str:
    """Return the name of a shard's copy in the cache's folder."""
    return f"{_name(shard)}.shard"


def _name(shard: Shard) -> str:
    return f"{shard.sha256[:16]}-{Path(shard.name).name}"


class ShardFiles:
    """The files of a split's shards, named by their index. A file may be used when its sha256 was compared.

    Args:
        shards_url: folder of the manifest. Shards in a folder of this machine are used where they are.
        shards: the split's shards.
        folder: folder of the cache, with the copies of other shards and all notes on verified files.
        room: tells which files in the folder are this user's.
    """

    def __init__(self, shards_url: str, shards: Sequence[Shard], folder: Path, room: Room) -> None:
        self._shards, self._folder, self._room = shards, folder, room
        self.are_copies = storage.is_remote(shards_url)
        self.urls = [storage.join(shards_url, shard.name) for shard in shards]
        self.names = [_name(shard) for shard in shards]
        """Names of their copies, locks and notes in the folder."""
        if self.are_copies:
            self.paths = [folder / copy_name(shard) for shard in shards]
            self._notes = [folder / f"{name}.verified" for name in self.names]
        else:
            self.paths = [Path(url.removeprefix("file://")).expanduser().absolute() for url in self.urls]
            places = [hashlib.sha256(os.fsencode(path)).hexdigest()[:16] for path in self.paths]
            notes = [f"{name}.{place}.verified" for name, place in zip(self.names, places, strict=True)]
            self._notes = [folder / note for note in notes]
        self._verified: dict[int, Signature] = {}  # of the files that may be used, as far as this process knows

    def is_here(self, index: int) -> bool:
        """Return True if there is a file that may be used."""
        try:
            found = self.paths[index].stat(follow_symlinks=not self.are_copies)
        except OSError:
            return False
        return self._is_verified(index, found)

    def is_on_disk(self, index: int) -> bool:
        """Return True if there is a file, verified or not."""
        return os.path.lexists(self.paths[index])

    def open_verified(self, index: int) -> BinaryIO | None:
        """Open a file, unbuffered, if what was opened may be used; None if it was not verified yet.

        Raises:
            OSError: there is none, or it cannot be opened.
        """
        file = self._open(index)
        if self._is_verified(index, os.fstat(file.fileno())):
            return file
        file.close()
        return None

    def is_unchanged(self, index: int, file: BinaryIO) -> bool:
        """Return True if what was just read from an open file was verified: nobody has written to it since."""
        found, verified = signature(os.fstat(file.fileno())), self._verified.get(index)
        # The time of change is another one if the file was dropped meanwhile.
        return verified is not None and found._replace(ctime_ns=0) == verified._replace(ctime_ns=0)

    def find_wrong(self, index: int, on_bytes: Callable[[int], None]) -> str:
        """Compare the sha256 of the file; return what is wrong with it, or nothing, and then it may be used.

        Args:
            index: of the shard.
            on_bytes: called with the number of bytes of each piece that was read; what it raises ends the reading.

        Raises:
            FileNotFoundError: there is none.
        """
        shard = self._shards[index]
        try:
            with self._open(index) as file:
                found = os.fstat(file.fileno())
                if self.are_copies and not self._room.is_ours(found):
                    return f"this is no file of yours, but of uid {found.st_uid}"
                if found.st_size != shard.size:
                    return f"this shard is damaged: it has {found.st_size} bytes, the manifest says {shard.size}"
                if self.are_copies and not self._room.is_ours_alone(found):
                    os.fchmod(file.fileno(), 0o600)
                sha256, of = hash_file(file.fileno(), on_bytes)
        except FileNotFoundError:
            raise
        except Changed:
            return "this shard was changed while it was read"
        except OSError as error:
            return f"this shard cannot be read: {error.strerror}"
        if sha256 != shard.sha256:
            return _damaged(shard, sha256)
        self._note(index, of)
        return ""

    def copy(self, index: int, partial: Path, on_bytes: Callable[[int], None], on_copy: Callable[[], None]) -> None:
        """Copy a shard from the store, which may then be used; what came damaged is fetched once more.

        Args:
            index: of the shard.
            partial: the file that was reserved for it; it gets the shard's name when it is whole.
            on_bytes: called with the number of bytes of each piece; what it raises ends the copying.
            on_copy: called after each copy, damaged ones included.

        Raises:
            UserError: it is not in the store, or is damaged there.
            StoreError: the store failed until its deadline.
        """
        shard, found = self._shards[index], ""
        for _ in range(_COPIES):
            descriptor = os.open(partial, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "wb") as file:
                found = self._copy_once(index, file, on_bytes)
                on_copy()
                if found == shard.sha256:
                    self._room.keep(partial, self.paths[index])
                    self._note(index, signature(os.fstat(file.fileno())))
                    return
        remedy = f"delete it and run `{command('prepare')}` again"
        raise UserError("data.shards", self.urls[index], _damaged(shard, found), remedy)

    def missing(self, index: int) -> UserError:
        """Say that there is no such shard."""
        wrong = "the manifest names this shard and it is not there"
        return UserError("data.shards", self.urls[index], wrong, f"run `{command('prepare')}` again")

    def explained(self, error: OSError) -> Exception:
        """Return what a person has to mend in the cache's folder, or the error itself if that is not known."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            wrong, remedy = "the disk is full before it holds data.cache_bytes", "lower data.cache_bytes"
        elif error.errno in _UNUSABLE and not isinstance(error, storage.StoreError):
            wrong = f"cannot be used: {error.strerror}: {error.filename}"
            remedy = "name a folder on a local disk that is yours alone"
        else:
            return error
        return UserError("data.cache_dir", str(self._folder), wrong, remedy)

    def _is_verified(self, index: int, found: os.stat_result) -> bool:
        """Return True if a file with this status is the one that a process of this node has verified."""
        if self.are_copies and not self._room.is_ours_alone(found):
            return False
        of = signature(found)
        if self._verified.get(index) == of:
            return True
        if not is_noted(self._notes[index], self._shards[index].sha256, of, self._room.is_ours_alone):
            return False
        self._verified[index] = of
        return True

    def _open(self, index: int) -> BinaryIO:
        """Open a file; a copy is no link, and nothing waits for the other end of a pipe."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if self.are_copies else 0)
        descriptor = os.open(self.paths[index], flags)
        try:
            return os.fdopen(descriptor, "rb", buffering=0)
        except OSError:  # a folder
            os.close(descriptor)
            raise

    def _note(self, index: int, of: Signature) -> None:
        """Have the file with this signature used: by the other processes too, which read the note."""
        write_note(self._notes[index], self._shards[index].sha256, of)
        self._verified[index] = of

    def _copy_once(self, index: int, target: BinaryIO, on_bytes: Callable[[int], None]) -> str:
        """Copy a shard to the disk; return the sha256 of what came."""
        digest, left = hashlib.sha256(), self._shards[index].size
        try:
            source = storage.open_read(self.urls[index])
        except FileNotFoundError:
            raise self.missing(index) from None
        with source:
            while left >= 0 and (chunk := source.read(_CHUNK_BYTES)):  # more than was reserved is damaged anyway
                on_bytes(len(chunk))
                digest.update(chunk)
                target.write(chunk)
                left -= len(chunk)
        target.flush()
        os.fsync(target.fileno())
        return digest.hexdigest()


def _damaged(shard: Shard, sha256: str) -> str:
    return f"this shard is damaged: its sha256 is {sha256}, the manifest says {shard.sha256}"
