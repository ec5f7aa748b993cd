"""docs/tour.md in both languages: links lead to the lines that they name, and the numbers are those of the program."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import REPOSITORY

PAGES = ("docs/tour.md", "docs/tour.zh.md")
_LINK = re.compile(r"\[`([\w.]+)`\]\((\.\./job/[\w/]+\.py)#L(\d+)\)")


def lines_of_names(path: Path) -> dict[str, int]:
    """Return the line of each class, function, method and constant of a file, by its name with its class."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = node.lineno

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_tour_lead_to_the_lines_they_name(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    links = _LINK.findall(text)
    assert len(links) == text.count("../job/") - text.count("../job/demo/sample.jsonl)") > 15, "a link has another form"
    wrong = []
    for name, path, line in links:
        right = lines_of_names((REPOSITORY / page).parent / path).get(name)
        if right != int(line):
            wrong.append(f"[`{name}`]({path}#L{line}): " + (f"now {path}#L{right}" if right else "no such name"))
    assert wrong == []


def test_both_tours_have_the_same_links_and_numbers() -> None:
    english, chinese = ((REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES)
    assert sorted(_LINK.findall(english)) == sorted(_LINK.findall(chinese))
    assert [sorted(one) for one in sections(english)] == [sorted(one) for one in sections(chinese)]


@pytest.fixture(scope="module")
def stations() -> list[list[str]]:
    """The values that the program prints, by station."""
    words = [sys.executable, "-m", "benchmarks.tour"]
    ended = subprocess.run(words, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    values: list[list[str]] = []
    for line in ended.stdout.splitlines():
        if re.match(r"\d+\. ", line):
            values.append([])
        else:
            values[-1].append(re.split(r"  +", line.strip())[1])
    return values


@pytest.mark.benchmarks
@pytest.mark.parametrize("page", PAGES)
def test_numbers_of_the_tour_are_those_of_the_program(page: str, stations: list[list[str]]) -> None:
    shown = sections((REPOSITORY / page).read_text(encoding="utf-8"))
    assert len(shown) == len(stations)
    for number, (on_page, printed) in enumerate(zip(shown, stations, strict=True), 1):
        missing = [value for value in printed if not any(is_same(value, other) for other in on_page)]
        stale = [value for value in on_page if not any(is_same(value, other) for other in printed)]
        assert (missing, stale) == ([], []), f"station {number}: missing on the page, and not printed"


def sections(text: str) -> list[list[str]]:
    """Return the bold words of each numbered section of a page."""
    parts = re.split(r"^## \d+\. ", text, flags=re.M)
    return [re.findall(r"\*\*(.+?)\*\*", part) for part in parts[1:]]


def is_same(value: str, other: str) -> bool:
    """Return True if both are the same text, or numbers that differ by less than two units of the last digit."""
    if value == other or not all(re.fullmatch(r"-?\d+\.\d+(e-\d+)?", one) for one in (value, other)):
        return value == other
    mantissa, _, exponent = value.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(value) - float(other)) < 2 * unit
