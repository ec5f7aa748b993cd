"""The pages for readers: links lead somewhere, both languages have the same pages, and the README stays short."""

import hashlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FOLDERS = (".", "docs", "benchmarks", "launch", ".github")
PAGES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).glob("*.md"))
ENGLISH = [path for path in PAGES if path.parent.name == "docs" and not path.name.endswith(".zh.md")]
MOST_README_LINES = 150


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """Return the targets of the links and pictures of a page that are not on the web."""
    found: list[str] = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [target for target in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: those that GitHub makes of its headings, and its own."""
    text = without_code(page.read_text(encoding="utf-8"))
    headings, own = re.findall(r"^#+ (.*)$", text, re.M), re.findall(r'^<a id="([\w-]+)"></a>$', text, re.M)
    return set(own) | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{target}: no such file"
        if path.suffix == ".md" and anchor:
            assert anchor in anchors(path), f"{target}: no such heading; there are {sorted(anchors(path))}"
        if path.suffix == ".py" and anchor:
            assert int(anchor.removeprefix("L")) <= len(path.read_text(encoding="utf-8").splitlines()), target


def test_every_page_of_docs_is_in_both_languages_and_in_the_index() -> None:
    for page in ENGLISH:
        other = page.with_name(f"{page.stem}.zh.md")
        assert f"]({other.name})" in page.read_text(encoding="utf-8")
        assert f"]({page.name})" in other.read_text(encoding="utf-8")
        if page.stem != "index":
            assert page.name in links(page.with_name("index.md"))
            assert other.name in links(page.with_name("index.zh.md"))
    assert len(list((REPOSITORY / "docs").glob("*.md"))) == 2 * len(ENGLISH)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_is_short_and_links_to_its_language(name: str) -> None:
    page = REPOSITORY / name
    assert len(page.read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES
    suffix = ".zh.md" if ".zh." in name else ".md"
    for path in ENGLISH:
        assert f"docs/{path.stem}{suffix}" in links(page)


def test_picture_is_drawn_from_its_source() -> None:
    source = hashlib.sha256((REPOSITORY / "docs/architecture.dot").read_bytes()).hexdigest()
    assert f"drawn from sha256 {source}" in (REPOSITORY / "docs/architecture.svg").read_text(encoding="utf-8")
