"""A report as one HTML file that needs no other: both languages, light and dark, with a switch for the charts' axis.

Jinja2 writes it, because it escapes every text unless told otherwise: samples and names may hold anything.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from job.redaction import redacted
from job.run_report.blocks import Block, Section
from job.run_report.line_chart import COLOURS
from job.run_report.page_template import TEMPLATE
from job.run_report.wording import Both

_SCRIPT = (
    'if (navigator.language.startsWith("zh")) document.getElementById("in-zh").checked = true;'
    'const tell = () => document.documentElement.lang = document.getElementById("in-zh").checked ? "zh" : "en";'
    'document.querySelectorAll("[name=language]").forEach(one => one.addEventListener("change", tell)); tell();'
)
"""Choose the browser's language. Without scripts, the page begins in English, and its switches work as well."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that HTML does not allow, or that UTF-8 cannot encode."""
_CHARTS_OVER = Both("Draw the charts over", "图表的横轴")
_AXES = {"steps": Both("steps", "步数"), "tokens": Both("tokens", "token 数"), "hours": Both("hours", "小时")}
"""Words of the switch between the axes of `curves.AXES`."""
_NO_POINTS = Both("No points: the run has not recorded this.", "没有数据点：该运行没有记录这一项。")


@dataclass(frozen=True)
class _Group:
    """Blocks of one kind that follow each other; charts stand in a grid."""

    kind: str
    blocks: list[Block]


@dataclass(frozen=True)
class _Shown:
    name: str
    title: Both
    groups: list[_Group]


def _without_secrets(value: object) -> object:
    """Return a text of the page without secrets, before it is escaped: an escaped one would not be recognized."""
    return redacted(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _kind_of(block: Block) -> str:
    return type(block).__name__


def to_html(title: Both, about: Both, names: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page, without secrets.

    Args:
        title: heading of the page.
        about: the line below it.
        names: names of the runs, in the order of their colours.
        sections: what the report says.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_without_secrets,
    )
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    shown = [
        _Shown(
            section.name,
            section.title,
            [_Group(kind, list(blocks)) for kind, blocks in groupby(section.blocks, _kind_of)],
        )
        for section in sections
    ]
    text = environment.from_string(TEMPLATE).render(
        title=title,
        about=about,
        names=names,
        sections=shown,
        axes=_AXES,
        charts_over=_CHARTS_OVER,
        colours=COLOURS,
        no_points=_NO_POINTS,
        script=Markup(_SCRIPT),
        script_hash=f"sha256-{digest}",
    )
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
