"""`generate`: where its prompts come from, how it shows them, and which texts can be made again."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from export_cases import CONTEXT_LENGTH, SMALL, export_kind

from job import config as settings
from job.cli import main
from job.commands import generate
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from job.runs.load_model import load_model
from job.training.setup import sampling_of
from job.trying.prompt_sources import find_prompts

PROMPT = "北京"
OF_SETTINGS = ["牛顿"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a new model, whose texts are nonsense."""
    return str(export_kind("trained here", tmp_path_factory.mktemp("model"), SMALL).folder)


def texts_of(model: str, capsys: pytest.CaptureFixture[str], *prompts: str, **changes: object) -> tuple[str, str]:
    """Return what `generate` prints to standard output and to standard error."""
    overrides = [("generate.model", model), ("generate.max_new_tokens", "12")]
    overrides += [(f"generate.{name}", str(value)) for name, value in changes.items()]
    assert generate(settings.load(None, overrides), prompts or [PROMPT]) == EXIT_DONE
    shown = capsys.readouterr()
    return shown.out, shown.err


@contextmanager
def standard_input(content: bytes) -> Iterator[None]:
    """Give this process a pipe with this content as standard input."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    before = sys.stdin
    with os.fdopen(reader) as sys.stdin:
        yield
    sys.stdin = before


# ---- Seeds and samples ----


def test_each_call_gives_another_text_unless_a_seed_is_given(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len({texts_of(model, capsys)[0] for _ in range(3)}) == 3
    assert len({texts_of(model, capsys, seed=5)[0] for _ in range(3)}) == 1


def test_printed_seed_gives_the_same_texts_again(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = texts_of(model, capsys, PROMPT, "牛顿", samples=2)
    (seed,) = re.findall(r"^seed (\d+): repeat it with --generate\.seed \1$", err, re.M)
    assert texts_of(model, capsys, PROMPT, "牛顿", samples=2, seed=seed)[0] == out


def test_samples_are_different_texts_of_the_same_prompt(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = texts_of(model, capsys, samples=3, seed=1)
    beginnings = re.findall(rf"^\[{PROMPT}\](.*)", out, re.M)
    assert len(beginnings) == len(set(beginnings)) == 3


def test_samples_at_temperature_0_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = r"^generate\.samples: 3: with generate\.temperature 0, all continuations of a prompt are equal; "
    with pytest.raises(UserError, match=said):
        texts_of(model, capsys, samples=3, temperature=0)
    assert "seed" not in texts_of(model, capsys, temperature=0)[1]


def test_samples_of_training_have_the_same_seed_each_time() -> None:
    assert sampling_of(settings.load(None)) == sampling_of(settings.load(None))
    assert sampling_of(settings.load(None, [("generate.seed", "9")])).seed == 9


# ---- What is shown ----


def test_output_has_texts_only_and_notes_go_to_standard_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = texts_of(model, capsys, "一", "二", samples=2, seed=1)
    assert err == f"model: {model}\nthis is a base model: it continues texts; it does not answer questions or chat\n"
    assert re.fullmatch(r"(\[一\].*\n\n){2}\[二\].*\n\n\[二\].*\n", out, re.S)
    assert "\x1b" not in out


def test_long_prompt_leaves_room_and_a_note_says_so(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = texts_of(model, capsys, "北京市" * 100, seed=1)
    assert f"the model sees {CONTEXT_LENGTH}, of which the continuation gets 12: only the last 36 are read" in err
    assert len(out.partition("]")[2]) > 2
    assert "tokens" not in texts_of(model, capsys, PROMPT, seed=1)[1]


def test_continuation_shorter_than_asked_for_is_said_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = re.compile(
        r"^the continuation gets at most (\d+) of the 1,000 tokens asked for .*: the model sees 48,", re.M
    )
    _, err = texts_of(model, capsys, "一", "二", samples=2, seed=1, max_new_tokens=1000)
    (most,) = said.findall(err)
    prompt_tokens = len(load_model(model, "generate.model", Path(model)).tokenizer.encode(["一"])[0])
    assert int(most) == CONTEXT_LENGTH - prompt_tokens - 1, "an end-of-document token is before the prompt"
    _, err = texts_of(model, capsys, "北京市" * 100, seed=1, max_new_tokens=1000)
    assert said.findall(err) == ["24"], "a long prompt leaves half of the context"
    assert "asked for" not in texts_of(model, capsys, "一", seed=1, max_new_tokens=most)[1]


# ---- Where the prompts come from ----


def found(*words: str) -> tuple[list[str] | None, list[str]]:
    """Return the prompts, and the lines about them."""
    said: list[str] = []
    return find_prompts(words, OF_SETTINGS, said.append), said


def test_words_come_before_standard_input_and_settings() -> None:
    with standard_input("管道".encode()):
        assert found("一", "二") == (["一", "二"], [])


def test_text_of_a_pipe_is_one_prompt_with_all_its_lines() -> None:
    for words in ([], ["-"]):
        for text in ("第一行\n第二行\n", "\ufeff第一行\n第二行\r\n", "第一行\n第二行"):
            with standard_input(text.encode()):
                assert found(*words) == (["第一行\n第二行"], ["reading the prompt from standard input"])
    with standard_input("中".encode()):
        assert found("一", "-", "二")[0] == ["一", "中", "二"]


def test_empty_pipe_leaves_the_prompts_of_the_settings() -> None:
    with standard_input(b"\n"):
        assert found() == (
            OF_SETTINGS,
            ["reading the prompt from standard input", "standard input is empty, so generate.prompts are continued"],
        )
    with Path(os.devnull).open() as nothing, pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdin", nothing)
        assert found() == (OF_SETTINGS, [])
        patched.setattr(sys, "stdin", None)
        assert found() == (OF_SETTINGS, [])


@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        (["-"], b"", r"^standard input: is empty; give it a text"),
        ([], "北京".encode("gb18030"), r"^standard input: is not UTF-8: byte 0xb1 at position 0; convert it"),
        (["-"], b"ab\xff", r"^standard input: is not UTF-8: byte 0xff at position 2; convert it"),
        (["-", "-"], b"a", r"^command line: '-': is given twice"),
    ],
)
def test_wrong_standard_input_gives_one_line(words: list[str], content: bytes, said: str) -> None:
    with standard_input(content), pytest.raises(UserError, match=said) as caught:
        found(*words)
    assert "\n" not in str(caught.value)


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as closed:
        pass
    for nothing in (None, closed):
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UserError, match=r"^standard input: is closed; give the prompt on the command line"):
            found("-")


def test_endless_standard_input_is_refused() -> None:
    with Path("/dev/zero").open() as endless, pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdin", endless)
        with pytest.raises(UserError, match=r"^standard input: is longer than 16 MiB; a model continues the end"):
            found("-")


def test_mistake_in_standard_input_is_found_before_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with standard_input(b"\xb1\xb1"):
        assert main(["generate", "--generate.model", "nowhere"]) == EXIT_REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("standard input: is not UTF-8: byte 0xb1")
