"""Test on a real Slurm how options of sbatch combine with those in launch/slurm.sh.

The entrypoint is a stand-in that prints what each test needs.
"""

import re
import sys
from pathlib import Path

import pytest
from slurm_cluster import REPOSITORY, SCRIPT, SlurmCluster, await_true

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def python(folder: Path, script: str) -> str:
    """Create a stand-in for python that runs a bash script, and return its path."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n[[ $1 == -c ]] && exit\n{script}\n")
    path.chmod(0o755)
    return str(path)


def messages(log: str) -> list[str]:
    """Return the messages of launch/slurm.sh in a log, without those about a start."""
    lines = re.findall(r"^slurm\.sh: job \w+: (.*)$", log, re.MULTILINE)
    return [line for line in lines if not line.startswith(("start ", "the entrypoint starts"))]


@pytest.mark.parametrize(
    ("options", "gpus", "contradiction"),
    [
        ("", [1], ""),
        ("--gpus-per-node=2", [2], ""),
        ("--gres=gpu:2", [2], "(gres:gpu:1,gres:gpu:2): each node has 2"),
        ("--gpus-per-node=h100:2", [2], ""),
        ("--gres=gpu:2 --nodes=2", [2, 2], "(gres:gpu:1,gres:gpu:2): each node has 2"),
        ("--gres=gpu:0", [1], "(gres:gpu:1,gres:gpu:0): each node has 1"),
        ("--gres=gpu:2 --gpus-per-node=2", [2], ""),
        ("--gres=gpu:2 --gpus-per-node=3", [2], "(gres:gpu:3,gres:gpu:2): each node has 2"),
        ("--gres=gpu:2 --gpus-per-node=0", [2], "(gres:gpu:0,gres:gpu:2): each node has 2"),
        ("--gpus=2 --gpus-per-node=0", [2], ""),
        ("--gpus=4 --gpus-per-node=2 --nodes=2", [2, 2], ""),
        ("--gpus-per-task=2 --gpus-per-node=2", [2], ""),
        ("--gpus-per-task=3 --gpus-per-node=0", [3], ""),
        ("--gpus-per-node=0", [0], ""),
    ],
)
def test_step_gets_all_gpus_and_a_contradiction_is_reported(
    options: str, gpus: list[int], contradiction: str, cluster: SlurmCluster, tmp_path: Path
) -> None:
    program = python(tmp_path, f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/gpus-$SLURM_NODEID")
    job = cluster.submit(
        *("--cpus-per-task=1", f"--output={tmp_path}/log", f"--chdir={REPOSITORY}", *options.split()),
        *(SCRIPT, "configs/demo.yaml"),
        PYTHON=program,
    )
    assert cluster.await_end(job)["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    found = [(tmp_path / f"gpus-{node}").read_text().replace(",", " ").split() for node in range(len(gpus))]
    assert [len(devices) for devices in found] == gpus
    expected = [f"GPUs: --gpus-per-node and --gres contradict each other {contradiction}"] if contradiction else []
    assert messages((tmp_path / "log").read_text()) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--gpus=2", "Invalid generic resource (gres) specification"),
        ("--gpus-per-task=2", "Invalid generic resource (gres) specification"),
        ("--gres=gpu:h100:2", "Invalid GRES specification (with and without type identification)"),
    ],
)
def test_sbatch_refuses_options_that_contradict_the_script(option: str, message: str, cluster: SlurmCluster) -> None:
    assert message in cluster.run("sbatch", option, str(SCRIPT), check=False)


def test_time_limit_shorter_than_the_warning_does_not_stop_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    # Slurm sends the warning within the first 30 seconds of the job, so the test must wait for it.
    script = f"trap 'exit 75' USR1; until [[ -e {tmp_path}/end ]]; do sleep 0.1; done; exit 0"
    job = cluster.submit(
        *("--time=4", "--signal=B:USR1@300", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/log"),
        *(f"--chdir={REPOSITORY}", SCRIPT, "configs/demo.yaml"),
        PYTHON=python(tmp_path, script),
    )
    log = tmp_path / "log"
    await_true(lambda: log.exists() and "ignoring the warning" in log.read_text(), "the warning", 120, cluster.logs)
    (tmp_path / "end").touch()
    found = cluster.await_end(job)
    assert (found["ExitCode"], found["Restarts"]) == ("0:0", "0"), log.read_text()
    (line,) = messages(log.read_text())
    assert re.fullmatch(
        r"the time limit is only \d+ s away, less than the time of --signal: ignoring the warning", line
    )


def test_job_without_time_limit_has_no_end_time(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.submit(
        *("--time=UNLIMITED", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/log"),
        *(f"--chdir={REPOSITORY}", SCRIPT, "configs/demo.yaml"),
        PYTHON=python(tmp_path, 'echo "ends at ${SLURM_JOB_END_TIME-unset}"'),
    )
    assert cluster.await_end(job)["ExitCode"] == "0:0"
    log = (tmp_path / "log").read_text()
    assert "\nends at unset\n" in log
    assert messages(log) == []


def test_job_from_another_folder_runs_the_repository(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("run: {output: there}\n")
    job = cluster.submit(
        *("--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/log", f"--chdir={tmp_path}"),
        *(SCRIPT, "train", tmp_path / "x.yaml", "--print-config"),
        PYTHON=sys.executable,
    )
    assert cluster.await_end(job)["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    assert "output: there" in (tmp_path / "log").read_text()


def test_job_without_a_repository_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    copy = tmp_path / "copied.sh"
    copy.write_text(SCRIPT.read_text())
    (tmp_path / "x.yaml").touch()
    options = ("--gpus-per-node=0", f"--output={tmp_path}/log", f"--chdir={tmp_path}")
    job = cluster.submit(*options, copy, tmp_path / "x.yaml", PYTHON=sys.executable)
    found = cluster.await_end(job)
    assert (found["ExitCode"], found["Restarts"]) == ("78:0", "0")
    remedy = "submit from the repository, or set REPOSITORY"
    assert messages((tmp_path / "log").read_text()) == [f"REPOSITORY={tmp_path} has no job/__main__.py: {remedy}"]


def test_logs_have_the_names_given_in_the_script_header(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").touch()
    program = python(tmp_path, "[[ ${SLURM_ARRAY_TASK_ID:-} == 1 && ! ${SLURM_RESTART_COUNT:-} ]] && exit 75; exit 0")
    options = ("--gpus-per-node=0", "--cpus-per-task=1", f"--chdir={tmp_path}")
    rest = (SCRIPT, "prepare", tmp_path / "x.yaml")
    head = SCRIPT.read_text()
    assert "--array=0-15 --gpus-per-node=0 --output=%x-%A_%a.log launch/slurm.sh prepare" in head
    array = cluster.submit("--array=0-1", "--output=%x-%A_%a.log", *options, *rest, PYTHON=program)
    job = cluster.submit(*options, *rest, PYTHON=program)
    restarts = [cluster.await_end(submitted)["Restarts"] for submitted in (f"{array}_0", f"{array}_1", job)]
    assert restarts == ["0", "1", "0"]
    names = {path.name for path in tmp_path.glob("*.log")}
    assert names == {f"wikillm-{array}_0.log", f"wikillm-{array}_1.log", f"wikillm-{job}.log"}
    requeued_log = (tmp_path / f"wikillm-{array}_1.log").read_text()
    assert re.findall(r"^slurm\.sh: job (\w+): start (\d)", requeued_log, re.MULTILINE) == [
        (f"{array}_1", "1"),
        (f"{array}_1", "2"),
    ]


@pytest.mark.parametrize(
    ("codes", "ends", "last"),
    [
        ((75, 0), ["75:0", "0:0", "CANCELLED", "CANCELLED"], ""),
        ((78,), ["78:0", "CANCELLED", "CANCELLED", "CANCELLED"], "cancelling the jobs that wait for this one: "),
        ((75, 70), ["75:0", "70:0", "CANCELLED", "CANCELLED"], "cancelling the jobs that wait for this one: "),
        ((75, 75, 75, 75), ["75:0"] * 4, "to submit several jobs in advance, see the first lines of launch/slurm.sh"),
    ],
    ids=str,
)
def test_job_chain_continues_a_run_without_requeue(
    codes: tuple[int, ...], ends: list[str], last: str, cluster: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").touch()
    program = python(tmp_path, f"echo >> {tmp_path}/starts; codes=(0 {' '.join(map(str, codes))})\n"
                     f"exit ${{codes[$(wc -l < {tmp_path}/starts)]}}")  # fmt: skip
    options = (f"--job-name={tmp_path.name}", "--no-requeue", "--gpus-per-node=0", "--cpus-per-task=1", "--begin=now+2")
    rest = (f"--output={tmp_path}/%j.log", f"--chdir={REPOSITORY}", SCRIPT, tmp_path / "x.yaml")
    jobs = [cluster.submit(*options, *rest, PYTHON=program)]
    for _ in range(3):
        after = (f"--dependency=afternotok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes")
        jobs.append(cluster.submit(*options, *after, *rest, PYTHON=program))
    found = [cluster.await_end(job) for job in jobs]
    states = [job["JobState"] if job["JobState"] == "CANCELLED" else job["ExitCode"] for job in found]
    assert states == ends
    logs = [(tmp_path / f"{job}.log").read_text() for job in jobs if (tmp_path / f"{job}.log").exists()]
    assert len(logs) == len(codes), "cancelled jobs have not started"
    assert not last or messages(logs[-1])[-1].startswith(last)
    assert all(
        messages(log)[-1]
        == f"cannot be requeued here: job {jobs[index + 1]}, which waits for this one, continues the run"
        for index, log in enumerate(logs[:-1])
    )
