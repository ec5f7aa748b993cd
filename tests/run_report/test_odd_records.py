"""Reports on runs with very many attempts, and on records that are valid but hold odd values."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from stored_run import BEGAN, STEPS, edit_attempts, edit_rows, write_run

from job.run_report.line_chart import Line, line_chart
from job.run_report.run_facts import read_facts
from job.run_report.translations import translated
from job.run_report.wording import Both, same
from job.run_report.write_report import make_report

ATTEMPTS = 3000


def test_thousands_of_attempts_make_a_small_report_that_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = json.loads((tmp_path / "run" / "attempts" / "00000001.json").read_text())
    for number in range(1, ATTEMPTS + 1):
        began, ended = (datetime.fromtimestamp(BEGAN + 3600 * hours, UTC) for hours in (number, number + 0.8))
        times = {"number": number, "began": began.isoformat(), "ended_at": ended.isoformat()}
        outcome = {"ended": "failed" if number == 7 else "stopped"}
        change = {"changed": {"train.max_time": [f"{number}s", f"{number + 1}s"]}}
        path = tmp_path / "run" / "attempts" / f"{number:08d}.json"
        path.write_text(json.dumps(first | times | outcome | change))
    report = make_report([run])
    assert len(report.html.encode()) < 2**20
    assert all(len(text.encode()) < 60_000 for text in report.markdown.values())
    text = report.markdown["en"]
    assert "The first and the last of 3,000 attempts; 2,960 are left out." in text
    assert "The first and the last of 2,999 changes between attempts; 2,959 are left out." in text
    assert text.count("Changed at attempt ") == 40
    assert r"Changed at attempt 3000: train.max\_time: 3000s → 3001s" in text
    assert "attempts on the clock, up to 15 in a bar, which hides the pauses between them" in report.html
    assert report.html.count('<rect class="bar ') == 200
    assert "attempt 1–15: from 2025-11-24 17:00:00Z, 12.00 h, 14 x stopped on request, 1 x failed" in report.html


@pytest.mark.parametrize("data", [None, "x", 5, []])
def test_section_of_settings_that_is_none_is_reported(data: object, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit_attempts(run, lambda record: record["config"].update(data=data, tokenizer=data, model=data))
    whole = write_run(tmp_path / "whole", name="whole")
    assert "| optimizer steps | 1,500 |" in make_report([run]).markdown["en"]
    for runs in ([run, whole], [whole, run]):
        assert "| optimizer steps | 1,500 | 1,500 |" in make_report(runs).markdown["en"]


def test_change_without_two_values_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit_attempts(run, lambda record: record.update(changed={"train.epochs": [1], "train.seed": [1, 2]}))
    text = make_report([run]).markdown["en"]
    assert "train.seed: 1 → 2" in text and "Changed at attempt 2: train.epochs" not in text


@pytest.mark.parametrize("step", [10**400, 2**53 + 1, -1], ids=["huge", "inexact", "negative"])
def test_step_that_no_run_reaches_is_a_damaged_line(step: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit_rows(run, lambda row: row.update(step=step) if row["step"] == 3 else None)
    assert len(read_facts(run).rows) == STEPS - 1
    page = make_report([run]).html
    assert "1 damaged lines of logs/metrics.jsonl are left out, first line 3: step: it is not from 0 to " in page


@pytest.mark.parametrize("line", ["5", "[]", '{"step": true}', '{"step": 1.0}', "{}", "deep"])
def test_line_that_is_no_row_is_damaged(line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = tmp_path / "run" / "logs" / "metrics.jsonl"
    path.write_text(f"{'[' * 100_000 if line == 'deep' else line}\n{path.read_text()}")
    (said,) = (words.en for words in read_facts(run).missing if "damaged" in words.en)
    assert said.startswith("1 damaged lines of logs/metrics.jsonl are left out, first line 1: ") and len(said) < 200


def test_blank_lines_are_not_damaged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = tmp_path / "run" / "logs" / "metrics.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n \n"))
    facts = read_facts(run)
    assert len(facts.rows) == STEPS
    assert not any("damaged" in said.en for said in facts.missing)


def test_numbers_near_zero_are_left_out_of_a_logarithmic_axis(tmp_path: Path) -> None:
    points = [(1.0, 5e-324), (2.0, 1.0), (3.0, 10.0)]
    chart = line_chart([Line(points, 0, name="a")], same("x"), same("y"), is_log=True)
    assert chart == line_chart([Line(points[1:], 0, name="a")], same("x"), same("y"), is_log=True)
    run = write_run(tmp_path / "run")
    edit_rows(run, lambda row: row.update({"train/gradient_norm": 5e-324 * row["step"]}))
    assert "train/loss" in make_report([run]).html


def test_reports_of_a_run_without_attempts_have_no_time_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "attempts")
    assert '<rect class="bar ' not in make_report([run]).html


def test_long_prompts_and_values_are_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    samples = {f"{letter}{'长' * 200_000}": "x" for letter in "abcdef"}
    edit_rows(run, lambda row: row["step"] % 500 or row.update(samples=samples))
    assert len(make_report([run]).html.encode()) < 2**20


REASONS: list[tuple[str, Any]] = [
    ("/a exists (train.stop_file); as long as it does, every start stops", "/a 存在（train.stop_file）；只要它存在，"),
    ("train.max_time is 3h50m, and 12 s of it are for the last checkpoint", "train.max_time 为 3h50m，其中 12 秒"),
    ("the job's limit is 04:00:00 PM, and 12 s of it are for the last checkpoint", "作业的时限为 04:00:00 PM，"),
    ("2 x NVIDIA H200, machines: 2", "2 x NVIDIA H200，机器数：2"),
]


@pytest.mark.parametrize(("english", "chinese"), REASONS)
def test_recorded_texts_have_a_translation(english: str, chinese: str) -> None:
    both = translated(english)
    assert isinstance(both, Both)
    assert both.en == english and both.zh.startswith(chinese)
    assert translated("something else") == "something else"
