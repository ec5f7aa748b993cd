"""Run whole tasks in the stand-in for SwanLab's machines, from an empty environment (`make test-swanlab`)."""

import shutil
import subprocess
from pathlib import Path

import pytest
from launched import Launch
from service import BUCKET, Machine, SwanLab, Task
from small_run import checkpoint_urls, prepare_sample, run, write_settings

from job import storage
from job.demo.server import S3Server
from job.errors import EXIT_DONE
from job.runs.attempts import Attempts
from job.runs.run_status import RunStatus
from launch.swanlab.cli import SPEC

pytestmark = [
    pytest.mark.swanlab,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        subprocess.run(["unshare", "--map-root-user", "--mount", "--pid", "--fork", "true"]).returncode != 0,
        reason="this machine does not allow namespaces, which give a task its /data",
    ),
]
STEPS = 40
TRAIN = {"processes": None, "max_steps": STEPS, "log_every": 10}


def test_run_cut_off_by_the_limit_continues_to_the_same_weights(
    swanlab: SwanLab, launch: Launch, s3_server: S3Server, tmp_path: Path
) -> None:
    data = prepare_sample(s3_server, tmp_path)
    shards = tmp_path / "shards"
    for entry in storage.list_files(data.shards):
        storage.download_file(entry.url, shards / entry.url.removeprefix(f"{data.shards}/"))
    output = f"s3://{BUCKET}/real-run"

    def has_first_checkpoint(task: Task) -> bool:
        return task is swanlab.tasks[0] and bool(checkpoint_urls(output))

    machine = Machine(tmp_path, has_first_checkpoint)
    swanlab.run = machine

    result = launch("upload", str(shards), "--name", "SAMPLE")
    assert result.code == EXIT_DONE, result.err
    (volume,) = swanlab.data_sets
    spec = tmp_path / "swanlab.yaml"
    spec.write_text(SPEC.read_text().replace("volumes: []", f"volumes: [{{name: SAMPLE, id: {volume}}}]"))
    shutil.copy(SPEC.with_name("swanlab_task.py"), tmp_path)
    settings = write_settings(tmp_path, data, output, train=TRAIN, checkpoint={"every": 10})
    result = launch(
        *("submit", "--until-done", "--spec", str(spec), "--config", str(settings)),
        *("--data.shards", "/data/SAMPLE", "--data.cache_dir", "cache"),
        *("--with-credentials", "AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY"),
    )
    logs = [machine.log(task) for task in swanlab.tasks]
    assert result.code == EXIT_DONE, "\n".join([result.err, *logs])
    assert [(task.status, task.message) for task in swanlab.tasks] == [
        ("CRASHED", "the task's time is up"),
        ("COMPLETED", ""),
    ]
    attempts = Attempts(output)
    first, second = (attempts.read(number) for number in attempts.numbers())
    assert first is not None and second is not None
    assert (first.ended, second.ended) == (None, RunStatus.DONE)
    assert second.from_step is not None and second.from_step >= 10
    assert first.run_id == second.run_id

    settings = write_settings(tmp_path, data, f"{output}-undisturbed", train=TRAIN, checkpoint={"every": 10})
    code, _, err = run("train", settings, OMP_NUM_THREADS="2")
    assert code == EXIT_DONE, err
    weights = [storage.read_bytes(f"{url}/final/model.safetensors") for url in (output, f"{output}-undisturbed")]
    assert weights[0] == weights[1]
