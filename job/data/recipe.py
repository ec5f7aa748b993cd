"""The recipe of a data set, and what every process needs to know to make its part of it."""

from collections.abc import Callable
from dataclasses import dataclass

from job.data.corpus import BadRecord, Group
from job.data.data_set_plan import Plan
from job.data.dataset_files import ALL, Choice
from job.data.fingerprint import CorpusIdentity
from job.data.parts import Parts
from job.data.tokenizer import TextTokenizer
from job.errors import UserError

OnProgress = Callable[[int, int], None]
"""Called with the number of documents, and of UTF-8 bytes of text, that were done since the last call."""
OnBadRecord = Callable[[BadRecord], None]
"""Called with every record that is left out."""
OnNotice = Callable[[str], None]
"""Called with one line that says why preparation takes longer than it could."""
OnIdentified = Callable[[CorpusIdentity], None]
"""Called with the identity of the corpus, before any slice is made."""


@dataclass(frozen=True)
class Recipe:
    """The settings that decide the content of a data set, except the tokenizer."""

    source: str
    """The setting `data.source`."""
    text_field: str
    id_field: str
    on_bad_record: str
    """``stop`` or ``skip``."""
    slice_bytes: int
    validation_fraction: float
    seed: int
    choice: Choice = ALL
    """The configuration and the split of a source that has them."""

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings, by name, that all workers of a data set must have in common."""
        return self.choice.settings | {
            "data.text_field": self.text_field,
            "data.id_field": self.id_field,
            "data.slice_bytes": self.slice_bytes,
            "data.validation_fraction": self.validation_fraction,
            "data.seed": self.seed,
        }

    def tolerate(self, record: BadRecord) -> None:
        """Raise a UserError for a bad record, unless bad records are to be left out."""
        if self.on_bad_record == "stop":
            expected = f"bad record at {record.position}: {record.reason}"
            remedy = record.remedy or "repair it, or set data.on_bad_record to skip"
            if record.setting in self.settings:
                raise UserError(record.setting, self.settings[record.setting], f"{record.url}: {expected}", remedy)
            raise UserError(record.setting, record.url, expected, remedy)


@dataclass(frozen=True)
class Preparation:
    """Everything that a process needs to know to make its slices."""

    recipe: Recipe
    tokenizer: TextTokenizer
    shards_url: str
    """Folder or URL of the data set."""
    plan: Plan
    groups: tuple[Group, ...]
    """The files of the corpus, grouped so that consecutive small files share a slice."""
    versions: tuple[str, ...]
    """`storage.Ranges.version` of each file when the plan was made."""

    @property
    def parts(self) -> Parts:
        """The records of its finished slices."""
        return Parts(self.shards_url, self.plan)
