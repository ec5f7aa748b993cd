"""Test what reaches SwanLab: its reader for `swanlab sync` gets every number, in groups of charts, and how it ended."""

import ast
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import ALONE, REPOSITORY, DataSet, run, write_settings
from swanlab import Settings
from swanlab.proto.swanlab.grpc.core.v1.sync_pb2 import DeliverSyncStartRequest
from swanlab.proto.swanlab.metric.data.v1.data_pb2 import ScalarRecord
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
from swanlab.sdk.internal.core_python import sync
from tracked_run import begin, end

from job.data.order import SequenceOrder
from job.errors import EXIT_DONE
from job.runs.metrics_file import read_metrics
from job.runs.run import new_run_id
from job.tracking import start_trackers
from job.tracking import swanlab as swanlab_tracker
from job.tracking.shown_names import GROUPS, SHOWN_NAMES, TOKENS_SEEN, shown_name
from job.tracking.swanlab import SwanLab
from job.tracking.tracker import Ending, TrackedRun

FLUSHED_SECONDS = 60


class Cloud:
    """A stand-in for the part of `swanlab sync` that talks to the cloud; everything that it is given is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: list[Record] = []
        self.states: list[str] = []
        self._has_experiment = False
        monkeypatch.setattr(sync, "prepare_experiment_start", self._prepare)
        monkeypatch.setattr(sync, "generate_run_online_path", lambda prepared: "/me/WikiLLM/run")
        monkeypatch.setattr(sync, "get_experiment_summary", self._summary)
        monkeypatch.setattr(sync, "Transport", lambda *_, **__: self)
        monkeypatch.setattr(sync, "stop_experiment", self._stop)

    def take(self, folder: Path) -> None:
        """Sync a folder as `swanlab sync` does."""
        core = sync.CoreSyncPython()
        settings = Settings().to_core_proto("id", folder)
        started = core.deliver_sync_start(DeliverSyncStartRequest(core_settings=settings, id="id"))
        assert started.success, started.message
        assert core.deliver_sync_flush().success
        assert core.confirm_sync_finish().success

    def points(self, name: str) -> dict[int, float]:
        """Return the numbers of a chart by their steps."""
        found = [scalar for scalar in self.scalars() if scalar.key == name]
        assert len({scalar.step for scalar in found}) == len(found), "a step is there twice"
        return {scalar.step: scalar.value.number for scalar in found}

    def scalars(self) -> list[ScalarRecord]:
        return [record.scalar for record in self.records if record.HasField("scalar")]

    def charts(self) -> dict[str, Any]:
        """Return the charts that were made, by their names."""
        columns = [record.column for record in self.records if record.HasField("column")]
        return {column.column_key: column for column in columns if not column.column_key.startswith("__swanlab__")}

    def errors(self) -> list[str]:
        """Return the lines that SwanLab shows as errors."""
        return [record.log.line for record in self.records if record.HasField("log")]

    # ---- In place of the network ----

    def _prepare(self, start: Any) -> Any:
        is_new, self._has_experiment = not self._has_experiment, True
        self.begun_with = start
        return SimpleNamespace(
            username="me",
            project="WikiLLM",
            project_data={"cuid": "p"},
            experiment={"cuid": "e", "createdAt": "2026-01-01T00:00:00Z"},
            new_experiment=is_new,
        )

    def _summary(self, *_: Any, **__: Any) -> Any:
        steps: dict[str, int] = {}
        for scalar in self.scalars():
            steps[scalar.key] = max(scalar.step, steps.get(scalar.key, 0))
        return {"scalar": [{"key": key, "step": step} for key, step in steps.items()]}

    def _stop(self, *_: Any, state: Any, **__: Any) -> None:
        self.states.append(RunState.Name(state))

    def start(self) -> None:
        """Stand for the transport's thread."""

    def put(self, records: list[Record]) -> None:
        self.records += records

    def request_finish(self) -> None:
        """Stand for the end of the transport."""

    def finish(self, timeout: float | None) -> bool:
        return True


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    return Cloud(monkeypatch)


def folders(log_dir: Path) -> list[Path]:
    return sorted(log_dir.glob("run-*"))


# ---- Whole, also after a kill ----


def test_killed_and_resumed_run_is_whole_after_a_sync(tmp_path: Path, cloud: Cloud) -> None:
    run_id = new_run_id()
    quiet = {"SWANLAB_PROBE_MONITOR": "false"}  # its own numbers would soon fill the buffer that a kill loses
    process = begin(tmp_path, quiet, mode="offline", run_id=run_id, waits=True)
    (killed,) = wait_for_folder(tmp_path / "swanlog")
    deadline = time.monotonic() + FLUSHED_SECONDS
    while b"validation/samples" not in next(killed.glob("*.swanlab")).read_bytes():
        assert time.monotonic() < deadline, "the last numbers are not on the disk"
        time.sleep(0.2)
    process.kill()
    process.communicate()
    end(begin(tmp_path, {}, mode="offline", run_id=run_id, first_step=8, attempt=2))
    for folder in folders(tmp_path / "swanlog"):
        cloud.take(folder)
    assert cloud.points("train/loss") == pytest.approx({step: 5 - step / 10 for step in range(18)})
    assert cloud.points(TOKENS_SEEN) == {step: 4096.0 * step for step in range(18)}
    assert cloud.states[-1] == "RUN_STATE_FINISHED"
    assert list(cloud.begun_with.tags) == ["attempt 2"]
    assert cloud.begun_with.description == "attempt 2, continued after step 8"


def wait_for_folder(log_dir: Path) -> list[Path]:
    deadline = time.monotonic() + FLUSHED_SECONDS
    while not list(log_dir.glob("run-*/*.swanlab")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return folders(log_dir)


# ---- How it ended ----


@pytest.mark.parametrize(
    ("ending", "state", "errors"),
    [
        (Ending.DONE, "RUN_STATE_FINISHED", 0),
        (Ending.STOPPED, "RUN_STATE_ABORTED", 1),
        (Ending.FAILED, "RUN_STATE_CRASHED", 1),
        (Ending.SUPERSEDED, "RUN_STATE_ABORTED", 1),
    ],
)
def test_synced_run_shows_how_it_ended(ending: Ending, state: str, errors: int, tmp_path: Path, cloud: Cloud) -> None:
    tracker = SwanLab("offline", "the test's reason", "WikiLLM", None, tmp_path)
    group = start_trackers({"swanlab": tracker}, TrackedRun(new_run_id(), "a run", 0, {}), lambda line: None)
    group.finish(ending)
    cloud.take(folders(tmp_path)[0])
    assert cloud.states == [state]
    assert cloud.errors() == [ending.value] * errors


@pytest.mark.parametrize(
    ("mode", "ending", "called"),
    [
        ("cloud", Ending.STOPPED, [("aborted", Ending.STOPPED.value)]),
        ("cloud", Ending.SUPERSEDED, []),  # the newer attempt would be shown as ended
        ("local", Ending.STOPPED, [("aborted", None)]),  # with an error text, the dashboard shows it as crashed
        ("local", Ending.FAILED, [("crashed", Ending.FAILED.value)]),
    ],
)
def test_cloud_and_dashboard_are_told_how_it_ended(
    mode: Any, ending: Ending, called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    one_run = SimpleNamespace(
        mode={"cloud": "online"}.get(mode, mode),
        finish=lambda state, error: ended.append((state, error)),
        _handle_atexit=None,
        _core=SimpleNamespace(_store=None),
    )
    library = SimpleNamespace(has_run=lambda: True, get_run=lambda: one_run)
    monkeypatch.setattr(swanlab_tracker, "_swanlab", lambda: library)
    SwanLab(mode, "the test's reason", "WikiLLM", None, Path()).finish(ending)
    assert ended == called


def test_own_tags_and_description_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: Cloud) -> None:
    monkeypatch.setenv("SWANLAB_TAGS", "mine")
    monkeypatch.setenv("SWANLAB_DESCRIPTION", "my words")
    tracker = SwanLab("offline", "the test's reason", "WikiLLM", None, tmp_path)
    tracked_run = TrackedRun(new_run_id(), "a run", 500, {}, attempt=3)
    start_trackers({"swanlab": tracker}, tracked_run, lambda line: None).finish(Ending.DONE)
    cloud.take(folders(tmp_path)[0])
    assert (list(cloud.begun_with.tags), cloud.begun_with.description) == (["mine", "attempt 3"], "my words")


def test_number_without_tokens_is_not_lost(tmp_path: Path, cloud: Cloud) -> None:
    tracker = SwanLab("offline", "the test's reason", "WikiLLM", None, tmp_path)
    tracked_run = TrackedRun(new_run_id(), "a run", 0, {})
    group = start_trackers({"swanlab": tracker}, tracked_run, lambda line: None)
    for step in (1, 2, 3):
        group.log_metrics({"train/loss": 5.0 - step}, step)
    group.finish(Ending.DONE)
    cloud.take(folders(tmp_path)[0])
    assert cloud.points("train/loss") == {1: 4.0, 2: 3.0, 3: 2.0}


# ---- A real run: names, axes, settings, its last batch ----


@pytest.fixture(scope="module")
def short_run(data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with few steps and a partial last batch; its log, its metrics, its size and SwanLab's folder."""
    folder = tmp_path_factory.mktemp("short")
    shards = data_set.manifest.train
    sequences = SequenceOrder(
        [shard.tokens for shard in shards], [shard.size for shard in shards], 32, seed=2333, buffer_bytes=2**30
    ).sequences_per_epoch
    batch = sequences // 8 // 2 * 2 + 4
    train = ALONE | {"max_steps": None, "epochs": 1, "log_every": 10}
    train |= {"global_batch_size": batch, "micro_batch_size": batch}
    path = write_settings(
        folder, data_set, str(folder / "run"), train=train, tracking={"mode": "offline", "log_dir": str(folder / "log")}
    )
    code, out, err = run("train", path)
    assert (code, err) == (EXIT_DONE, ""), out + err
    (swanlab_folder,) = folders(folder / "log")
    steps, rest = divmod(sequences, batch)
    assert rest, "the last batch is not partial"
    return SimpleNamespace(
        out=out, rows=read_metrics(str(folder / "run")), folder=swanlab_folder, steps=steps + 1, rest=rest, batch=batch
    )


def test_run_with_few_steps_shows_each_of_them(short_run: SimpleNamespace) -> None:
    lines = re.findall(rf"^step (\d+)/{short_run.steps} \| loss", short_run.out, re.MULTILINE)
    assert lines == [str(step) for step in range(1, short_run.steps + 1)]


def test_partial_last_batch_is_named_and_is_no_jump_in_the_norm(short_run: SimpleNamespace, cloud: Cloud) -> None:
    last = rf"^step {short_run.steps}/{short_run.steps} \| loss .* \| {short_run.rest} of {short_run.batch} sequences$"
    assert re.search(last, short_run.out, re.MULTILINE)
    cloud.take(short_run.folder)
    assert list(cloud.points("train/loss")) == list(range(1, short_run.steps + 1))
    assert list(cloud.points("train/gradient_norm")) == list(range(1, short_run.steps))
    assert all("train/gradient_norm" in row for row in short_run.rows)


def test_charts_are_in_groups_with_tokens_as_axis_of_loss(short_run: SimpleNamespace, cloud: Cloud) -> None:
    cloud.take(short_run.folder)
    charts = cloud.charts()
    assert {chart.section_name for chart in charts.values()} == set(GROUPS)
    assert all(chart.section_name == name.partition("/")[0] for name, chart in charts.items())
    by_tokens = {name for name, chart in charts.items() if chart.x_axis == TOKENS_SEEN}
    assert by_tokens == {name for name in charts if re.match("(train|validation)/(?!samples)", name)}
    for name in ("train/loss", "validation/loss"):
        assert cloud.points(name).keys() <= cloud.points(TOKENS_SEEN).keys(), "a point has no place on the axis"
    assert {shown_name(name) for row in short_run.rows for name in row if "/" in name} <= charts.keys()


def test_settings_are_flat_and_come_with_facts(short_run: SimpleNamespace) -> None:
    config = (short_run.folder / "files" / "config.yaml").read_text(encoding="utf-8")
    names = re.findall(r"^([\w.]+):", config, re.MULTILINE)
    assert {"train.learning_rate", "choices.precision", "parameters.total", "data_set.training_tokens",
            "data_set.validation_tokens", "version", "attempt.number", "attempt.from_step"} <= set(names)  # fmt: skip
    assert "value: {" not in config and not re.search(r"value:\n +\w+:", config), "a value is a dict"


def test_every_metric_of_the_program_has_a_shown_name() -> None:
    logged = {
        node.value
        for wing in ("training", "runs")
        for path in (REPOSITORY / "job" / wing).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"(train|validation|speed|memory|data|checkpoint)/[a-z_]+", node.value)
    }
    assert logged <= SHOWN_NAMES.keys()
    assert {name.partition("/")[0] for name in SHOWN_NAMES.values()} == set(GROUPS)
    assert len(set(SHOWN_NAMES.values())) == len(SHOWN_NAMES)
