"""The report's page in a real browser, on a desktop and on a phone, light and dark, in both languages."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, Tab, browser_tab
from stored_run import write_run

from job.run_report.write_report import make_report

pytestmark = [
    pytest.mark.recovery,
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed: apt-get install chromium"),
]
VISIBLE = """(selector => [...document.querySelectorAll(selector)].filter(
    one => one.getClientRects().length && one.getClientRects()[0].width > 0))"""
DARKEST = 60
LIGHTEST = 200


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on two runs."""
    folder = tmp_path_factory.mktemp("page")
    runs = [write_run(folder / name, name=name, rate=rate) for name, rate in (("wiki", 5e-4), ("faster", 1e-3))]
    return Path(make_report(runs).store(str(folder))[0])


def look(visit: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with browser_tab() as tab:
            await visit(tab)

    asyncio.run(run())


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_window_and_asks_for_nothing(page: Path, width: int) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(page, width, "light")
        assert await tab.evaluate("innerWidth") == width
        for language in ("en", "zh"):
            await tab.evaluate(f"document.getElementById('in-{language}').click()")
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width
            assert await tab.evaluate("document.documentElement.lang") == language
        assert tab.requests == [page.as_uri()]
        assert await tab.evaluate("document.title") == "Training report: wiki, faster", "a script of a sample has run"

    look(visit)


def test_charts_have_points_on_each_axis_and_scheme(page: Path) -> None:
    async def visit(tab: Tab) -> None:
        for scheme in ("light", "dark"):
            await tab.open(page, 1280, scheme)
            paper = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
            levels = [int(level) for level in paper.removeprefix("rgb(").removesuffix(")").split(",")]
            assert max(levels) < DARKEST if scheme == "dark" else min(levels) > LIGHTEST
            for axis in ("steps", "tokens", "hours"):
                await tab.evaluate(f"document.getElementById('by-{axis}').click()")
                points = await tab.evaluate(f"{VISIBLE}('polyline').map(one => one.points.numberOfItems)")
                assert len(points) == 16, "eight lines of each run"
                assert min(points) == 6 and max(points) == 500
            strokes = await tab.evaluate(f"{VISIBLE}('polyline').map(one => getComputedStyle(one).stroke)")
            assert len(set(strokes)) == 2 and paper not in strokes, "a colour for each run"
            assert await tab.evaluate(f"{VISIBLE}('rect.bar').length") == 6

    look(visit)


def test_language_switch_shows_one_language(page: Path) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(page, 390, "light")
        for language, other, heading in (("en", "zh", "Samples over time"), ("zh", "en", "各阶段的样本")):
            await tab.evaluate(f"document.getElementById('in-{language}').click()")
            assert await tab.evaluate("document.querySelector('#samples h2').innerText") == heading
            assert await tab.evaluate(f"{VISIBLE}('main [lang={other}], header [lang={other}]').length") == 0
            assert await tab.evaluate(f"{VISIBLE}('main [lang={language}]').length") > 50

    look(visit)
