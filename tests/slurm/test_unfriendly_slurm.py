"""Test launch/slurm.sh with stand-ins for Slurm's programs that fail, hang, refuse or answer nonsense."""

import re
import signal
import time
from pathlib import Path

import pytest
from stand_ins import Site

DIGEST = f"sha256:{'0123456789abcdef' * 4}"
NOW = int(time.time())
TIMES = {
    "SOON": str(NOW + 30_000),
    "LATER": str(NOW + 60_000),
    "TOMORROW": str(NOW + 86_400),
    "THEN": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW + 30_000)),
}
"""Placeholders in the answers of stand-ins and in variables."""
UNKNOWN_END = "unknown end time of the job (squeue: {}): only Slurm's warning stops the run in time"
USELESS = "not restarted, because a restart cannot help (exit code 78)"
# Stand-in for `timeout`, used with a hanging program: it waits half a second, whatever the given time is.
SHORT_TIMEOUT = 'while [[ $1 == --* ]]; do shift; done; exec /usr/bin/timeout 0.5 "${@:2}"'
# Stand-in for python: it prints "ready" and waits for USR1.
WAIT_FOR_USR1 = '[[ $1 == -c ]] && exit; trap "exit 75" USR1; echo ready; while :; do sleep 0.05; done'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# ---- When the job ends ----


@pytest.mark.parametrize(
    ("squeue", "environment", "expected", "messages"),
    [
        ("echo SOON N/A", {}, "SOON", []),
        ("echo THEN N/A", {}, "SOON", []),
        ("echo LATER N/A", {"SLURM_JOB_END_TIME": "SOON"}, "SOON", []),
        ("echo SOON N/A", {"SLURM_JOB_END_TIME": "0"}, "SOON", []),
        ("echo SOON N/A", {"SLURM_JOB_END_TIME": "1700000000"}, "SOON", []),
        ("[[ $SLURM_TIME_FORMAT == %s && ! $SQUEUE_STATES ]] && echo SOON",
            {"SLURM_TIME_FORMAT": "%H:%M", "SQUEUE_STATES": "PD"}, "SOON", []),
        ("echo NONE N/A", {}, "unset", []),
        ("echo N/A N/A", {"SLURM_JOB_END_TIME": "4294967294"}, "unset", []),
        ("echo 4294967295", {}, "unset", []),
        ("echo 0", {}, "unset", []),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", {}, "unset",
            [UNKNOWN_END.format("no answer")]),
        ("exit 0", {"SLURM_JOB_END_TIME": ""}, "unset", [UNKNOWN_END.format("no answer")]),
        ("sleep 600", {}, "unset", [UNKNOWN_END.format("no answer")]),
        ("echo 14:40", {}, "unset", [UNKNOWN_END.format("14:40")]),
        ("echo 2026-11-28T25:99", {}, "unset", [UNKNOWN_END.format("2026-11-28T25:99")]),
        ("echo 1700000000", {}, "unset", [UNKNOWN_END.format("1700000000")]),
    ],
)  # fmt: skip
def test_only_a_future_time_is_the_end_of_the_job(
    squeue: str, environment: dict[str, str], expected: str, messages: list[str], site: Site
) -> None:
    for word, value in TIMES.items():
        squeue = squeue.replace(word, value)
    environment = {name: TIMES.get(value, value) for name, value in environment.items()}
    site.program("squeue", squeue)
    if "sleep" in squeue:
        site.program("timeout", SHORT_TIMEOUT)
    site.program("python", '[[ $1 == -c ]] || echo "ends at ${SLURM_JOB_END_TIME-unset}"')
    assert site.run(**environment) == 0, site.lines
    assert site.lines[-1] == f"ends at {TIMES.get(expected, expected)}"
    assert site.messages() == messages


def test_warning_at_the_start_is_ignored_and_a_later_one_stops(site: Site) -> None:
    site.program("python", WAIT_FOR_USR1)
    job = site.start(SLURM_JOB_END_TIME=str(int(time.time()) + 240))
    site.await_line("ready")
    job.send_signal(signal.SIGUSR1)
    site.await_line("ignoring the warning")
    assert re.match(r"the time limit is only [12]\d\d s away, less than the time of --signal", site.messages()[0])
    job.send_signal(signal.SIGUSR1)  # Slurm warns only once, so this one is from a person.
    assert job.wait(timeout=60) == 75
    assert site.messages()[1:] == ["warned: the limit is near", "stopped, to be continued"]
    assert site.calls("scontrol") == ["requeue 1"]


@pytest.mark.parametrize("end", ["", "TOMORROW"])
def test_warning_with_a_distant_or_unknown_limit_stops_the_job(end: str, site: Site) -> None:
    site.program("python", WAIT_FOR_USR1)
    job = site.start(SLURM_JOB_END_TIME=TIMES.get(end, end))
    site.await_line("ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 75
    assert site.messages() == ["warned: the limit is near", "stopped, to be continued"]


@pytest.mark.parametrize(
    ("seconds", "message", "requeues"),
    [(3, "stopped, to be continued", ["requeue 1"]), (3000, "cancelled, requeued or preempted (exit code 75)", [])],
)
def test_clock_distinguishes_limit_and_cancel_without_squeue(
    seconds: int, message: str, requeues: list[str], site: Site
) -> None:
    site.program("squeue", "exit 1")
    site.program("python", WAIT_FOR_USR1)
    ends_at = int(time.time()) + seconds
    job = site.start(SLURM_JOB_END_TIME=str(ends_at))
    site.await_line("ready")
    while seconds < 10 and time.time() < ends_at:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert site.messages()[-1] == message
    assert site.calls("scontrol") == requeues


# ---- What it runs ----


def test_step_gets_all_gpus_and_a_contradiction_is_reported(site: Site) -> None:
    site.program("squeue", "echo NONE gres:gpu:1,gres:gpu:h100:2")
    site.program("python", '[[ $1 == -c ]] || env | grep -E "GPU|TRES"')
    variables = {"SLURM_GPUS_PER_NODE": "1", "SLURM_GPUS": "2", "SLURM_GPUS_PER_TASK": "1"}
    variables |= {"SLURM_GPUS_PER_SOCKET": "1", "SLURM_TRES_PER_TASK": "gres/gpu:1", "SLURM_NTASKS_PER_GPU": "1"}
    assert site.run(**variables, SLURM_GPUS_ON_NODE="2") == 0
    assert site.lines[-1] == "SLURM_GPUS_ON_NODE=2"
    assert site.messages() == [
        "GPUs: --gpus-per-node and --gres contradict each other (gres:gpu:1,gres:gpu:h100:2): each node has 2"
    ]
    site.program("squeue", "echo NONE gres:gpu:2,gres:gpu:2")
    site.log.unlink()
    assert site.run() == 1  # grep finds nothing.
    assert "contradict" not in site.log.read_text()


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"REPOSITORY": "{repository}"}, 0),
        ({"command": "{repository}/launch/slurm.sh"}, 0),
        ({}, 78),
        ({"REPOSITORY": "{elsewhere}", "command": "{repository}/launch/slurm.sh"}, 78),
    ],
)
def test_job_from_another_folder_finds_the_repository_or_fails(
    settings: dict[str, str], code: int, site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    settings = {name: value.format(repository=site.folder, elsewhere=elsewhere) for name, value in settings.items()}
    site.program("squeue", f"echo 'NONE N/A {settings.pop('command', '(null)')} x.yaml'")
    site.program("python", '[[ $1 == -c ]] || echo "$PYTHONPATH $*"')
    assert site.run(site.folder / "other.yaml", cwd=elsewhere, **settings, PYTHONPATH="/mine") == code
    if code == 0:
        assert site.lines[-1] == f"{site.folder}:/mine -m job train --config {site.folder}/other.yaml"
    else:
        remedy = "submit from the repository, or set REPOSITORY"
        assert site.messages() == [f"REPOSITORY={elsewhere} has no job/__main__.py: {remedy}"]
    assert site.calls("scontrol") == []


def test_pythonpath_is_unchanged_in_the_repository(site: Site) -> None:
    site.program("python", '[[ $1 == -c ]] || echo "${PYTHONPATH-unset}"')
    assert site.run() == 0
    assert site.lines[-1] == "unset"


@pytest.mark.parametrize("name", ["MAX_RESTARTS", "MAX_CRASHES"])
def test_setting_that_is_not_a_number_is_refused(name: str, site: Site) -> None:
    assert site.run(**{name: "many"}) == 78
    assert site.messages() == [f"{name}=many: expected a whole number"]


# ---- Images ----


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.example/b/c:1", "user= registry=a.example name=b/c tag=1"),
        ("a.example:5000/c", "user= registry=a.example:5000 name=c tag="),
        ("localhost/c:1", "user= registry=localhost name=c tag=1"),
        ("docker://a.example/c:1", "user= registry=a.example name=c tag=1"),
        ("a.example#b/c:1", "user= registry=a.example name=b/c tag=1"),
        ("me/wikillm:1", "user= registry= name=me/wikillm tag=1"),
        ("wikillm", "user= registry= name=wikillm tag="),
        (f"a.example/b/c@{DIGEST}", f"user= registry=a.example name=b/c tag={DIGEST}"),
        (f"a.example:5000/c:1@{DIGEST}", f"user= registry=a.example:5000 name=c tag={DIGEST}"),
        (f"a.example:5000#c@{DIGEST}", f"user= registry=a.example:5000 name=c tag={DIGEST}"),
        (f"me/wikillm@{DIGEST}", f"user= registry= name=me/wikillm tag={DIGEST}"),
        ("/images/c.sqsh", "file /images/c.sqsh"),
    ],
)
def test_image_name_is_converted_for_enroot(image: str, expected: str, site: Site) -> None:
    assert site.run(RUNTIME="pyxis", IMAGE=image) == 0, site.lines
    assert site.lines[-1] == expected
    note = "IMAGE has a digest, which enroot expects in place of the tag: "
    notes = [message for message in site.messages() if message.startswith(note)]
    assert len(notes) == image.count("@sha256:")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.example/b/c:1", "docker://a.example/b/c:1"),
        ("docker://a.example/b/c:1", "docker://a.example/b/c:1"),
        ("oras://a.example/c:1", "oras://a.example/c:1"),
        (f"a.example:5000/c@{DIGEST}", f"docker://a.example:5000/c@{DIGEST}"),
        (f"a.example:5000/c:1@{DIGEST}", f"docker://a.example:5000/c@{DIGEST}"),
        ("/images/c.sif", "/images/c.sif"),
    ],
)
def test_image_name_is_converted_for_apptainer(image: str, expected: str, site: Site) -> None:
    site.program("apptainer", 'printf "%s\\n" "$@"')
    assert site.run(RUNTIME="apptainer", IMAGE=image) == 0, site.lines
    assert expected in site.lines


def test_image_name_that_enroot_refuses_is_not_a_crash(site: Site) -> None:
    assert site.run(RUNTIME="pyxis", IMAGE="a.example/B:1") == 78
    assert "Invalid image reference: docker://a.example#B:1" in site.log.read_text()
    assert site.messages() == ["not restarted: the entrypoint did not start (exit code 1), see the reason above"]
    assert site.calls("scontrol") == []


# ---- Restart or not ----


def test_program_that_cannot_be_imported_is_not_a_crash(site: Site) -> None:
    error = "ModuleNotFoundError: No module named 'job'"
    python = site.program("python", f'echo Traceback >&2; echo "{error}" >&2; exit 1')
    assert site.run() == 78
    cause = f"{python} on a node cannot import job: {error}"
    assert site.messages() == [cause, USELESS]
    assert site.calls("scontrol") == []


def test_step_that_cannot_start_is_a_crash_only_after_a_start(site: Site) -> None:
    (site.bin / "srun.broken").touch()
    assert site.run() == 78
    assert site.messages() == ["not restarted: the entrypoint did not start (exit code 1), see the reason above"]
    assert site.calls("scontrol") == []
    (site.bin / "srun.broken").unlink()
    site.program("python", "[[ $1 == -c ]] || exit 75")
    assert site.run() == 75
    (site.bin / "srun.broken").touch()
    assert site.run(SLURM_RESTART_COUNT="1") == 1
    assert site.messages()[-1] == "crashed (exit code 1)"
    assert site.calls("scontrol") == ["requeue 1"] * 2


@pytest.mark.parametrize(
    ("tool", "answer"),
    [(tool, "exit 2") for tool in ("stat", "awk", "grep", "tail", "readlink")]
    + [(tool, "echo nonsense") for tool in ("stat", "awk", "tail", "readlink")],
)
def test_failing_shell_tool_does_not_end_the_run(tool: str, answer: str, site: Site) -> None:
    site.log.write_text("srun: error: n1: task 0: Exited with exit code 78\n")  # from an earlier start
    site.program(tool, answer)
    site.program("python", "[[ $1 == -c ]] || exit 3")
    assert site.run(SLURM_RESTART_COUNT="2") == 3
    assert site.messages() == ["crashed (exit code 3)"]
    assert site.calls("scontrol") == ["requeue 1"]


REFUSES = "echo 'Requested operation is presently disabled for job 1' >&2; exit 1"
IN_ADVANCE = "to submit several jobs in advance, see the first lines of launch/slurm.sh"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "sbatch --dependency=afterany:1 --nodes=1 launch/slurm.sh train other.yaml --run.name a\\ b"),
        (
            {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0"}
            | {"SLURM_ARRAY_TASK_MAX": "6", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_JOB_NUM_NODES": "2"},
            "sbatch --dependency=afterany:7 --nodes=2 --array=0-6:2 launch/slurm.sh train other.yaml --run.name a\\ b",
        ),
    ],
)
@pytest.mark.parametrize("scontrol", [REFUSES, "sleep 600"])
def test_refused_requeue_prints_the_command_that_continues(
    environment: dict[str, str], expected: str, scontrol: str, site: Site
) -> None:
    if "sleep" in scontrol:
        site.program("timeout", SHORT_TIMEOUT)
    site.program("squeue", f"[[ $* != *PENDING* ]] && echo NONE N/A {site.folder}/launch/slurm.sh other.yaml")
    site.program("scontrol", scontrol)
    site.program("python", "[[ $1 == -c ]] || exit 75")
    secret = ("--data.source", "https://me:pass@host/a?sig=planted")
    assert site.run("other.yaml", "--run.name", "a b", *secret, **environment) == 75
    message, hint = site.lines[-2:]
    assert hint.endswith(IN_ADVANCE)
    advice = "cannot be requeued here. To continue the run, add the other options of this job to:"
    assert f"{advice} {expected} " in message
    assert "planted" not in site.log.read_text() and "pass@" not in site.log.read_text()


# Jobs of the chain, with another name, of another chain, and as older versions of Slurm print dependencies.
QUEUE = """[[ $* == *PENDING* ]] || { echo NONE N/A; exit; }
echo '2|wikillm|afternotok:1(unfulfilled)'
echo '3|wikillm|afternotok:1(unfulfilled),afternotok:2(unfulfilled)'
echo '4|tell-me|afternotok:1(unfulfilled)'
echo '5|wikillm|afternotok:11(unfulfilled)'
echo '6|wikillm|afterok:1(unfulfilled)'
echo '7|wikillm|afternotok:11,afternotok:1'
echo '8|wikillm|'"""


@pytest.mark.parametrize(("code", "cancelled"), [(0, []), (70, ["2 3 7"]), (78, ["2 3 7"]), (75, [])])
def test_chain_is_cancelled_if_a_restart_cannot_help(code: int, cancelled: list[str], site: Site) -> None:
    site.program("squeue", QUEUE)
    site.program("scontrol", REFUSES)
    site.program("python", f"[[ $1 == -c ]] || exit {code}")
    assert site.run() == code
    assert site.calls("scancel") == cancelled
    if code == 75:
        assert site.messages()[-1] == "cannot be requeued here: job 2, which waits for this one, continues the run"


def test_refused_setting_cancels_the_chain(site: Site) -> None:
    site.program("squeue", QUEUE)
    assert site.run("nowhere.yaml") == 78
    assert site.calls("scancel") == ["2 3 7"]
