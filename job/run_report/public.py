"""Select what a report may publish of a run. It leaves out machines, places, and error texts, which may name both."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from job.data.dataset_files import is_on_hub
from job.run_report.preset import is_place, origin_of
from job.run_report.run_facts import AttemptSpan, RunFacts

_SOURCES = ("data.source", "tokenizer.source")
"""Settings that name something which others can have too, if it is on a hub."""
_INPUTS = (*_SOURCES, "train.resume")
"""Settings that name places on which the result depends. Whoever reproduces the run has to set them."""
_OWN_WORDS = ("auto", "never")
"""Values of train.resume that are no places."""
_PLACE = re.compile(r"[/~]|\.\.?/|.*://", re.DOTALL)
"""Beginning of a text that is a path or a URL, whatever the setting is called."""


def public_facts(run: RunFacts) -> RunFacts:
    """Return what of `run` may be published. All that a public report says comes from here."""
    record = replace(run.record, config=_public_settings(run.config))
    return replace(run, url="", record=record, attempts=tuple(map(_public_span, run.attempts)), missing=())


def unpublished_inputs(run: RunFacts) -> list[str]:
    """Return the settings to add to the commands that reproduce `run`, because their values are not published."""
    differing = {change.name: change.now for change in origin_of(run.config).differences}
    return [name for name in _INPUTS if name in differing and not _is_public(name, differing[name])]


def _public_span(span: AttemptSpan) -> AttemptSpan:
    changed = {
        name: values
        for name, values in (span.record.changed or {}).items()
        if all(_is_public(name, value) for value in values)
    }
    record = replace(
        span.record, job_id=None, host="", resume="", error=None, stop_reason=None, config=None, changed=changed
    )
    return replace(span, record=record)


def _public_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in values.items() if _is_public(f"{section}.{key}", value)}
        for section, values in config.items()
        if isinstance(values, dict)
    }


def _is_public(name: str, value: Any) -> bool:
    """Return True if a setting with this value names neither a place nor a machine."""
    if name in _SOURCES:
        return isinstance(value, str) and is_on_hub(value)
    if name == "train.resume":
        return value in _OWN_WORDS
    return not is_place(name) and not (isinstance(value, str) and _PLACE.match(value))
