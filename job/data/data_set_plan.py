"""The plan of a data set: plan.json records what it is made from, so that two recipes never mix in one folder.

The plan is created once, by conditional creation, and never overwritten. Shards and part records have its digest in
their names, so workers of two plans never write the same file. The manifest is published only from parts of the plan
that is there.

A `prepare` that fails before its first part removes the plan that it created, so that a corrected command works. If
another worker of the same plan is still running, that worker creates the plan again.
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
from job.data.listing import shorten_names
from job.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from job.errors import UserError
from job.redaction import redacted_tree, redacted_urls

PLAN_NAME = "plan.json"
_VERSION = 3
_VERSION_WITHOUT_GROUPS = 2
"""Version in which every file was cut alone; apart from that, it equals the current one."""
_EARLIEST_VERSION = 1
"""Version that identified the corpus by URL and size, and whose parts do not say which plan they belong to."""
_ANOTHER_FOLDER = "set data.shards to another folder, or delete that one"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything that determines the content of a data set."""

    version: int
    """Version of the format of plan.json."""
    source: tuple[Fingerprint, ...]
    """The files of the corpus, in the order of their numbers."""
    settings: dict[str, str | int | float]
    """Values of the settings by dotted name; `tokenizer.source` has the tokenizer's fingerprint as its value.

    `data.on_bad_record` is not included, because a run that stopped at a bad record may be continued without it."""

    @cached_property
    def content(self) -> bytes:
        """The plan as JSON; equal plans give equal bytes."""
        values = asdict(self)
        values["source"] = [
            {key: value for key, value in file.items() if value is not None} for file in values["source"]
        ]
        return orjson.dumps(values, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of `content`."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def label(self) -> str:
        """Beginning of the digest, for the names of files."""
        return self.digest[:12]


def make_plan(source: tuple[Fingerprint, ...], settings: dict[str, str | int | float]) -> Plan:
    """Return a plan of the current version, without the secrets in URLs.

    Only secrets that URLs show by their position are removed. Secrets from the environment differ between machines, so
    removing them would give each machine another plan.
    """
    named = tuple(replace(file, name=redacted_urls(file.name)) for file in source)
    return Plan(_VERSION, named, redacted_tree(settings, redacted_urls))


def finished_data_set(plan: Plan, shards_url: str) -> Manifest | None:
    """Return the manifest at `shards_url` if the data set there is finished and was made by this plan, else None.

    Raises:
        UserError: the data set there was made by another plan; the error names the settings that differ.
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
    raise _plan_differs(plan, shards_url, "holds a finished data set")


def claim(plan: Plan, shards_url: str) -> bool:
    """Create plan.json, or accept the same plan there. Return True if this call created it.

    Raises:
        UserError: another plan is there; the error names the settings that differ.
    """
    url = storage.join(shards_url, PLAN_NAME)
    while not storage.create_bytes(url, plan.content):
        try:
            if storage.read_bytes(url) == plan.content:
                return False
        except FileNotFoundError:
            # The worker that created the plan has failed and removed it just now.
            continue
        raise _plan_differs(plan, shards_url, "holds an unfinished data set")
    return True


def ensure_plan(plan: Plan, shards_url: str) -> None:
    """Check that this plan is still the one at `shards_url`; create it again if the worker that created it removed it.

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
    """Claim `shards_url` for this plan; remove the plan again after a failure that left no part.

    Args:
        plan: the plan of the data set.
        shards_url: folder or URL of the data set.
        has_parts: returns True if any worker has finished a slice of this plan.
    """
    is_ours = claim(plan, shards_url)
    try:
        yield
    except BaseException:
        if is_ours:
            _delete_plan_without_parts(plan, shards_url, has_parts)
        raise


def delete_plan(plan: Plan, shards_url: str) -> None:
    """Delete plan.json if it holds this plan."""
    url = storage.join(shards_url, PLAN_NAME)
    try:
        if storage.read_bytes(url) == plan.content:
            storage.delete([url])
    except FileNotFoundError:
        return


def _delete_plan_without_parts(plan: Plan, shards_url: str, has_parts: Callable[[], bool]) -> None:
    """Delete the plan unless there are parts; only warn if that fails, because an earlier error is being raised."""
    try:
        if not has_parts():
            delete_plan(plan, shards_url)
    except (OSError, UserError) as error:
        logger.warning("%s could not be deleted in %s, though no part was made: %s", PLAN_NAME, shards_url, error)


# ---- Differences between two plans ----


def _plan_differs(plan: Plan, shards_url: str, what: str) -> UserError:
    """Return the error that names the settings in which the plan at `shards_url` differs from `plan`."""
    url = storage.join(shards_url, PLAN_NAME)
    try:
        stored = storage.read_record(url, dict[str, Any])
        version = stored.get("version", stored.get("format_version"))
        if version not in (_EARLIEST_VERSION, _VERSION_WITHOUT_GROUPS, _VERSION):
            expected = f"its {PLAN_NAME} has version {version!r}, but this program reads up to version {_VERSION}"
            return UserError("data.shards", shards_url, expected, "use the version of the program that wrote it")
        if version == _EARLIEST_VERSION:
            differences = _differences_from_earliest(plan, stored)
        else:
            differences = _differences(plan, storage.read_record(url, Plan))
        if version != _VERSION and not differences:
            expected = "holds an unfinished data set of an earlier version, which cannot be continued"
            return UserError("data.shards", shards_url, expected, "delete that folder, or set data.shards to another")
    except FileNotFoundError:
        differences = [f"it has no {PLAN_NAME}, which records what it was made from"]
    except ValueError as error:
        expected = f"its {PLAN_NAME} is damaged or was written by another program: {error}"
        remedy = "delete that folder and prepare again, or set data.shards to another"
        return UserError("data.shards", shards_url, expected, remedy)
    return UserError("data.shards", shards_url, f"{what} that differs: {'; '.join(differences)}", _ANOTHER_FOLDER)


def _differences(plan: Plan, stored: Plan) -> list[str]:
    """Return for each setting that differs a text with both values: "there" is the stored plan, "here" is this one."""
    names = dict.fromkeys([*plan.settings, *stored.settings])
    pairs = {name: (stored.settings.get(name), plan.settings.get(name)) for name in names}
    differences = [
        f"{name} is {_shown(there)} there and {_shown(here)} here"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    source, stored_source = (
        tuple(replace(file, reader=None) for file in files) for files in (plan.source, stored.source)
    )
    if source != stored_source:
        differences.append(f"data.source has {_differing_files(source, stored_source)}")
    elif plan.source != stored.source and not differences:
        differences.append("data.source was read with other options there")
    return differences


def _differing_files(source: tuple[Fingerprint, ...], stored: tuple[Fingerprint, ...]) -> str:
    here, there = {file.name: file for file in source}, {file.name: file for file in stored}
    changed = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
    if changed:
        return f"other content in {shorten_names(changed)}"
    only_here, only_there = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    parts = [f"{shorten_names(only_here)} only here"] if only_here else []
    parts += [f"{shorten_names(only_there)} only there"] if only_there else []
    return " and ".join(parts)


def _differences_from_earliest(plan: Plan, earliest: dict[str, Any]) -> list[str]:
    """Return the names of the settings that differ from a plan of the earliest version."""
    differences = [name for name, value in plan.settings.items() if earliest.get(name) != value]
    sources = earliest.get("data.source")
    files = [file for file in (sources if isinstance(sources, list) else []) if isinstance(file, dict)]
    sizes = [file.get("size") for file in files]
    paths = [urlsplit(str(file.get("url"))).path for file in files]
    is_same_source = sizes == [file.size for file in plan.source] and all(
        path.endswith(file.name) for path, file in zip(paths, plan.source, strict=True)
    )
    return differences if is_same_source else [*differences, "data.source"]


def _agrees_with_earliest_plan(plan: Plan, shards_url: str) -> bool:
    try:
        stored = storage.read_record(storage.join(shards_url, PLAN_NAME), dict[str, Any])
    except (FileNotFoundError, ValueError):
        return False
    return stored.get("format_version") == _EARLIEST_VERSION and not _differences_from_earliest(plan, stored)


def _shown(value: object) -> str:
    """Return the value of a setting as text, shortened if it is long, as a tokenizer's fingerprint is."""
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:13]}...'"
