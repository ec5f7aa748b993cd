"""Part records: one for each finished slice, written after its shards; where the record is, the shards are.

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
_MAKE_AGAIN = f"delete it and run `{command('prepare')}` again, which makes that slice anew"


@dataclass
class Counts:
    """What was seen in a slice, or in all of them. Bad records are those left out."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    normalized: int = 0
    encoded_tokens: int = 0

    def add(self, other: "Counts") -> None:
        """Adds the counts of another slice to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Part:
    """The record of a finished slice; where it exists, the slice's shards exist."""

    group: int
    slice: int
    is_last: bool
    counts: Counts
    train: Shard | None
    validation: Shard | None
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
        """Folder that holds them."""
        return storage.join(self.shards_url, "parts", self.plan.label)

    def url_of(self, group: int, number: int, is_last: bool) -> str:
        """URL of the record of a slice."""
        return storage.join(self.url, f"{group:05d}-{number:05d}{'-last' if is_last else ''}.json")

    def finished(self) -> dict[tuple[int, int], bool]:
        """Return (group, slice) of every finished slice, and whether it is its group's last."""
        found = (_NAME.fullmatch(entry.url) for entry in storage.list_files(self.url))
        return {(int(part[1]), int(part[2])): part[3] is not None for part in found if part}

    def read(self, group: int, number: int, is_last: bool) -> Part:
        """Return the record of a finished slice. Raises a UserError if it is damaged, or of another plan or slice."""
        url = self.url_of(group, number, is_last)
        try:
            part = storage.read_record(url, Part)
        except ValueError as error:
            raise UserError("data.shards", url, f"this part record is damaged: {error}", _MAKE_AGAIN) from None
        if (part.plan, part.group, part.slice, part.is_last) != (self.plan.digest, group, number, is_last):
            raise UserError("data.shards", url, "this part record is of another plan or slice", _MAKE_AGAIN)
        return part

    def write(self, part: Part) -> None:
        """Write the record of a slice whose shards are written."""
        storage.write_json(self.url_of(part.group, part.slice, part.is_last), asdict(part))


def slices_of(group: Group, done: dict[tuple[int, int], bool]) -> int | None:
    """How many slices a group has, if that is known yet."""
    return next((number + 1 for (index, number), is_last in done.items() if index == group.index and is_last), None)
