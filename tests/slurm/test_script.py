"""Test on a real Slurm how launch/slurm.sh reacts to exit codes, signals, time limits and missing programs.

The entrypoint is a stand-in that runs the script of each case. All jobs are submitted at once: they mostly wait.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from slurm_cluster import REPOSITORY, SCRIPT, SlurmCluster, await_true
from stand_ins import ENROOT

STAND_IN = Path(__file__).with_name("stand_in.sh")
SECRET = "a-secret-for-slurm"

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Case:
    """A job on two nodes and its expected end."""

    behaviour: str
    """Bash script that runs on each node, see stand_in.sh."""
    restarts: int = 0
    state: str = "COMPLETED"
    """Slurm's final state of the job."""
    code: str = "0:0"
    """Slurm's exit code of the job, as code:signal."""
    messages: tuple[str, ...] = ()
    """Messages of launch/slurm.sh in the log, in this order."""
    options: tuple[str, ...] = ()
    """Options for sbatch."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of sbatch."""
    command: str = "train"


STOPPED, OUTSIDE = "stopped, to be continued", "cancelled, requeued or preempted (exit code 75)"
WARNED = "warned: the limit is near"
USELESS = "not restarted, because a restart cannot help (exit code {})"
DISTURBED = "(( start > 1 )) && exit 0; await {}; sleep 12; exit 75"
CASES = {
    "a finished run": Case("exit 0"),
    "a refused configuration": Case("exit 78", 0, "FAILED", "78:0", (USELESS.format(78),)),
    "no progress": Case("exit 70", 0, "FAILED", "70:0", (USELESS.format(70),)),
    "stopped twice": Case("(( start < 3 )) && exit 75; exit 0", 2, messages=(STOPPED, STOPPED)),
    "nodes that stop one after the other": Case(
        "(( start > 1 )) && exit 0; sleep $(( node * 2 )); exit 75", 1, messages=(STOPPED,)
    ),
    "refused on one node, hanging on the other": Case(
        "(( node == 1 )) && exit 78; sleep 300", 0, "FAILED", "78:0", (USELESS.format(78),)
    ),
    "killed on one node": Case(
        "(( start > 1 )) && exit 0; (( node == 1 )) && kill -KILL $$; exit 1", 1, messages=("crashed (exit code 137)",)
    ),
    "killed before the entrypoint starts": Case(
        "exit 0", 1, messages=("crashed (exit code 137)",), variables={"KILLED_BEFORE_IT_STARTS": "1"}
    ),
    "crashes in a row": Case(
        *("exit 3", 1, "FAILED", "3:0"),
        ("crashed (exit code 3)", "crashed (exit code 3)", "not restarted: 2 crashes in a row (MAX_CRASHES=1)"),
        variables={"MAX_CRASHES": "1"},
    ),
    "crashes with a checkpoint between them": Case(
        "case $start in 1 | 3) exit 1 ;; 2) exit 75 ;; *) exit 0 ;; esac",
        3,
        messages=("crashed (exit code 1)", STOPPED, "crashed (exit code 1)"),
        variables={"MAX_CRASHES": "1"},
    ),
    "restarts up to the limit": Case(
        "exit 75",
        1,
        "FAILED",
        "75:0",
        (STOPPED, STOPPED, "not restarted: MAX_RESTARTS=1 is reached"),
        (),
        {"MAX_RESTARTS": "1"},
    ),
    "warned of the limit": Case(
        DISTURBED.format("USR1 scancel --batch --signal=USR1 $SLURM_JOB_ID"), 1, messages=(WARNED, STOPPED)
    ),
    "killed by the warning": Case(
        "(( start > 1 )) && exit 0; (( node == 0 )) && scancel --batch --signal=USR1 $SLURM_JOB_ID; exec sleep 60",
        1,
        messages=(WARNED, STOPPED),
    ),
    "checkpoint requested by a person": Case(
        DISTURBED.format("USR1 scancel --signal=USR1 $SLURM_JOB_ID"), 1, messages=(STOPPED,)
    ),
    "cancelled": Case(DISTURBED.format("TERM scancel $SLURM_JOB_ID"), 0, "CANCELLED", messages=(OUTSIDE,)),
    "parts of a corpus, one much smaller": Case("(( node == 0 )) && exit 0; sleep 70", command="prepare"),
    "requeued by a person": Case(DISTURBED.format("TERM scontrol requeue $SLURM_JOB_ID"), 1, messages=(OUTSIDE,)),
    "over the limit": Case(
        DISTURBED.format("TERM true"),
        *(1, "COMPLETED", "0:0", (WARNED, STOPPED), ("--time=1", "--signal=B:USR1@10")),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


def submit(
    cluster: SlurmCluster,
    folder: Path,
    name: str,
    behaviour: str,
    *options: str,
    command: str = "train",
    **variables: str,
) -> str:
    """Submit a job on two nodes and return its id. Its log is `name`.log in `folder`."""
    config = folder / f"{name}.sh"
    config.write_text(behaviour)
    resources = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1")
    log = f"--output={folder / name}.log"
    return cluster.submit(
        *(*resources, log, *options, f"--chdir={REPOSITORY}", SCRIPT, command, config, "--train.x", "a b"),
        **{"PYTHON": str(STAND_IN), **variables},
    )


@pytest.fixture(scope="module", autouse=True)
def jobs(cluster: SlurmCluster, folder: Path) -> dict[str, str]:
    """Ids of the jobs of all cases, by the name of the case."""
    return {
        name: submit(cluster, folder, name, case.behaviour, *case.options, command=case.command, **case.variables)
        for name, case in CASES.items()
    }


def messages(folder: Path, name: str) -> list[str]:
    """Return the messages of launch/slurm.sh in a log, without those about a start."""
    lines = re.findall(r"^slurm\.sh: job \w+: (.*)$", (folder / f"{name}.log").read_text(), re.MULTILINE)
    return [line for line in lines if not line.startswith("start ")]


# ---- What it runs ----


@pytest.mark.parametrize(
    ("arguments", "nodes", "expected"),
    [
        ([], 1, "-m job train --config configs/wiki-123m.yaml"),
        (
            ["configs/demo.yaml", "--train.learning_rate", "1e-3"],
            2,
            "-m job train --config configs/demo.yaml --train.learning_rate 1e-3",
        ),
        (["--run.name", "x y"], 1, "-m job train --config configs/wiki-123m.yaml --run.name x y"),
        (["prepare", "configs/demo.yaml"], 1, "-m job prepare --config configs/demo.yaml"),
        (["check"], 1, "-m job check --config configs/wiki-123m.yaml"),
    ],
)
def test_unedited_script_runs_the_command(
    arguments: list[str], nodes: int, expected: str, cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = cluster.submit(
        f"--nodes={nodes}", f"--output={tmp_path}/log", f"--chdir={REPOSITORY}", SCRIPT, *arguments, PYTHON="/bin/echo"
    )
    assert cluster.await_end(job)["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    lines = (tmp_path / "log").read_text().splitlines()[1:]
    label = "0: " if nodes > 1 else ""
    lines.remove(f"{label}slurm.sh: job {job}: the entrypoint starts")
    assert sorted(lines) == ([expected] if nodes == 1 else [f"{node}: {expected}" for node in range(nodes)])


def test_step_gets_end_time_resources_and_hidden_credentials(cluster: SlurmCluster, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text(f"AWS_SECRET_ACCESS_KEY={SECRET}\n")
    behaviour = f"""
        env > {tmp_path}/environment-$node
        [[ $(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n') == *"$AWS_SECRET_ACCESS_KEY"* ]] && exit 9
        printf '%s\\n' "$@" > {tmp_path}/arguments-$node
    """
    options = ("--gpus-per-node=2", "--cpus-per-task=3", "--time=5")
    job = submit(
        *(cluster, tmp_path, "job", behaviour, *options), CREDENTIALS=str(credentials), SCRATCH="/tmp/of-this-job"
    )
    found = cluster.await_end(job)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), (tmp_path / "job.log").read_text()
    for node in range(2):
        lines = (tmp_path / f"environment-{node}").read_text().splitlines()
        environment = dict(line.split("=", 1) for line in lines if "=" in line)
        ends_at = subprocess.check_output(["date", "+%s", "--date", found["EndTime"]], text=True)
        # The job ended at once, so its end time by Slurm is before its time limit.
        began_at = subprocess.check_output(["date", "+%s", "--date", found["StartTime"]], text=True)
        assert int(environment["SLURM_JOB_END_TIME"]) == int(began_at) + 300 > int(ends_at)
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert environment["SLURM_CPUS_ON_NODE"] == environment["SLURM_CPUS_PER_TASK"] == "3"
        assert (environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_NODEID"]) == ("2", str(node))
        assert environment["WIKILLM_SCRATCH"] == "/tmp/of-this-job"
        assert environment["AWS_SECRET_ACCESS_KEY"] == SECRET
        arguments = (tmp_path / f"arguments-{node}").read_text().splitlines()
        assert arguments == ["-m", "job", "train", "--config", f"{tmp_path}/job.sh", "--train.x", "a b"]


def test_requeued_array_task_does_not_affect_the_others(cluster: SlurmCluster, tmp_path: Path) -> None:
    behaviour = "(( SLURM_ARRAY_TASK_ID == 1 && start == 1 )) && exit 75; sleep 10; exit 0"
    array = submit(cluster, tmp_path, "array", behaviour, "--array=0-1", f"--output={tmp_path}/%a.log")
    restarts = []
    for task in range(2):
        found = cluster.await_end(f"{array}_{task}")
        assert found["JobState"] == "COMPLETED", (tmp_path / f"{task}.log").read_text()
        restarts.append(int(found["Restarts"]))
    assert found["JobId"] == array  # The last task has the array's id, and requeueing that would requeue all tasks.
    assert restarts == [0, 1]


def test_preempted_job_is_restarted_by_slurm_alone(tmp_path: Path) -> None:
    with SlurmCluster() as cluster:
        behaviour = DISTURBED.format(f"TERM touch {tmp_path}/ready")
        job = submit(cluster, tmp_path, "job", behaviour, "--partition=low")
        await_true((tmp_path / "ready").exists, "the start")
        cluster.submit("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        found = cluster.await_end(job)
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "job.log").read_text()
        assert messages(tmp_path, "job") == [OUTSIDE]


# ---- Containers ----


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"PYTHON": "/nowhere/python"}, [], "RUNTIME=none needs /nowhere/python: run make setup, or set PYTHON"),
        ({"RUNTIME": "pyxis"}, [], "RUNTIME=pyxis: this srun has no --container-image"),
        ({"RUNTIME": "apptainer"}, [], "RUNTIME=apptainer: apptainer is not in PATH"),
        ({"RUNTIME": "charliecloud"}, [], "RUNTIME=charliecloud: IMAGE=registry.example.com/wikillm:latest is not a"),
        ({"RUNTIME": "docker"}, [], "RUNTIME=docker: expected pyxis, apptainer, charliecloud or none"),
        ({}, ["configs/nowhere.yaml"], f"no config file configs/nowhere.yaml in {REPOSITORY}"),
    ],
)
def test_missing_program_or_file_is_one_line_and_not_retried(
    variables: dict[str, str], arguments: list[str], message: str, cluster: SlurmCluster, tmp_path: Path
) -> None:
    options = ("--gpus-per-node=0", f"--output={tmp_path}/log", f"--chdir={REPOSITORY}")
    job = cluster.submit(*options, SCRIPT, *arguments, **variables)
    found = cluster.await_end(job)
    assert (found["ExitCode"], found["Restarts"]) == ("78:0", "0")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(f"slurm.sh: job {job}: {message}")


FAKES = {
    "apptainer": '#!/bin/bash\nprintf "%s\\n" "$@"\n',
    # Slurm's srun with the options that pyxis adds. It checks image names as strictly as enroot.
    "srun": """#!/bin/bash
        enroot=$(cat "$0.names")
        for one; do
            case $one in
                --help) echo --container-image --ntasks; exit ;;
                --container-image=[./]*) shown=1 ;;
                --container-image=*) [[ docker://${one#*=} =~ $enroot ]] || exit 1; shown=1 ;;
            esac
        done
        [[ ${shown:-} ]] && exec printf '%s\\n' "$@"
        exec {srun} "$@"
    """,
}
INSIDE = (
    *("env", "PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH=/app", "HOME=/scratch"),
    *("WIKILLM_SCRATCH=/scratch", "sh", "-c"),
)
COMMAND = ["python", "-m", "job", "train", "--config", "/app/configs/demo.yaml", "--a.b", "c d"]


@pytest.mark.parametrize(
    ("runtime", "image", "expected"),
    [
        ("apptainer", "a.example/b/c:1", ["exec", "--pwd", "/app", "--bind", "MOUNTS", "docker://a.example/b/c:1"]),
        ("apptainer", "/images/c.sif", ["exec", "--pwd", "/app", "--bind", "MOUNTS", "/images/c.sif"]),
        ("pyxis", "a.example/b/c:1", ["--container-image=a.example#b/c:1", "--container-mounts=MOUNTS"]),
        ("pyxis", "a.example/c@sha256:0a", ["--container-image=a.example#c:sha256:0a", "--container-mounts=MOUNTS"]),
        ("pyxis", "/images/c.sqsh", ["--container-image=/images/c.sqsh", "--container-mounts=MOUNTS"]),
    ],
)  # fmt: skip
def test_containers_get_config_scratch_and_the_same_command(
    runtime: str, image: str, expected: list[str], cluster: SlurmCluster, tmp_path: Path
) -> None:
    srun = subprocess.check_output(["which", "srun"], text=True).strip()
    for name in ("apptainer",) if runtime == "apptainer" else ("srun",):
        (tmp_path / name).write_text(FAKES[name].replace("{srun}", srun))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "srun.names").write_text(f"^{ENROOT}$")
    scratch = tmp_path / "scratch"
    private = scratch / f"wikillm-{os.getuid()}"
    job = cluster.submit(
        *("--gpus-per-node=0", f"--output={tmp_path}/log", f"--chdir={REPOSITORY}"),
        *(SCRIPT, "configs/demo.yaml", "--a.b", "c d"),
        **{"RUNTIME": runtime, "IMAGE": image, "MOUNTS": "/data,/x:/y", "SCRATCH": str(scratch)},
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert cluster.await_end(job)["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    lines = (tmp_path / "log").read_text().splitlines()[1:]
    mounts = f"{REPOSITORY}/configs:/app/configs,{private}:/scratch,/data,/x:/y"
    wanted = [word.replace("MOUNTS", mounts) for word in expected]
    assert lines[-len(COMMAND) :] == COMMAND
    first = lines.index(INSIDE[0])
    assert lines[first : first + len(INSIDE)] == list(INSIDE)
    assert [line for line in lines if line in wanted] == wanted
    assert private.stat().st_mode & 0o777 == 0o700


# ---- Restart or not ----


@pytest.mark.parametrize("name", CASES)
def test_job_restarts_only_if_that_can_help(
    name: str, jobs: dict[str, str], cluster: SlurmCluster, folder: Path
) -> None:
    case, found = CASES[name], cluster.await_end(jobs[name])
    log = (folder / f"{name}.log").read_text()
    assert (int(found["Restarts"]), found["JobState"]) == (case.restarts, case.state), log
    assert found["ExitCode"] == case.code or case.state == "CANCELLED", log
    assert messages(folder, name) == list(case.messages), log
    assert len(re.findall(r"^slurm\.sh: job \d+: start ", log, re.MULTILINE)) == case.restarts + 1
