"""Train on two nodes of a real Slurm with a real store: a disturbed run ends with the weights of an undisturbed one.

Each test freezes the run after some steps before it disturbs it, so that the result does not depend on timing.
"""

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil
import pytest
from slurm_cluster import REPOSITORY, SCRIPT, SlurmCluster, await_true
from small_run import DataSet, checkpoint_urls, stored, write_settings

from job.data.tokenizer import store_tokenizer
from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.runs.attempts import Attempts
from job.runs.checkpoint import open_checkpoint
from job.runs.run import read_run
from tests.image.stand_in import FOLDER, export_rootfs

STEPS, FROZEN_AFTER = 200, 20
NewRun = Callable[..., "Run"]
_SECONDS = 540

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@dataclass
class Run:
    """A training run on two nodes, with one process on each."""

    output: str
    settings: Path
    folder: Path
    cluster: SlurmCluster
    variables: dict[str, str] = field(default_factory=dict)
    restarts: int = 0

    @property
    def log(self) -> str:
        """Output of its jobs so far."""
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 by file name for the weights and optimizer state of the last checkpoint."""
        last = open_checkpoint(checkpoint_urls(self.output)[-1])
        assert last.state.step == STEPS
        return {name: file.sha256 for name, file in last.files.items() if "safetensors" in name}

    def submit(self, *options: str, words: tuple[str, ...] = ()) -> str:
        """Submit a job that trains the run, with `options` for sbatch and `words` for the entrypoint; return its id."""
        resources = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder}/log")
        variables = {"PYTHON": sys.executable, "SCRATCH": f"{self.folder}/scratch"} | self.variables
        return self.cluster.submit(
            *resources, f"--chdir={REPOSITORY}", *options, SCRIPT, self.settings, *words, **variables
        )

    @contextmanager
    def frozen(self, job: str, line: str = f"0: step {FROZEN_AFTER}/") -> Iterator[None]:
        """Suspend the workers when the log has a line that begins with `line`, and resume them after the block."""
        await_true(lambda: f"\n{line}" in self.log, line, _SECONDS, lambda: self.log)
        workers = [process for process in psutil.process_iter() if _is_worker(process, job)]
        for worker in workers:
            worker.suspend()
        assert len(workers) == 2
        assert f"step {STEPS}/" not in self.log
        yield
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()

    def await_log(self, line: str) -> None:
        """Wait until the log matches the pattern `line`."""
        await_true(lambda: re.search(line, self.log) is not None, line, _SECONDS, lambda: self.log)

    def await_success(self, job: str) -> int:
        """Wait until the job is done and return the number of its restarts."""
        found = self.cluster.await_end(job, _SECONDS)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), self.log
        return int(found["Restarts"])


def _is_worker(process: psutil.Process, job: str) -> bool:
    with suppress(psutil.Error):
        return "job.launcher.worker" in process.cmdline() and process.environ().get("SLURM_JOB_ID") == job
    return False


@pytest.fixture(scope="module")
def new_run(
    cluster: SlurmCluster, s3_server: S3Server, data_set: DataSet, tmp_path_factory: pytest.TempPathFactory
) -> NewRun:
    """A function that makes a run; its arguments change settings."""

    def make(**changes: Any) -> Run:
        folder, output = tmp_path_factory.mktemp("run"), f"{s3_server.create_bucket(f'run-{token_hex(4)}')}/run"
        changes["train"] = {"processes": 1, "max_steps": STEPS, "epochs": 100}
        return Run(output, write_settings(folder, data_set, output, **changes), folder, cluster)

    return make


@pytest.fixture(scope="module", autouse=True)
def over_the_limit(new_run: NewRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Run]]:
    """A run that is requeued at its time limit. This takes minutes, so it runs beside the other tests."""
    run = new_run(tracking={"mode": "offline", "log_dir": str(tmp_path_factory.mktemp("swanlog"))})
    job = run.submit("--time=2", "--signal=B:USR1@30")

    def wait() -> Run:
        with run.frozen(job):
            run.await_log("warned: the limit is near")
        run.restarts = run.await_success(job)  # A slow machine may reach the limit again.
        return run

    with ThreadPoolExecutor() as pool:
        yield pool.submit(wait)


@pytest.fixture(scope="module")
def undisturbed(new_run: NewRun) -> Run:
    run = new_run()
    assert run.await_success(run.submit()) == 0
    return run


def test_run_uses_zero_2_on_two_nodes(undisturbed: Run) -> None:
    record = read_run(undisturbed.output)
    assert record is not None
    attempt = Attempts(undisturbed.output).newest()
    assert attempt is not None and attempt.choices is not None
    assert (record.config["train"]["strategy"], attempt.choices["strategy"]) == ("auto", "zero2")
    assert open_checkpoint(checkpoint_urls(undisturbed.output)[-1]).state.step == STEPS


def image() -> dict[str, str]:
    """Return the variables that run the job in the image."""
    return {"RUNTIME": "charliecloud", "IMAGE": str(export_rootfs(FOLDER / "rootfs"))}


@pytest.mark.timeout(1200)  # The image may have to be built first.
@pytest.mark.parametrize("variables", [dict, image], ids=["the virtual environment", "the image"])
def test_requeued_run_ends_with_the_same_weights(
    variables: Callable[[], dict[str, str]], new_run: NewRun, undisturbed: Run
) -> None:
    run = new_run()
    run.variables = variables()
    job = run.submit()
    with run.frozen(job):
        run.cluster.run("scontrol", "requeue", job)
        run.await_log("CANCELLED AT .* DUE TO JOB REQUEUE")
    assert run.await_success(job) == 1
    assert "cancelled, requeued or preempted (exit code 75)" in run.log
    assert run.weights == undisturbed.weights


def test_cancelled_run_is_saved_and_continued_by_the_next_job(new_run: NewRun, undisturbed: Run) -> None:
    run = new_run()
    job = run.submit()
    with run.frozen(job):
        run.cluster.run("scancel", job)
        run.await_log("CANCELLED AT")
    found = run.cluster.await_end(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), run.log
    (stopped_at,) = (open_checkpoint(url).state.step for url in checkpoint_urls(run.output))
    assert FROZEN_AFTER <= stopped_at < STEPS
    assert run.await_success(run.submit()) == 0
    assert run.weights == undisturbed.weights


def test_run_survives_the_loss_of_either_node(new_run: NewRun, undisturbed: Run) -> None:
    def lose(node: int, run: Run) -> None:
        with SlurmCluster() as run.cluster:
            job = run.submit()
            with run.frozen(job, f"0: step {FROZEN_AFTER} | saved"):
                run.cluster.kill_node(run.cluster.nodes[node])
            await_true(lambda: run.cluster.show_job(job)["Restarts"] != "0", "a restart", _SECONDS, lambda: run.log)
            run.cluster.start_node(run.cluster.nodes[node])
            assert run.await_success(job) >= 1  # A busy node may answer too late, which restarts the job again.

    runs = [new_run(checkpoint={"every": FROZEN_AFTER}) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lose, range(2), runs))  # At the same time, because both mostly wait.
    assert [run.weights for run in runs] == [undisturbed.weights] * 2


def test_bad_setting_is_refused_by_all_nodes_and_not_retried(new_run: NewRun) -> None:
    run = new_run()
    found = run.cluster.await_end(run.submit(words=("--train.micro_batch_size", "-3")))
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "78:0", "0"), run.log
    assert re.findall(r"^(\d): train\.micro_batch_size: ", run.log, re.MULTILINE) in (["0", "1"], ["1", "0"])


def test_array_prepares_the_same_shards_as_one_process(
    cluster: SlurmCluster, data_set: DataSet, bucket: str, tmp_path: Path
) -> None:
    store_tokenizer(data_set.tokenizer, f"{bucket}/tokenizer")
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", tokenizer={"source": f"{bucket}/tokenizer"})
    recipe = {"source": SAMPLE, "slice_bytes": "32KiB", "validation_fraction": 0.1, "shards": f"{bucket}/shards"}
    words = [word for name, value in recipe.items() for word in (f"--data.{name}", str(value))]
    resources = ("--array=0-3", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/%a")
    array = cluster.submit(
        *(*resources, f"--chdir={REPOSITORY}", SCRIPT, "prepare", settings, *words), PYTHON=sys.executable
    )
    for task in range(4):
        found = cluster.await_end(f"{array}_{task}")
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), (tmp_path / str(task)).read_text()
    array_files, single_files = (
        {url.removeprefix(shards): content for url, content in stored(shards).items()}
        for shards in (f"{bucket}/shards", data_set.shards)
    )
    assert len(array_files) > 8
    assert array_files == single_files


def test_run_at_its_time_limit_is_requeued_and_stays_one_run(over_the_limit: Future[Run], undisturbed: Run) -> None:
    run = over_the_limit.result()
    record = read_run(run.output)
    assert record is not None
    assert run.weights == undisturbed.weights
    assert {open_checkpoint(url).state.run_id for url in checkpoint_urls(run.output)} == {record.id}
    assert run.restarts >= 1
    starts = sorted(Path(record.config["tracking"]["log_dir"]).glob("run-*"))
    assert [start.name.rpartition("-")[2] for start in starts] == [record.id] * (run.restarts + 1)
