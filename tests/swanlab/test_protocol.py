"""Tests of the client against the service: tasks are started, shown and stopped; every refusal is a one-line error."""

from pathlib import Path

import pytest
from launched import Launch
from service import API_KEY, HTML_PAGE, SwanLab
from small_run import free_port

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, UserError
from launch.swanlab.cos import CodeStore
from launch.swanlab.service import Account, Service, ServiceDown, find_account

CONFIG = str(Path(__file__).parents[2] / "configs" / "wiki-123m.yaml")
SUBMIT = ("submit", "--config", CONFIG, "--data.shards", "https://example.com/shards", "--run.output", "/tmp/run")
ALTERNATIVES = ("Slurm (sbatch launch/slurm.sh)", "Kubernetes (kubectl apply -k", "any Docker host (docker run)")


def test_submit_list_status_and_stop(swanlab: SwanLab, launch: Launch) -> None:
    result = launch(*SUBMIT)
    assert result.code == EXIT_DONE, result.err
    (task,) = swanlab.tasks
    assert task.cuid in result.out
    assert task.body["src"].startswith(f"{swanlab.prefix}/tasks/") and task.body["src"].endswith(".zip")
    assert {name: task.body[name] for name in ("index", "python", "name", "combo")} == {
        "index": "swanlab_task.py", "python": "python3.11", "name": "WikiLLM", "combo": "H800-1"
    }  # fmt: skip
    assert "datasets" not in task.body
    for command in (("list",), ("status", task.cuid)):
        result = launch(*command)
        assert result.code == EXIT_DONE
        assert task.cuid in result.out
        assert f"https://swanlab.cn/@somebody/WikiLLM/runs/run-of-{task.cuid}" in result.out
    assert launch("stop", task.cuid).code == EXIT_DONE
    assert task.status == "STOPPED"
    assert launch("queue").out == "0 tasks wait for a GPU\n"


def test_requests_carry_the_version_and_no_key_in_urls(swanlab: SwanLab, launch: Launch) -> None:
    assert launch(*SUBMIT).code == EXIT_DONE
    assert all("swanlab-sdk" in headers for headers in swanlab.headers)
    assert not [path for _, path in swanlab.requests if API_KEY in path]
    assert [headers.get("authorization") for headers in swanlab.headers[1:]] == [None] * (len(swanlab.headers) - 1)


def test_expired_session_logs_in_again(swanlab: SwanLab, launch: Launch) -> None:
    swanlab.injected["GET", "/task/queuing"] = [401]
    assert launch("queue").code == EXIT_DONE
    assert swanlab.requests.count(("POST", "/api/login/api_key")) == 2


def test_key_saved_by_swanlab_login_is_found(
    swanlab: SwanLab, launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SWANLAB_API_KEY")
    assert launch("queue").err.startswith("SWANLAB_API_KEY: is not set")
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path))
    saved = tmp_path / ".netrc"
    saved.write_text(f"machine {swanlab.host} login {swanlab.host} password {API_KEY}\n")
    saved.chmod(0o600)
    assert launch("queue").code == EXIT_DONE
    assert API_KEY not in repr(find_account())


TASK = {"src": "codes/1.zip", "index": "a.py", "python": "python3.11", "name": "WikiLLM", "combo": "H800-1"}


def start(swanlab: SwanLab) -> None:
    """Make the same calls to the service as `submit`."""
    service = Service(Account(API_KEY, swanlab.host))
    service.store_keys()
    service.start(TASK)


@pytest.mark.parametrize(
    ("call", "status", "line"),
    [
        (("POST", "/login/api_key"), 401, "SWANLAB_API_KEY: the service refuses the key"),
        (("POST", "/login/api_key"), 403, "SWANLAB_API_KEY: the service refuses the key"),
        (("GET", "/task"), 403, "SWANLAB_API_KEY: the service refuses the key"),
        (("POST", "/task"), 401, "metadata.combo: 'H800-1': the service does not have this combo"),
        (("POST", "/task"), 406, "task: too many tasks"),
        (("POST", "/task"), 301, "SwanLab Launch: this client is too old for the service"),
        (("POST", "/task"), 307, "SwanLab Launch: this client is too old for the service"),
        (("POST", "/task"), 400, "SwanLab Launch: the service refuses the request (POST /task: 400 no ***)"),
    ],
)
def test_refusal_is_one_line(call: tuple[str, str], status: int, line: str, swanlab: SwanLab) -> None:
    swanlab.injected[call] = status
    with pytest.raises(UserError) as raised:
        start(swanlab)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
    assert not swanlab.tasks


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (("POST", "/login/api_key"), 404),
        (("GET", "/user/codes/sts"), 404),
        (("GET", "/user/codes/sts"), 405),
        (("GET", "/user/codes/sts"), 410),
        (("GET", "/user/codes/sts"), HTML_PAGE),
        (("GET", "/task"), 404),
        (("POST", "/task"), 404),
        (("POST", "/task"), 501),
    ],
)
def test_service_without_launch_endpoints_names_alternatives(
    call: tuple[str, str], status: int, swanlab: SwanLab
) -> None:
    swanlab.injected[call] = status
    with pytest.raises(UserError) as raised:
        start(swanlab)
    assert str(raised.value).startswith(
        f"SwanLab Launch: {swanlab.host}/api no longer has SwanLab Launch ({' '.join(call)}"
    )
    assert all(alternative in str(raised.value) for alternative in ALTERNATIVES)


def test_refusal_exits_with_78_and_failure_with_1(swanlab: SwanLab, launch: Launch) -> None:
    for status, code in ((404, EXIT_REFUSED), (301, EXIT_REFUSED), (503, EXIT_FAILED)):
        swanlab.injected["GET", "/task/queuing"] = status
        result = launch("queue")
        assert (result.code, result.err.count("\n"), result.out) == (code, 1, "")


def test_unreachable_service_is_one_line_and_names_alternatives(
    swanlab: SwanLab, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("SWANLAB_API_HOST", f"http://127.0.0.1:{port}")
    result = launch("list")
    assert (result.code, result.err.count("\n")) == (EXIT_FAILED, 1)
    assert result.err.startswith(f"http://127.0.0.1:{port}/api cannot be reached (no connection)")
    assert all(alternative in result.err for alternative in ALTERNATIVES)


def test_failed_calls_are_retried_except_starting_a_task(swanlab: SwanLab) -> None:
    swanlab.injected["GET", "/user/codes/sts"] = [503, 429]
    swanlab.injected["POST", "/task"] = [503]
    with pytest.raises(ServiceDown, match=r"fails \(POST /task: 503\)"):
        start(swanlab)
    assert swanlab.requests.count(("POST", "/api/task")) == 1


def test_task_is_found_if_the_answer_is_lost(swanlab: SwanLab) -> None:
    swanlab.lost.add(("POST", "/task"))
    service = Service(Account(API_KEY, swanlab.host))
    store = CodeStore(service.store_keys)
    store.write("tasks/1.zip", b"")
    assert service.start(TASK | {"src": store.key("tasks/1.zip")}) == swanlab.tasks[0].cuid
    assert len(swanlab.tasks) == 1


def test_unknown_task_and_missing_service_have_different_errors(swanlab: SwanLab, launch: Launch) -> None:
    launch(*SUBMIT)
    for command in ("status", "stop"):
        result = launch(command, "abcdef")
        assert result.code == EXIT_REFUSED
        assert result.err.startswith("task: 'abcdef': there is no such task")
        assert swanlab.tasks[0].cuid in result.err
    swanlab.injected["GET", "/task"] = 404
    assert launch("status", "abcdef").err.startswith("SwanLab Launch: ")


def test_unknown_data_set_error_lists_the_existing_ones(swanlab: SwanLab) -> None:
    swanlab.data_sets["aaaaaa"] = {"name": "WIKI_CN", "status": "SUCCESS"}
    service = Service(Account(API_KEY, swanlab.host))
    with pytest.raises(UserError) as raised:
        service.start(TASK | {"datasets": ["bbbbbb"]})
    assert str(raised.value) == "spec.volumes: 'bbbbbb': there is no such data set; yours: aaaaaa (WIKI_CN)"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "command line: the following arguments are required: COMMAND"),
        (("launch",), "command line: argument COMMAND: invalid choice: 'launch'"),
        (("list", "--all"), "command line: '--all': unknown argument of `list`"),
        (("status",), "command line: the following arguments are required: id"),
        (("submit", "--train.learning_rat", "1"), "train.learning_rat: unknown setting; did you mean"),
        (("submit",), "--config: is not set"),
    ],
)
def test_wrong_command_line_is_one_line(words: tuple[str, ...], line: str, launch: Launch) -> None:
    result = launch(*words)
    assert (result.code, result.err.count("\n")) == (EXIT_REFUSED, 1)
    assert result.err.startswith(line)
