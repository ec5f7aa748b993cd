"""Making the report of one or several runs and storing it, for `job report` and at the end of training."""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from job import storage
from job.errors import UserError, one_line
from job.run_report.line_chart import COLOURS
from job.run_report.markdown import to_markdown
from job.run_report.page import to_html
from job.run_report.run_facts import read_facts
from job.run_report.sections import run_names, sections_of
from job.run_report.wording import Both, Language, moment, phrase
from job.runs.run import FINAL_MODEL
from job.version import code_version

_CARD = "README.md"
_CARD_MARK = "<!-- The rest is written by `job report`. -->"
_PAGE = "report.html"
_FILES: dict[Language, str] = {"en": "report.md", "zh": "report.zh.md"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenReport:
    """A report in all its forms."""

    html: str
    markdown: dict[Language, str]
    """The report without charts, machines and places, so that it can be published."""
    card_section: str
    """The same for the model card, in its language, English."""
    missing: tuple[str, ...]
    """What could not be read, one sentence each, in English."""

    def store(self, folder: str) -> list[str]:
        """Write the files to a folder or URL, and return their paths or URLs."""
        files = {_PAGE: self.html, **{_FILES[language]: text for language, text in self.markdown.items()}}
        for name, text in files.items():
            storage.write_bytes(storage.join(folder, name), text.encode())
        return [storage.join(folder, name) for name in files]


def check_targets(folder: str) -> None:
    """Raise a UserError if a report cannot be written to a folder because a file or folder is in the way."""
    if storage.is_remote(folder):
        return
    path = storage.path_of(folder)
    existing = next(one for one in (path, *path.parents) if os.path.lexists(one) or one == one.parent)
    if not existing.is_dir():
        raise UserError("--to", str(existing), "it is a file, not a folder", "name another folder with --to")
    for name in (_PAGE, *_FILES.values()):
        if (path / name).is_dir():
            expected = "it is a folder, but a file of the report has this name"
            raise UserError("--to", str(path / name), expected, "remove it, or name another folder with --to")


def make_report(urls: Sequence[str]) -> WrittenReport:
    """Return the report on the runs at `urls`, folders or URLs.

    Raises:
        UserError: there is no run at one of them, its run.json is damaged, or there are too many runs.
        StoreError: the store failed until the deadline.
    """
    if len(urls) > COLOURS:
        raise UserError(
            "report", len(urls), f"expected at most {COLOURS} runs in one report", "compare fewer at a time"
        )
    runs = [read_facts(url) for url in urls]
    names = run_names(runs)
    title = phrase("Training report: {names}", "训练报告：{names}", names=", ".join(names))
    made = phrase(
        "made {at} by WikiLLM {version}",
        "{at} 由 WikiLLM {version} 生成",
        at=moment(time.time()),
        version=code_version(),
    )
    about = phrase("{urls} · {made}", "{urls} · {made}", urls=" · ".join(urls), made=made)
    public = sections_of(runs, is_public=True)
    return WrittenReport(
        to_html(title, about, names, sections_of(runs)),
        {language: to_markdown(title, made, public, language) for language in get_args(Language)},
        to_markdown(Both("Training report", "训练报告"), made, public, "en", level=2),
        tuple(f"{run.url}: {sentence.en}" for run in runs for sentence in run.missing),
    )


class EndReport:
    """The report at the end of a start, made by a thread while training shuts down; it can fail nothing.

    Args:
        output: folder or URL of the run, whose attempt has recorded its end.
        adds_to_card: also append the report to the card of the final model.
    """

    def __init__(self, output: str, *, adds_to_card: bool) -> None:
        self._output, self._adds_to_card = output, adds_to_card
        self._page: str | None = None
        self._thread = threading.Thread(target=self._write, name="report", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> str | None:
        """Wait at most so many seconds until it is written, and return the path or URL of its page.

        If it is not written, log a warning and return None.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("the report was not written within %.0f s; `job report` makes it again", seconds)
        return self._page

    def _write(self) -> None:
        try:
            report = make_report([self._output])
            logs = storage.join(self._output, "logs")
            check_targets(logs)
            page, *_ = report.store(logs)
            if self._adds_to_card:
                url = storage.join(self._output, FINAL_MODEL, _CARD)
                card = storage.read_bytes(url).decode().partition(_CARD_MARK)[0].rstrip()
                storage.write_bytes(url, f"{card}\n\n{_CARD_MARK}\n\n{report.card_section}".encode())
            self._page = page
        except Exception as error:
            # Whatever it is, the run itself has ended well.
            logger.warning("the report was not written: %s", one_line(str(error) or repr(error)))
