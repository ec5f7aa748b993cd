"""A run that is killed many times gives the results of an undisturbed run, and leaves no processes or files behind.

`make chaos` runs these tests. RUNS is the number of kills, SEED the seed of their random choice.
"""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from chaos import DRIZZLE, Chaos, plan
from chaos_start import EXTENSIONS, processes_of
from fault_proxy import FaultProxy
from small_run import DataSet, Job, checkpoint_urls, stored, write_settings

from job import storage
from job.demo.server import S3Server
from job.errors import EXIT_DONE
from job.runs.attempts import Attempts
from job.runs.checkpoint import checkpoints_url, open_checkpoint
from job.runs.metrics_file import read_metrics
from job.runs.run import read_run

RUNS, SEED = int(os.environ.get("RUNS", "25")), int(os.environ.get("SEED", "2333"))
STEPS = 100 + 8 * RUNS
EVALUATE_EVERY = 20
BUCKET = "chaos"
_LONGEST_SECONDS = 3600

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]


def settings_of(folder: Path, data: DataSet, output: str) -> Path:
    """Write settings of a run with two million parameters, so that checkpoints are uploaded in several parts."""
    return write_settings(
        folder,
        data,
        output,
        model={"hidden_size": 256, "intermediate_size": 1024},
        train={
            "max_steps": STEPS,
            "epochs": 1000,
            "learning_rate": 2e-3,
            "max_attempts_without_progress": 100,
            "hang_timeout": "2m",
        },
        checkpoint={"every": 5, "keep": 4},
        evaluate={"every": EVALUATE_EVERY, "max_windows": 64},
        generate={"prompts": ["人工智能", "牛顿"], "max_new_tokens": 8},
        store={"read_timeout_seconds": 3, "deadline_seconds": 60},
    )


@pytest.fixture(scope="module")
def undisturbed(s3_server: S3Server, data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output of an undisturbed run with the same settings."""
    output = f"{s3_server.create_bucket('undisturbed')}/run"
    with Job("train", settings_of(tmp_path_factory.mktemp("undisturbed"), data_set, output)) as job:
        code, out, err = job.end(seconds=_LONGEST_SECONDS)
    assert (code, err) == (EXIT_DONE, ""), out + err
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local folder of the run that is killed."""
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def killed(s3_server: S3Server, data_set: DataSet, undisturbed: str, folder: Path) -> str:
    """Output of the run that was killed many times."""
    output = f"{s3_server.create_bucket(BUCKET)}/run"
    (folder / "tmp").mkdir()
    with FaultProxy(s3_server.endpoint_url, SEED, DRIZZLE) as proxy:
        settings = settings_of(folder, data_set, output)
        chaos = Chaos(output, settings, EVALUATE_EVERY, plan(RUNS, SEED), s3_server, proxy, folder / "tmp")
        print(f"\n{RUNS} kills with seed {SEED} in a run of {STEPS} steps", flush=True)
        chaos.run()
    print(f"\n{chaos.table()}\n", flush=True)
    assert chaos.survivors == []
    return output


def test_weights_and_moments_equal_an_undisturbed_run(killed: str, undisturbed: str) -> None:
    ends = [open_checkpoint(checkpoint_urls(output)[-1]) for output in (killed, undisturbed)]
    assert [end.state.step for end in ends] == [STEPS, STEPS]
    sums = [{name: file.sha256 for name, file in end.files.items() if "safetensors" in name} for end in ends]
    assert len(sums[0]) == 3
    assert sums[0] == sums[1]


def test_exported_model_equals_an_undisturbed_run(killed: str, undisturbed: str) -> None:
    def exported(output: str) -> dict[str, str]:
        files = stored(f"{output}/final")
        # The model card tells the hours and the attempts of its run.
        files = {url: content for url, content in files.items() if not url.endswith("/README.md")}
        return {url.removeprefix(output): hashlib.sha256(content).hexdigest() for url, content in files.items()}

    assert "/final/model.safetensors" in exported(killed)
    assert exported(killed) == exported(undisturbed)


def test_logged_steps_equal_an_undisturbed_run(killed: str, undisturbed: str) -> None:
    def measured(output: str) -> list[dict[str, Any]]:
        """Return the logged metrics except those that depend on time, memory and the number of attempts."""
        rows, others = read_metrics(output), ("speed/", "memory/", "time", "attempt")
        return [{name: row[name] for name in row if not name.startswith(others)} for row in rows]

    rows = measured(killed)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"train/loss", "train/gradient_norm", "train/learning_rate", "train/tokens_seen"} <= rows[0].keys()
    evaluated = [*range(EVALUATE_EVERY, STEPS, EVALUATE_EVERY), STEPS]
    assert [row["step"] for row in rows if "validation/loss" in row] == evaluated
    assert rows == measured(undisturbed)


def test_all_attempts_belong_to_one_run(killed: str) -> None:
    record, attempts = read_run(killed), Attempts(killed)
    found = [attempts.read(number) for number in attempts.numbers()]
    assert record is not None
    assert {one.run_id for one in found if one is not None} == {record.id}
    assert {open_checkpoint(url).state.run_id for url in checkpoint_urls(killed)} == {record.id}


def test_no_process_is_left(killed: str) -> None:
    assert processes_of(lambda number: True) == []


def test_no_lock_or_partial_file_is_left_on_the_disk(killed: str, folder: Path) -> None:
    for path in (folder / "cache").rglob("*.*"):
        assert not path.name.endswith(".partial")
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (folder / "tmp" / EXTENSIONS).exists()


def test_no_partial_file_is_left_in_the_store(killed: str, s3_server: S3Server) -> None:
    sizes = {entry.url: entry.size for entry in storage.list_files(checkpoints_url(killed))}
    folders = {url.rpartition("/")[0] for url in sizes}
    assert folders == set(checkpoint_urls(killed))
    for url in folders:
        files = open_checkpoint(url).files
        expected = {f"{url}/{name}": file.size for name, file in files.items()}
        found = {one: size for one, size in sizes.items() if one.startswith(f"{url}/")}
        assert found.pop(f"{url}/manifest.json") > 0
        assert found == expected
    assert s3_server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []
