"""Line charts and time lines as SVG, drawn with the colours of the page around them, so that they follow its scheme.

They are made here and not by matplotlib, whose SVG has fixed colours and takes 20 to 50 KB without a single point. Only
the places of its ticks come from matplotlib.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from job.run_report.wording import Both

MOST_POINTS = 1000
"""Points of one kind in a chart, divided among its runs."""
COLOURS = 8
"""Colours of runs on the page."""
WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40
"""Margins around the plot, in units of the drawing."""
_LEAST_RANGE = 1e-12
_LEAST_LOGARITHMIC = 1e-300
"""Values below this are 0 for a logarithmic axis: further down, floating-point numbers lose their digits."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    points: Points
    """x and y of each point, in the order of x."""
    colour: int
    """Number of the colour on the page, which is that of the run."""
    style: str = "thin"
    """``thin``; ``marked``: with a dot at each point; ``dashed``."""
    name: str = ""
    """Name of the metric, for programs that read the page."""


def thin_out(points: Points, most: int) -> Points:
    """Return at most so many of the points, with the lowest and the highest of each stretch, and the first and last."""
    if len(points) <= most:
        return points
    y = np.array([point[1] for point in points])
    kept = {0, len(points) - 1}
    for indexes in np.array_split(np.arange(len(points)), max(1, (most - 2) // 2)):
        kept |= {int(indexes[y[indexes].argmin()]), int(indexes[y[indexes].argmax()])}
    return [points[index] for index in sorted(kept)]


def line_chart(lines: Sequence[Line], x_name: Both, y_name: Both, *, is_log: bool = False, unit: str = "") -> Markup:
    """Return a chart of the lines; empty if no line has a point.

    Args:
        lines: the lines, which share both axes.
        x_name: name of the horizontal axis.
        y_name: name of the vertical axis.
        is_log: the vertical axis is logarithmic; values that are not above 0, or are as good as 0, are left out.
        unit: written after the numbers of the vertical axis; ``%``: values are fractions.
    """
    runs = max((line.colour for line in lines), default=0) + 1
    shown = [
        (line, thin_out([(x, y) for x, y in line.points if not is_log or y >= _LEAST_LOGARITHMIC], MOST_POINTS // runs))
        for line in lines
    ]
    shown = [(line, points) for line, points in shown if points]
    if not shown:
        return Markup()
    x_low, x_high = _range([x for _, points in shown for x, _ in points])
    y_low, y_high = _range([y for _, points in shown for _, y in points])
    y_ticks = _ticks(y_low, y_high)
    if is_log:
        y_low, y_high = y_low * 0.9, y_high * 1.1
        y_ticks = _log_ticks(y_low, y_high)
    else:
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    place_x = _scale(x_low, x_high, _LEFT, WIDTH - _RIGHT)
    place_y = _scale(y_low, y_high, HEIGHT - _BOTTOM, _TOP, is_log)
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img">').format(WIDTH, HEIGHT), _texts("title", y_name)]
    for tick in y_ticks:
        at = f"{place_y(tick):.1f}"
        text = f"{tick:.3g}".removesuffix(".0") if unit != "%" else f"{100 * tick:.3g}%"
        text = _with_prefix(tick) if abs(tick) >= 1000 else text
        parts.append(_element("line", "grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at))
        parts.append(Markup('<text class="y" x="{}" y="{}">{}</text>').format(_LEFT - 6, at, text))
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            text = _with_prefix(tick) if tick >= 1000 else f"{tick:.3g}"
            parts.append(
                Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(place_x(tick), HEIGHT - _BOTTOM + 16, text)
            )
    parts.append(_texts("text", x_name, f'class="axis" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}"'))
    for line, points in shown:
        places = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(_element("polyline", f"c{line.colour} {line.style}", points=places, data_name=line.name))
        if line.style == "marked" or len(points) == 1:
            parts += [
                _element("circle", f"c{line.colour}", cx=f"{place_x(x):.1f}", cy=f"{place_y(y):.1f}", r=2.5)
                for x, y in points
            ]
    return Markup().join([*parts, Markup("</svg>")])


@dataclass(frozen=True)
class Bar:
    """A stretch of a time line."""

    begin: float
    """Begin in hours."""
    end: float
    kind: str
    """Name of its colour on the page."""
    label: str
    """Short text in the bar, shown if there is room."""
    about: Both
    """Text that a browser shows when the pointer is over the bar."""


_LANE = 30
"""Height of a lane of a time line, in units of the drawing."""


def time_line(lanes: Sequence[Sequence[Bar]], x_name: Both) -> Markup:
    """Return a drawing with a lane of bars for each run, over the same hours; empty if there is no bar."""
    bars = [bar for lane in lanes for bar in lane]
    if not bars:
        return Markup()
    high = max(*(bar.end for bar in bars), 1 / 3600)
    place, height = _scale(0, high, 8, WIDTH - 8), _LANE * len(lanes) + 40
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img">').format(WIDTH, height), _texts("title", x_name)]
    for number, lane in enumerate(lanes):
        top = 6 + _LANE * number
        for bar in lane:
            left, right = place(bar.begin), place(bar.end)
            width = max(2.0, right - left)
            parts += [
                Markup('<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}">').format(
                    f"bar {bar.kind}", left, top, width, _LANE - 8
                ),
                _texts("title", bar.about),
                Markup("</rect>"),
            ]
            if width > 8 * len(bar.label) + 6:
                middle = left + width / 2
                parts.append(
                    Markup('<text class="bar" x="{:.1f}" y="{}">{}</text>').format(middle, top + 15, bar.label)
                )
    bottom = 6 + _LANE * len(lanes)
    for tick in _ticks(0, high):
        if tick <= high:
            parts.append(
                Markup('<text class="x" x="{:.1f}" y="{}">{:.3g}</text>').format(
                    max(14, place(tick)), bottom + 10, tick
                )
            )
    parts.append(_texts("text", x_name, f'class="axis" x="{WIDTH / 2}" y="{height - 6}"'))
    return Markup().join([*parts, Markup("</svg>")])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < max(_LEAST_RANGE, 1e-9 * abs(high)):
        return low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low, high


def _scale(low: float, high: float, first: float, last: float, is_log: bool = False) -> Callable[[float], float]:
    """Return a function that maps values from `low` to `high` to places from `first` to `last`."""
    if is_log:
        low, high = math.log(low), math.log(high)
    factor = (last - first) / (high - low)
    return lambda value: first + factor * ((math.log(value) if is_log else value) - low)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator  # The import takes a fifth of a second, also at each start of training.

    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times each power of ten in the range, or only the powers if those would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 1 else [tick for tick in _ticks(low, high) if low <= tick <= high]


def _with_prefix(value: float) -> str:
    """Return the number with a metric prefix, such as 12k."""
    from matplotlib.ticker import EngFormatter

    return str(EngFormatter(sep="")(value))


def _element(name: str, classes: str, **attributes: object) -> Markup:
    text = Markup(" ").join(
        Markup('{}="{}"').format(key.replace("_", "-"), value) for key, value in attributes.items() if value != ""
    )
    return Markup('<{} class="{}" {}/>').format(name, classes, text)


def _texts(name: str, text: Both, attributes: str = "") -> Markup:
    """Return an element with the text in each language; `attributes` are written by this module."""
    if name == "title":  # An SVG element shows its first title only.
        return Markup("<title>{}</title>").format(text.en if text.en == text.zh else f"{text.en} · {text.zh}")
    return Markup().join(
        Markup('<{} lang="{}" {}>{}</{}>').format(name, language, Markup(attributes), escape(words), name)
        for language, words in (("en", text.en), ("zh", text.zh))
    )
