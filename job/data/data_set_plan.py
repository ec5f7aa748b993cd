"""plan.json records what a data set is made from, and keeps two recipes from being mixed in one folder.

The plan is created once, by conditional creation, and never overwritten. Shards and part records have its digest in
their names, so that workers of two plans never write one file, and the manifest is published only from parts of the
plan that is there. A `prepare` that fails before its first part removes the plan that it created itself, so that a
corrected command works; a worker of the same plan that goes on meanwhile creates it again.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import orjson

from job import storage
from job.data.fingerprint import Fingerprint
from job.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from job.errors import UserError
from job.redaction import redacted_tree, redacted_urls

PLAN_NAME = "plan.json"
_VERSION = 3
_VERSION_WITHOUT_GROUPS = 2
"""Cut every file by itself; else it is the same."""
_EARLIEST_VERSION = 1
"""Identified the corpus by URL and size; its parts do not say which plan they belong to."""
_SHOWN_FILES = 3
_ANOTHER_PLACE = "choose another data.shards for this one, or delete that folder"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the content of a data set."""

    version: int
    source: tuple[Fingerprint, ...]
    """The files of the corpus, in the order in which they are numbered."""
    settings: dict[str, str | int | float]
    """Values by dotted name; that of `tokenizer.source` is the tokenizer's fingerprint.

    `data.on_bad_record` is not among them: a run that stopped at a bad record may go on by leaving it out."""

    @cached_property
    def content(self) -> bytes:
        """The plan as JSON: equal plans give equal bytes."""
        values = asdict(self)
        values["source"] = [{key: value for key, value in one.items() if value is not None} for one in values["source"]]
        return orjson.dumps(values, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of `content`."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def label(self) -> str:
        """The digest's beginning, as it stands in the names of files."""
        return self.digest[:12]


def make_plan(source: tuple[Fingerprint, ...], settings: dict[str, str | int | float]) -> Plan:
    """A plan of the current version, without what is secret by its place in a URL.

    Secrets that only one machine knows, from its environment, must not change the plan: nothing in it is from there.
    """
    named = tuple(replace(one, name=redacted_urls(one.name)) for one in source)
    return Plan(_VERSION, named, redacted_tree(settings, redacted_urls))


def finished_data_set(plan: Plan, shards_url: str) -> Manifest | None:
    """The data set at `shards_url` if it is finished and made by this plan; None if there is none.

    Raises:
        UserError: the data set there was made by another plan; the settings that differ are named.
    """
    if not storage.exists(storage.join(shards_url, MANIFEST_NAME)):
        return None
    manifest = load_manifest(shards_url)
    if manifest.plan in (plan.digest, replace(plan, version=_VERSION_WITHOUT_GROUPS).digest):
        return manifest
    if manifest.plan is None and _agrees_with_earliest_plan(plan, shards_url):
        logger.warning(
            "%s was made by an earlier version, which did not record the content of the corpus: only the names and "
            "sizes of its files were compared",
            shards_url,
        )
        return manifest
    raise _refusal(plan, shards_url, "holds a finished data set")


def claim(plan: Plan, shards_url: str) -> bool:
    """Create plan.json, or find the same plan there; return whether this call created it.

    Raises:
        UserError: another plan is there; the settings that differ are named.
    """
    url = storage.join(shards_url, PLAN_NAME)
    while not storage.create_bytes(url, plan.content):
        try:
            if storage.read_bytes(url) == plan.content:
                return False
        except FileNotFoundError:  # its creator has failed, and removed it this moment
            continue
        raise _refusal(plan, shards_url, "holds a data set in the making")
    return True


def renew(plan: Plan, shards_url: str) -> None:
    """Make sure that this plan is still the one at `shards_url`; create it again if its creator has removed it.

    Raises:
        UserError: another plan has taken its place.
    """
    url = storage.join(shards_url, PLAN_NAME)
    try:
        if storage.read_bytes(url) == plan.content:
            return
    except FileNotFoundError:
        pass
    claim(plan, shards_url)


@contextmanager
def claimed(plan: Plan, shards_url: str, has_parts: Callable[[], bool]) -> Iterator[None]:
    """Hold the place at `shards_url` for this plan; remove the plan again after a failure that left no part.

    Args:
        plan: what is made.
        shards_url: folder or URL of the data set.
        has_parts: tells whether any slice of this plan is finished, by whichever worker.
    """
    is_ours = claim(plan, shards_url)
    try:
        yield
    except BaseException:
        if is_ours:
            _remove(plan, shards_url, has_parts)
        raise


def remove(plan: Plan, shards_url: str) -> None:
    """Delete plan.json if it is this plan."""
    url = storage.join(shards_url, PLAN_NAME)
    try:
        if storage.read_bytes(url) == plan.content:
            storage.delete([url])
    except FileNotFoundError:
        return


def _remove(plan: Plan, shards_url: str, has_parts: Callable[[], bool]) -> None:
    """`remove`, unless there are parts; what failed before counts more than a failure of this."""
    try:
        if not has_parts():
            remove(plan, shards_url)
    except (OSError, UserError) as error:
        logger.warning("%s is left in %s, though no part was made: %s", PLAN_NAME, shards_url, error)


# ---- What another plan differs in ----


def _refusal(plan: Plan, shards_url: str, what: str) -> UserError:
    """The error that names the settings in which the plan at `shards_url` differs from `plan`."""
    url = storage.join(shards_url, PLAN_NAME)
    try:
        found = storage.read_record(url, dict[str, Any])
        version = found.get("version", found.get("format_version"))
        if version not in (_EARLIEST_VERSION, _VERSION_WITHOUT_GROUPS, _VERSION):
            expected = f"its {PLAN_NAME} has version {version!r}, this program reads {_VERSION}"
            return UserError("data.shards", shards_url, expected, "use the version of the program that wrote it")
        if version == _EARLIEST_VERSION:
            different = _differences_from_earliest(plan, found)
        else:
            different = _differences(plan, storage.read_record(url, Plan))
        if version != _VERSION and not different:
            expected = "holds a half-made data set of an earlier version, which cannot be continued"
            return UserError("data.shards", shards_url, expected, "delete that folder, or choose another one")
    except FileNotFoundError:
        different = [f"it has no {PLAN_NAME} that says what it was made from"]
    except ValueError as error:
        expected = f"its {PLAN_NAME} is damaged or of another program: {error}"
        return UserError("data.shards", shards_url, expected, "delete that folder and prepare again, or choose another")
    return UserError("data.shards", shards_url, f"{what} that differs: {'; '.join(different)}", _ANOTHER_PLACE)


def _differences(plan: Plan, other: Plan) -> list[str]:
    """Each setting that differs, with both values."""
    theirs = other.settings
    found = [
        f"{name} is {_shown(theirs.get(name))} there and {_shown(plan.settings.get(name))} here"
        for name in dict.fromkeys([*plan.settings, *theirs])
        if theirs.get(name) != plan.settings.get(name)
    ]
    ours, others = ([replace(one, reader=None) for one in source] for source in (plan.source, other.source))
    if ours != others:
        found.append(f"data.source has {_differing_files(tuple(ours), tuple(others))}")
    elif plan.source != other.source and not found:
        found.append("data.source is read in another way there")
    return found


def _differing_files(ours: tuple[Fingerprint, ...], theirs: tuple[Fingerprint, ...]) -> str:
    here, there = {one.name: one for one in ours}, {one.name: one for one in theirs}
    changed = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
    if changed:
        return f"other content in {_some(changed)}"
    only_here, only_there = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    parts = [f"{_some(only_here)} here alone"] if only_here else []
    parts += [f"{_some(only_there)} there alone"] if only_there else []
    return " and ".join(parts)


def _differences_from_earliest(plan: Plan, earlier: dict[str, Any]) -> list[str]:
    found = [name for name, value in plan.settings.items() if earlier.get(name) != value]
    sources = earlier.get("data.source")
    listed = sources if isinstance(sources, list) else []
    sizes = [one.get("size") for one in listed if isinstance(one, dict)]
    paths = [urlsplit(str(one.get("url"))).path for one in listed if isinstance(one, dict)]
    is_same = sizes == [one.size for one in plan.source] and all(
        path.endswith(one.name) for path, one in zip(paths, plan.source, strict=True)
    )
    return found if is_same else [*found, "data.source"]


def _agrees_with_earliest_plan(plan: Plan, shards_url: str) -> bool:
    try:
        found = storage.read_record(storage.join(shards_url, PLAN_NAME), dict[str, Any])
    except (FileNotFoundError, ValueError):
        return False
    return found.get("format_version") == _EARLIEST_VERSION and not _differences_from_earliest(plan, found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_FILES]) + (", ..." if len(names) > _SHOWN_FILES else "")


def _shown(value: object) -> str:
    """A setting's value; of a tokenizer's fingerprint the beginning."""
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:13]}...'"
