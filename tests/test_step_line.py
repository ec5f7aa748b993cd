"""Test what a person reads in the terminal: the line of a step, and samples apart from their prompts."""

import os
import pty
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len
from small_run import REPOSITORY

from job.report import Report
from job.step_line import COLUMNS, short_number, short_time, step_line

VALUES = {
    "train/loss": 2.87341,
    "train/gradient_norm": 0.7312,
    "train/learning_rate": 3e-4,
    "train/skipped_steps": 0,
    "speed/tokens_per_second": 1_234_567.8,
    "speed/mfu": 0.382,
    "speed/data_wait": 0.004,
    "speed/stall": 0.0,
    "memory/peak_gib": 71.3,
}
"""Metrics of a step of a run on GPUs."""
DAY, HOUR, MINUTE = 86400, 3600, 60


# ---- The line of a step ----


@pytest.mark.parametrize("norm", [0.0312, 0.7312, 12.34, 123.4])
@pytest.mark.parametrize("seconds_to_save", [9, 45 * MINUTE, 3 * HOUR])
@pytest.mark.parametrize("seconds_left", [1, 99 * MINUTE, 11 * HOUR, 40 * DAY])
@pytest.mark.parametrize(("step", "steps"), [(1, 8), (10, 565), (3516, 3516), (123_456, 3_516_000)])
def test_line_fits_80_columns(step: int, steps: int, seconds_left: float, seconds_to_save: float, norm: float) -> None:
    line = step_line(step, steps, VALUES | {"train/gradient_norm": norm}, seconds_left, seconds_to_save)
    assert len(line) <= COLUMNS, line


def test_line_has_loss_norm_speed_end_and_next_checkpoint() -> None:
    line = step_line(123_456, 3_516_000, VALUES, seconds_left=10.2 * DAY, seconds_to_save=12 * MINUTE)
    assert line == "step 123456/3516000 | loss 2.8734 | norm 0.73 | 1.2M tok/s | ETA 10d, save 12m"


def test_last_checkpoint_has_no_time_of_its_own() -> None:
    assert step_line(9, 10, VALUES, seconds_left=20, seconds_to_save=400).endswith("| ETA 20s")


def test_wide_terminal_also_shows_mfu_rate_and_memory() -> None:
    line = step_line(500, 3516, VALUES, 2.4 * HOUR, 200, columns=120)
    assert "| 1.2M tok/s | MFU 38% | lr 3.00e-04 | 71.3 GiB | ETA 2.4h, save 3m" in line


def test_same_numbers_are_in_all_lines_of_a_run() -> None:
    def numbers(step: int) -> list[str]:
        return re.findall("MFU|lr|GiB", step_line(step, 3_516_000, VALUES, 1000, 10, columns=100))

    assert numbers(1) == numbers(3_516_000) == ["MFU"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"speed/data_wait": 0.019}, ""),
        ({"speed/data_wait": 0.125}, " | data wait 12.5%"),
        ({"speed/stall": 0.3}, " | stall 30.0%"),
        ({"train/skipped_steps": 2}, " | skipped 2"),
    ],
)
def test_what_does_not_fit_is_shown_when_it_matters(value: dict[str, float], shown: str) -> None:
    assert step_line(10, 565, VALUES | value, 45, 12).partition("save 12s")[2] == shown


def test_numbers_that_are_not_finite_are_said() -> None:
    missing = {name: value for name, value in VALUES.items() if name not in ("train/loss", "train/gradient_norm")}
    assert step_line(10, 565, missing, 45, 12).startswith("step 10/565 | loss nan | norm inf |")


def test_numbers_and_times_are_short() -> None:
    numbers = [0.4, 4681, 9999, 10_153, 45_400, 999_900, 1_234_567, 2.5e9]
    assert [short_number(number) for number in numbers] == [
        "0", "4,681", "9,999", "10.2k", "45.4k", "999.9k", "1.2M", "2.5G"
    ]  # fmt: skip
    times = [-1, 0, 45, 99, 100, 12 * MINUTE, 2.4 * HOUR, 47 * HOUR, 10.2 * DAY, 400 * DAY]
    assert [short_time(seconds) for seconds in times] == [
        "0s", "0s", "45s", "99s", "2m", "12m", "2.4h", "47h", "10d", "400d"
    ]  # fmt: skip


# ---- Samples ----

PROMPT = "人工智能"
TEXT = "是計算機科學的一個分支，AI (artificial intelligence) 研究如何讓機器像人一樣思考。" * 3


def on_terminal(columns: int, program: str) -> str:
    """Return what a program prints on a terminal with so many columns."""
    main, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, stdout=terminal, stdin=subprocess.DEVNULL
    )
    os.close(terminal)
    printed = b""
    try:
        while piece := os.read(main, 4096):
            printed += piece
    except OSError:  # Linux reports the end of a terminal as an error.
        pass
    os.close(main)
    assert process.wait() == 0
    return printed.decode().replace("\r\n", "\n")


def test_terminal_sets_samples_off_and_wraps_chinese_at_any_width() -> None:
    program = "from job.report import Report\nfrom rich.console import Console\n"
    program += "for width in range(8, 121):\n"
    program += "    report = Report(); report._console.width = width\n"
    program += f"    print(f'width {{width}}'); report.sample({PROMPT!r}, {TEXT!r})"
    blocks = re.split(r"width (\d+)\n", on_terminal(80, program))[1:]
    widths, printed = blocks[::2], blocks[1::2]
    assert [int(width) for width in widths] == list(range(8, 121))
    for width, block in zip(map(int, widths), printed, strict=True):
        plain = re.sub(r"\x1b\[[\d;]*m", "", block)
        prompt, *lines = plain.splitlines()
        assert block.startswith("\x1b[1m人"), "the prompt is bold"
        assert prompt.rstrip() == PROMPT
        assert all(line.startswith("    ") for line in lines)
        assert max(map(cell_len, lines)) <= width
        assert "".join(lines).replace(" ", "") == TEXT.replace(" ", ""), "no character is lost"


def test_log_has_one_line_for_each_sample(capsys: pytest.CaptureFixture[str]) -> None:
    Report().sample(PROMPT, f"第一行\n{TEXT * 10}")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("    人工智能 → 第一行 是計算機")
