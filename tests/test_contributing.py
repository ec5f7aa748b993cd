"""Both pages of CONTRIBUTING name the same files, symbols, settings and make targets, and all of them exist."""

import re

import pytest
from printed_commands import REPOSITORY, blocks_of

from job import config as settings

PAGES = ("CONTRIBUTING.md", "CONTRIBUTING.zh.md")
DOORS = {
    "optimizer": {"job/training/optimizer.py": "BUILDERS", "job/model/optimizer_state.py": "OPTIMIZER_STATES"},
    "architecture": {"job/model/architecture.py": "ARCHITECTURES", "job/config_training.py": "architecture"},
    "tracker": {"job/tracking/NAME.py": "Tracker", "job/tracking/__init__.py": "TRACKERS"},
    "place": {"job/launcher/environment.py": "_find_nodes", "launch/NAME.yaml": "launch/NAME.sh"},
}
"""What a new entry touches: two files, and the table, class or setting that the page names for each."""


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def quoted(text: str) -> list[str]:
    """Return what stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def is_defined(name: str) -> bool:
    """Return True if a file of the project defines this function, class or constant."""
    definition = re.compile(rf"^\s*(def|class) {name}\b|^\s*{name}(: .*)? = ", re.M)
    folders = ("job", "launch", "tests")
    return any(
        definition.search(path.read_text()) for folder in folders for path in (REPOSITORY / folder).rglob("*.py")
    )


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    files = [word for word in quoted(text_of(page)) if "/" in word and " " not in word and "NAME" not in word]
    assert len(files) > 20
    assert [name for name in files if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_symbols_and_settings_exist(page: str) -> None:
    words = quoted(text_of(page))
    no_symbols = {"EDIT", "PYTHON", "PIP_INDEX_URL"}
    symbols = {word for word in words if re.fullmatch(r"_?[A-Z][A-Za-z_]*|[a-z_]+_[a-z_]+", word)} - no_symbols
    assert len(symbols) > 12
    assert [name for name in symbols if not is_defined(name)] == []
    known = {setting.name for setting in settings.settings()}
    named = {word for word in words if re.fullmatch(r"(train|model|tracking)\.[a-z_]+", word)}
    assert named == {"train.optimizer", "model.architecture", "tracking.to"} and named <= known


@pytest.mark.parametrize("page", PAGES)
def test_named_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.M))
    assert {"setup", "setup-dev", "lint", "test", "lock"} <= named <= targets


def test_both_pages_say_the_same() -> None:
    english, chinese = (sorted(set(quoted(text_of(page)))) for page in PAGES)
    assert english == chinese
    first, second = ([block.commands for block in blocks_of(page)] for page in PAGES)
    assert first == second


@pytest.mark.parametrize("door", DOORS)
def test_each_door_names_the_two_files_to_touch(door: str) -> None:
    section = re.split(r"^## ", text_of(PAGES[0]), flags=re.M)[-len(DOORS) + list(DOORS).index(door)]
    assert section.startswith(f"Add a{'n' if door[0] in 'aeiou' else ''} {door}\n")
    steps = re.findall(r"^(\d)\. `([^`]+)`(.*?)(?=^\d\.|^$)", section, re.M | re.S)
    assert [number for number, _, _ in steps] == ["1", "2"]
    assert [file for _, file, _ in steps] == list(DOORS[door])
    for _, file, text in steps:
        assert f"`{DOORS[door][file]}`" in text


@pytest.mark.parametrize("door", ["optimizer", "architecture", "tracker"])
def test_the_named_table_is_in_the_named_file(door: str) -> None:
    for file, name in DOORS[door].items():
        if "NAME" not in file:
            assigned = re.search(rf"^ *{name}\b[^=\n]*[=:]", text_of(file), re.M)
            assert assigned, f"{name} in {file}"
