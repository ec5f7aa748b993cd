"""The words and the colour by which a report shows how an attempt ended."""

from typing import NamedTuple

from job.run_report.wording import Both, same
from job.runs.run_status import RunStatus


class Outcome(NamedTuple):
    """How an attempt ended."""

    words: Both
    colour: str
    """Name of the colour on the page."""


_KNOWN: dict[str, Outcome] = {
    RunStatus.DONE: Outcome(Both("done", "已完成"), "done"),
    RunStatus.STOPPED: Outcome(Both("stopped on request", "按要求停止"), "stopped"),
    RunStatus.FAILED: Outcome(Both("failed", "失败"), "failed"),
    RunStatus.SUPERSEDED: Outcome(Both("superseded by a newer attempt", "被更新的启动取代"), "superseded"),
    RunStatus.GAVE_UP: Outcome(Both("gave up", "放弃"), "failed"),
}
_GOES_ON = Outcome(Both("training, or ended without recording it", "训练中，或结束时未能记录"), "unknown")
_SILENT = Outcome(Both("recorded no end (killed? out of memory?)", "没有结束记录（被杀死？内存不足？）"), "unknown")


def outcome(ended: str | None, *, is_newest: bool) -> Outcome:
    """Return how an attempt ended.

    Args:
        ended: `Attempt.ended`.
        is_newest: no attempt came after it, so without a recorded end it may still be training.
    """
    if ended is None:
        return _GOES_ON if is_newest else _SILENT
    return _KNOWN.get(ended, Outcome(same(ended), "unknown"))
