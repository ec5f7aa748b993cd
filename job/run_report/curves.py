"""The charts of a report: loss, bits per byte, speed, learning rate and gradient norm of one or several runs."""

import math
from collections import Counter
from collections.abc import Sequence

from job.run_report.blocks import Chart
from job.run_report.line_chart import Bar, Line, line_chart, time_line
from job.run_report.outcomes import outcome
from job.run_report.run_facts import AttemptSpan, RunFacts
from job.run_report.wording import Both, duration, moment, phrase

AXES = {
    "steps": Both("optimizer steps", "优化器步数"),
    "tokens": Both("tokens seen", "已训练的 token 数"),
    "hours": Both("hours of work, without the pauses between attempts", "工作小时数（不含两次启动之间的间隔）"),
}
"""Name of each horizontal axis."""
_MOST_BARS = 200
"""Bars of the time line, divided among its runs; of more attempts, several that follow each other share a bar."""


def learning_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Return the charts of what the model has learnt."""
    loss = Both(
        "loss in nats per token: training (thin) and validation (dots)",
        "loss（nats/token）：训练（细线）和验证（圆点）",
    )
    return [
        _chart(runs, loss, [("train/loss", "thin"), ("validation/loss", "marked")]),
        _chart(
            runs,
            Both("validation bits per byte (BPB)", "验证集 bits per byte（BPB）"),
            [("validation/bits_per_byte", "marked")],
        ),
        _chart(
            runs,
            Both("gradient norm before clipping (logarithmic)", "裁剪前的梯度范数（对数坐标）"),
            [("train/gradient_norm", "thin")],
            is_log=True,
        ),
        _chart(runs, Both("learning rate", "学习率"), [("train/learning_rate", "thin")]),
    ]


def speed_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Return the charts of speed and waiting."""
    waits = Both(
        "share of time: waiting for data (thin) and standing still for checkpoints (dashed)",
        "时间占比：等待数据（细线），为 checkpoint 停顿（虚线）",
    )
    return [
        _chart(
            runs,
            Both("tokens per second, all processes", "每秒 token 数（所有进程）"),
            [("speed/tokens_per_second", "thin")],
        ),
        _chart(runs, waits, [("speed/data_wait", "thin"), ("speed/stall", "dashed")], unit="%"),
    ]


def attempts_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Return the time line of the attempts: a lane for each run, from its first attempt on, with the pauses."""
    share = math.ceil(max(1, *[len(run.attempts) for run in runs]) / (_MOST_BARS // len(runs)))
    lanes = [
        [
            bar
            for first in range(0, len(run.attempts), share)
            if (bar := _bar(run.attempts[first : first + share], run)) is not None
        ]
        for run in runs
    ]
    name = Both("hours since the first attempt began", "自第一次启动以来的小时数")
    title = Both("attempts on the clock", "各次启动的时间轴")
    if share > 1:
        title = phrase(
            "attempts on the clock, up to {share} in a bar, which hides the pauses between them",
            "各次启动的时间轴：每条最多合并 {share} 次启动，不显示其间的间隔",
            share=str(share),
        )
    return [Chart(title, {"all": time_line(lanes, name)})]


def _chart(
    runs: Sequence[RunFacts], title: Both, metrics: Sequence[tuple[str, str]], *, is_log: bool = False, unit: str = ""
) -> Chart:
    drawings = {}
    for axis, name in AXES.items():
        lines = [
            Line(_points(run, axis, metric), colour, style, metric)
            for colour, run in enumerate(runs)
            for metric, style in metrics
        ]
        drawings[axis] = line_chart(lines, name, title, is_log=is_log, unit=unit)
    return Chart(title, drawings)


def _points(run: RunFacts, axis: str, metric: str) -> list[tuple[float, float]]:
    found = zip(run.places(axis), run.column(metric), strict=True)
    return [(x, y) for x, y in found if x is not None and y is not None]


def _bar(spans: Sequence[AttemptSpan], run: RunFacts) -> Bar | None:
    """Return the bar of one attempt, or of several that follow each other; None if their times are not known."""
    first = run.attempts[0].began
    timed = [(span.began, span) for span in spans if span.began is not None]
    if not timed or first is None:
        return None
    begin = max(0.0, timed[0][0] - first)
    end = max(max(0.0, began - first) + span.seconds for began, span in timed)
    outcomes = [outcome(span.record.ended, is_newest=span is run.attempts[-1]) for _, span in timed]
    numbers = dict.fromkeys(str(span.record.number) for _, span in (timed[0], timed[-1]))
    label = "–".join(numbers)
    colour = Counter(ended.colour for ended in outcomes).most_common(1)[0][0]
    about = phrase(
        "attempt {number}: from {began}, {took}, {ended}",
        "第 {number} 次启动：{began} 开始，{took}，{ended}",
        number=label,
        began=moment(timed[0][0]),
        took=duration(sum(span.seconds for _, span in timed)),
        ended=_ends(Counter(ended.words for ended in outcomes)),
    )
    return Bar(begin / 3600, end / 3600, colour, label, about)


def _ends(outcomes: Counter[Both]) -> Both:
    """Return the ends of attempts in words; for several attempts, each kind of end with its number."""
    if outcomes.total() == 1:
        return next(iter(outcomes))
    return Both(
        ", ".join(f"{number} x {words.en}" for words, number in outcomes.items()),
        "，".join(f"{words.zh} {number} 次" for words, number in outcomes.items()),
    )
