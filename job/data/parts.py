"""Part records: one for each finished slice, written after the slice's shards, so that the shards are known to exist.

<data.shards>/parts/<label of the plan>/<group>-<slice>[-last].json
"""

import re
from dataclasses import asdict, dataclass

from job import storage
from job.data.corpus import Group
from job.data.data_set_plan import Plan
from job.data.manifest import Shard
from job.errors import UserError
from job.invocation import command

_NAME = re.compile(r".*/(\d+)-(\d+)(-last)?\.json")


@dataclass
class Counts:
    """Counts of one slice, or of all slices."""

    documents: int = 0
    """Documents, including the empty ones."""
    empty: int = 0
    """Documents without text, which are left out."""
    bad: int = 0
    """Bad records, which are left out."""
    normalized: int = 0
    """Documents that the tokenizer's normalizer changed."""
    encoded_tokens: int = 0
    """Tokens of all documents, including the end-of-document tokens."""

    def add(self, other: "Counts") -> None:
        """Add the counts of another slice to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Part:
    """The record of a finished slice."""

    group: int
    """Index of the group of files."""
    slice: int
    """Index of the slice in its group."""
    is_last: bool
    """True if the group has no slice after this one."""
    counts: Counts
    train: Shard | None
    """The slice's training shard; None if no document belongs to it."""
    validation: Shard | None
    """The slice's validation shard; None if no document belongs to it."""
    plan: str
    """Digest of the plan that the slice was made by."""


@dataclass(frozen=True)
class Parts:
    """The part records of one plan."""

    shards_url: str
    """Folder or URL of the data set."""
    plan: Plan

    @property
    def url(self) -> str:
        """Folder of the part records."""
        return storage.join(self.shards_url, "parts", self.plan.label)

    def url_of(self, group: int, slice_index: int, is_last: bool) -> str:
        """Return the URL of the record of a slice."""
        return storage.join(self.url, f"{group:05d}-{slice_index:05d}{'-last' if is_last else ''}.json")

    def finished(self) -> dict[tuple[int, int], bool]:
        """Return for each finished slice, as (group, slice), whether it is the last one of its group."""
        matches = (_NAME.fullmatch(entry.url) for entry in storage.list_files(self.url))
        return {(int(match[1]), int(match[2])): match[3] is not None for match in matches if match}

    def read(self, group: int, slice_index: int, is_last: bool) -> Part:
        """Return the record of a finished slice.

        Raises:
            UserError: the record is damaged, or belongs to another plan or slice.
        """
        url = self.url_of(group, slice_index, is_last)
        try:
            part = storage.read_record(url, Part)
        except ValueError as error:
            raise UserError("data.shards", url, f"this part record is damaged: {error}", _remedy()) from None
        if (part.plan, part.group, part.slice, part.is_last) != (self.plan.digest, group, slice_index, is_last):
            raise UserError("data.shards", url, "this part record belongs to another plan or slice", _remedy())
        return part

    def write(self, part: Part) -> None:
        """Write the record of a slice, after its shards were written."""
        storage.write_json(self.url_of(part.group, part.slice, part.is_last), asdict(part))


def slice_count(group: Group, finished: dict[tuple[int, int], bool]) -> int | None:
    """Return the number of slices of a group; None as long as its last slice is not finished.

    Args:
        group: the group of files.
        finished: the finished slices, as `Parts.finished` returns them.
    """
    return next((number + 1 for (index, number), is_last in finished.items() if index == group.index and is_last), None)


def _remedy() -> str:
    return f"delete it and run `{command('prepare')}` again, which makes this slice again"
