"""Test the table of trackers and the group that runs them: a tracker that fails or hangs never affects a run."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job import config, tracking
from job.config import Tracking
from job.errors import UserError
from job.tracking import make_trackers, start_trackers, tracker_group
from job.tracking.tracker import Ending, TrackedRun, Tracker
from job.tracking.tracker_group import TrackerGroup

RUN = TrackedRun("run0id", "a run", 0, {"train": {"seed": 1}})


class Recorder(Tracker):
    """A tracker that keeps every call."""

    description = "in memory"
    how_to_watch = "look at calls"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, run: TrackedRun, report_failure: Any) -> None:
        self.calls.append(("start", run))
        self.report_failure = report_failure

    def log_metrics(self, values: Any, step: int) -> None:
        self.calls.append(("metrics", values, step))

    def log_texts(self, name: str, texts: Any, step: int) -> None:
        self.calls.append(("texts", name, texts, step))

    def log_images(self, name: str, images: Any, step: int) -> None:
        self.calls.append(("images", name, {caption: image.tolist() for caption, image in images.items()}, step))

    def finish(self, ending: Ending) -> None:
        self.calls.append(("finish", ending))


class Failing(Recorder):
    """A tracker that starts, and then raises in every call."""

    def log_metrics(self, values: Any, step: int) -> None:
        raise OSError("broken")

    def log_texts(self, name: str, texts: Any, step: int) -> None:
        raise RuntimeError("broken")

    def finish(self, ending: Ending) -> None:
        raise OSError("broken")


class Hanging(Recorder):
    """A tracker whose method of this name never returns."""

    def __init__(self, method: str, how_to_complete: str = "") -> None:
        super().__init__()
        self.how_to_complete, self.may_return = how_to_complete, threading.Event()
        setattr(self, method, lambda *_, **__: self.may_return.wait())


class NotStarting(Recorder):
    """A tracker that cannot start."""

    def start(self, run: TrackedRun, report_failure: Any) -> None:
        raise OSError("no such service")


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_group, "START_SECONDS", 0.5)
    monkeypatch.setattr(tracker_group, "FINISH_SECONDS", 0.5)


@pytest.fixture
def said() -> list[str]:
    """The lines that a group prints."""
    return []


@pytest.fixture
def hanging() -> Iterator[Any]:
    """Make trackers that hang until the end of the test."""
    made: list[Hanging] = []

    def make(method: str, how_to_complete: str = "") -> Hanging:
        made.append(Hanging(method, how_to_complete))
        return made[-1]

    yield make
    for one in made:
        one.may_return.set()


def track(group: TrackerGroup) -> None:
    """Log a hundred steps and two texts, and finish."""
    for step in range(100):
        group.log_metrics({"train/loss": 1.0}, step)
    group.log_texts("samples", {"prompt": "text"}, 100)
    group.finish(Ending.DONE)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# ---- The table ----


def test_one_table_entry_adds_a_tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]) -> None:
    toys: list[Recorder] = []

    def make_toy(settings: Tracking, log_dir: Path) -> Recorder:
        assert (settings.project, log_dir) == ("project", tmp_path)
        toys.append(Recorder())
        return toys[-1]

    monkeypatch.setitem(tracking.TRACKERS, "toy", make_toy)
    settings = config.load(
        None, [("tracking.to", "[toy]"), ("tracking.project", "project"), ("tracking.log_dir", str(tmp_path))]
    )
    group = start_trackers(make_trackers(settings.tracking), RUN, said.append)
    group.log_metrics({"train/loss": 2.5}, 10)
    group.log_texts("samples", {"北京": "首都"}, 10)
    group.log_images("plots", {"loss": np.zeros((1, 2, 3), np.uint8)}, 10)
    group.finish(Ending.DONE)
    group.finish(Ending.STOPPED)
    assert said == ["tracking: toy, in memory; look at calls"]
    assert toys[0].calls == [
        ("start", replace(RUN, settings={"train.seed": 1})),
        ("metrics", {"train/loss": 2.5}, 10),
        ("texts", "validation/samples", {"北京": "首都"}, 10),
        ("images", "plots", {"loss": [[[0, 0, 0], [0, 0, 0]]]}, 10),
        ("finish", Ending.DONE),
    ]


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("[swanlab, tensorboard]", ["swanlab", "tensorboard"]),
        ("swanlab,tensorboard", ["swanlab", "tensorboard"]),
        ("swanlab, tensorboard", ["swanlab", "tensorboard"]),
        ("tensorboard", ["tensorboard"]),
        ("[]", []),
    ],
)
def test_command_line_names_trackers_as_list_or_with_commas(written: str, names: list[str]) -> None:
    assert config.load(None, [("tracking.to", written)]).tracking.to == names


def test_swanlab_is_the_default_tracker() -> None:
    assert config.load(None).tracking.to == ["swanlab"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tensorbord", "; did you mean tensorboard?"),
        ("SwanLab", "; did you mean swanlab?"),
        ("mlflow", ""),
    ],
)
def test_unknown_tracker_is_refused_with_a_suggestion(name: str, remedy: str) -> None:
    with pytest.raises(UserError) as refused:
        make_trackers(Tracking(to=[name], mode="disabled"))
    assert str(refused.value) == f"tracking.to: '{name}': expected one of swanlab, tensorboard{remedy}"


def test_no_tracker_is_a_valid_choice(said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    track(start_trackers(make_trackers(Tracking(to=[])), RUN, said.append))
    assert said == ["tracking: none (tracking.to is empty); the numbers are in logs/metrics.jsonl of the run"]
    assert not caplog.records


# ---- Failures ----


def test_failing_tracker_costs_one_warning_and_is_counted(said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    good = Recorder()
    track(start_trackers({"bad": Failing(), "good": good}, RUN, said.append))
    (warning,) = warnings(caplog)
    assert warning.startswith("tracking: bad failed, and what it shows may have gaps; the numbers are in logs/metrics")
    assert "broken" in warning
    assert said[-1] == "tracking: bad failed 102 times, and what it shows may have gaps"
    assert len(good.calls) == 103
    assert good.calls[-1] == ("finish", Ending.DONE)


def test_failure_outside_of_a_call_is_reported(said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    group = start_trackers({"toy": recorder}, RUN, said.append)
    recorder.report_failure("lost\nits connection")
    group.finish(Ending.DONE)
    (warning,) = warnings(caplog)
    assert warning.endswith(": lost its connection")


@pytest.mark.parametrize("method", ["log_metrics", "log_texts", "finish"])
def test_hanging_tracker_delays_only_the_end_by_its_deadline(
    method: str, hanging: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    good = Recorder()
    track(start_trackers({"bad": hanging(method), "good": good}, RUN, said.append))
    assert warnings(caplog) == ["tracking: bad has not taken the whole run in time"]
    assert len(good.calls) == 103


def test_unfinished_tracker_names_the_command_for_the_rest(
    hanging: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    track(start_trackers({"bad": hanging("finish", "sync the rest")}, RUN, said.append))
    assert warnings(caplog) == ["tracking: bad has not taken the whole run in time; to add the rest: sync the rest"]


def test_calls_are_dropped_when_a_hanging_tracker_has_too_many(
    hanging: Any, said: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_group, "_LONGEST_QUEUE", 10)
    track(start_trackers({"bad": hanging("log_metrics")}, RUN, said.append))
    (warning,) = warnings(caplog)
    assert "its calls do not return" in warning


@pytest.mark.parametrize("problem", ["raises", "hangs"])
def test_tracker_that_does_not_start_costs_one_warning(
    problem: str, hanging: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = NotStarting() if problem == "raises" else hanging("start"), Recorder()
    track(start_trackers({"bad": bad, "good": good}, RUN, said.append))
    (warning,) = warnings(caplog)
    assert warning.startswith("tracking: bad did not start; the numbers are in logs/metrics.jsonl of the run: ")
    assert ("no such service" if problem == "raises" else "it does not answer") in warning
    assert said == [
        "tracking: bad, in memory; not started; the numbers are in logs/metrics.jsonl of the run",
        "tracking: good, in memory; look at calls",
    ]
    assert len(good.calls) == 103


def test_refused_setting_ends_the_trackers_that_started(said: list[str]) -> None:
    class Refusing(Recorder):
        def start(self, run: TrackedRun, report_failure: Any) -> None:
            raise UserError("run.name", run.name, "not accepted")

    good = Recorder()
    with pytest.raises(UserError, match=r"run\.name"):
        start_trackers({"good": good, "bad": Refusing()}, RUN, said.append)
    assert good.calls[-1] == ("finish", Ending.FAILED)


def test_output_of_a_tracker_is_not_printed(said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    class Talking(Recorder):
        def start(self, run: TrackedRun, report_failure: Any) -> None:
            print("welcome")

    track(start_trackers({"toy": Talking()}, RUN, said.append))
    assert capsys.readouterr().out == ""
