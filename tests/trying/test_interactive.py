"""`generate` at a terminal without a prompt: a person types texts, stops continuations, and finds old texts again."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from export_cases import export_kind
from typed_terminal import Terminal

from job.errors import EXIT_DONE
from job.trying import prompt_line
from job.trying.prompt_line import PromptLine

QUESTION = "text> "
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
BOLD = r"\x1b\[1;36m{}\x1b\[0m"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a new model, whose texts are nonsense."""
    return str(export_kind("trained here", tmp_path_factory.mktemp("model")).folder)


@pytest.fixture(scope="module")
def first(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Path]]:
    """A terminal at which one text was continued, one was stopped, and the program was ended; and its folder."""
    folder = tmp_path_factory.mktemp("terminal")
    words = ("generate", "--generate.model", model, "--generate.max_new_tokens", "8", "--generate.samples", "60000")
    with Terminal(*words, cwd=folder, WIKILLM_SCRATCH=str(folder / "scratch")) as terminal:
        terminal.read_until(QUESTION)
        terminal.type("北京市\r")
        terminal.read_until("\n\x1b[1;36m北京市")
        terminal.read_until(QUESTION, pressing=CTRL_C)
        terminal.type("a wrong text")
        terminal.read_until(QUESTION, pressing=CTRL_C)
        terminal.type(" \r")
        terminal.read_until(QUESTION)
        terminal.type(CTRL_D)
        assert terminal.end() == EXIT_DONE, terminal.shown
        yield terminal, folder


def test_it_says_once_that_it_is_a_base_model(first: tuple[Terminal, Path]) -> None:
    shown = first[0].shown
    assert shown.count("this is a base model: it continues texts; it does not answer questions or chat") == 1
    assert shown.index("this is a base model") < shown.index(QUESTION)


def test_prompt_is_bold_and_its_continuation_is_not(first: tuple[Terminal, Path]) -> None:
    assert re.search(BOLD.format("北京市") + r"[^\x1b\s]", first[0].shown)


def test_seed_is_printed_for_each_typed_text(first: tuple[Terminal, Path]) -> None:
    assert len(re.findall(r"seed (\d+): repeat it with --generate\.seed \1\b", first[0].shown)) == 1


def test_ctrl_c_stops_a_text_and_the_program_goes_on(first: tuple[Terminal, Path]) -> None:
    assert first[0].shown.count(QUESTION) >= 4
    assert 1 <= len(re.findall(BOLD.format("北京市"), first[0].shown)) < 60_000
    assert "Traceback" not in first[0].shown


def test_only_texts_that_were_continued_are_remembered(first: tuple[Terminal, Path]) -> None:
    history = first[1] / "scratch" / f"wikillm-{first[1].stat().st_uid}" / "prompts"
    assert history.read_text() == "北京市\n"
    assert history.parent.stat().st_mode & 0o077 == 0, "other users could read it"


def test_up_brings_back_a_text_of_an_earlier_time(first: tuple[Terminal, Path], model: str) -> None:
    words = ("generate", "--generate.model", model, "--generate.max_new_tokens", "8", "--generate.seed", "7")
    with Terminal(*words, cwd=first[1], WIKILLM_SCRATCH=str(first[1] / "scratch")) as terminal:
        terminal.read_until(QUESTION)
        terminal.type(UP)
        terminal.read_until("北京市")
        terminal.type("\r")
        once = terminal.read_until(QUESTION)
        assert re.search(BOLD.format("北京市"), once)
        terminal.type(UP + "\r")
        again = terminal.read_until(QUESTION)
        assert once.rpartition("\x1b[0m")[2] == again.rpartition("\x1b[0m")[2], "the seed was given"
        terminal.type(CTRL_D)
        assert terminal.end() == EXIT_DONE
        assert "repeat it" not in terminal.shown


def test_history_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["一", "二"])
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    said: list[str] = []
    (tmp_path / "prompts").mkdir()
    line = PromptLine(tmp_path / "prompts", said.append)
    assert [line.ask(), line.ask()] == ["一", "二"]
    assert [one.rpartition(": ")[0].rpartition(": ")[2] for one in said] == [
        "earlier prompts cannot be read",
        "prompts are not remembered",
    ]


def test_without_readline_texts_are_read_and_a_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["一", " ", "二"])
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    monkeypatch.setitem(sys.modules, "readline", None)
    said: list[str] = []
    line = runpy.run_path(str(prompt_line.__file__))["PromptLine"](tmp_path / "prompts", said.append)
    assert [line.ask(), line.ask()] == ["一", "二"]
    assert said == ["this Python has no readline: a line cannot be edited with the arrow keys, nor found again"]
    assert not (tmp_path / "prompts").exists()


def test_line_that_is_not_text_is_said_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["\udcb1", "一"])
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    said: list[str] = []
    assert PromptLine(tmp_path / "prompts", said.append).ask() == "一"
    assert said == ["that line is not text in the encoding of this terminal; set LANG to it, such as C.UTF-8"]
