"""Client of SwanLab's HTTP API for tasks and data sets; every failure becomes a one-line error.

Bodies are JSON. `POST /login/api_key` opens a session, whose id is sent with every call as a cookie.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar, get_args

import requests

from job.errors import UserError, one_line
from job.redaction import learn_value
from launch.swanlab.retry import TRIES, retry
from launch.swanlab.spec import Combo

ALTERNATIVES = (
    "the run can continue under Slurm (sbatch launch/slurm.sh), on Kubernetes (kubectl apply -k launch/kubernetes/...) "
    "or on any Docker host (docker run)"
)
FINAL_STATES = ("COMPLETED", "CRASHED", "STOPPED")
"""States of a task that has ended. Before them it is QUEUING, PREPARE or RUNNING."""
_TIMEOUT_SECONDS = (10, 60)
"""Timeouts for connecting and for waiting for an answer."""
_LISTING_PAUSES_SECONDS = (0, 1, 2, 4, 8)
"""Pauses before each look for a new task in the list of tasks."""
_NOT_SUPPORTED = (404, 405, 410, 501)
"""Statuses of a service that no longer has the called endpoint."""

Result = TypeVar("Result")


class ServiceDown(OSError):
    """The service cannot be reached or fails. Trying again later may help."""


class TooManyTasks(UserError):
    """The account already has the largest allowed number of tasks."""


class _Refused(Exception):
    """The service answered with an error status."""

    def __init__(self, status: int, call: str, reason: str) -> None:
        super().__init__(f"{call}: {status} {reason}".rstrip())
        self.status = status


@dataclass(frozen=True)
class Account:
    """API key and address of the service."""

    key: str
    """API key. It is secret: it is sent in a header and in a task, and never printed."""
    host: str

    def __repr__(self) -> str:
        return f"Account(host={self.host!r})"


def find_account() -> Account:
    """Return the account that SwanLab itself would use.

    The sources are SWANLAB_API_KEY and SWANLAB_API_HOST, then what `swanlab login` has saved.

    Raises:
        UserError: there is no API key.
    """
    os.environ.pop("SWANLAB_DEBUG", None)  # SwanLab's debug output contains the saved API key.
    import swanlab

    settings = swanlab.Settings()
    if not settings.api_key:
        raise UserError("SWANLAB_API_KEY", None, "is not set", "set it, or run `swanlab login`")
    learn_value(settings.api_key)
    return Account(settings.api_key, settings.api_host)


@dataclass(frozen=True)
class TaskState:
    """State of a task as the service reports it. Fields that it does not report are empty."""

    cuid: str
    """Id of the task."""
    name: str
    status: str
    combo: str
    created: str
    started: str
    finished: str
    message: str
    """Reason of the state, from the service or from the user who stopped the task."""
    page: str
    """Address of the run in the dashboard; empty before the run has started."""

    @property
    def has_ended(self) -> bool:
        """Return True if the task has ended."""
        return self.status in FINAL_STATES


class Service:
    """Session with the service.

    Args:
        account: API key and address of the service.

    Raises (by every method):
        UserError: the service refuses the key or the request, or no longer supports the call.
        ServiceDown: the service cannot be reached or fails. Calls that are safe to repeat were tried several times.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._url = f"{account.host}/api"
        self._session = requests.Session()
        self._session.headers["swanlab-sdk"] = version("swanlab")
        self._session.auth = lambda request: request  # Otherwise a ~/.netrc would overwrite the header.
        self.username = self._log_in()

    def store_keys(self) -> dict[str, Any]:
        """Return temporary keys for the object store, with its region and bucket and this user's prefix."""
        return self._call("GET", "/user/codes/sts", _keys)

    def start(self, task: Mapping[str, Any]) -> str:
        """Start a task and return its id.

        Args:
            task: the body of `POST /task` without the API key.

        Raises:
            TooManyTasks: the account has the largest allowed number of tasks.
        """
        before = {known.cuid for known in self.tasks()}
        missing = ServiceDown(f"{self._url} accepted the task but does not list it")
        try:
            self._call_raw("POST", "/task", _nothing, dict(task) | {"conf": {"key": self._account.key}})
        except _Refused as refused:
            raise self._start_error(refused, task) from None
        except ServiceDown as error:  # The task may exist all the same, if only the answer was lost.
            missing = error
        # The answer does not contain the id of the task, so look for a task that was not listed before.
        for pause_seconds in _LISTING_PAUSES_SECONDS:
            time.sleep(pause_seconds)
            new_ids = [
                listed.cuid for listed in self.tasks() if listed.cuid not in before and listed.name == task["name"]
            ]
            if new_ids:
                return new_ids[-1]
        raise missing

    def tasks(self, number: int = 10) -> list[TaskState]:
        """Return the newest tasks."""
        return self._call("GET", f"/task?num={number}", lambda body: [self._state(task) for task in body])

    def task(self, cuid: str) -> TaskState:
        """Return the state of one task."""
        try:
            return self._call_raw("GET", f"/task/{cuid}", self._state)
        except _Refused as refused:
            if refused.status != 404:
                raise self._user_error(refused) from None
        # This call raises another error if the service no longer supports tasks.
        known = ", ".join(task.cuid for task in self.tasks()) or "none"
        raise UserError("task", cuid, "there is no such task", f"the newest are: {known}")

    def stop(self, cuid: str, message: str) -> None:
        """Stop a task and record `message` as the reason."""
        self.task(cuid)
        self._call("PATCH", "/task/status", _nothing, {"cuid": cuid, "status": "STOPPED", "msg": message})

    def queue_length(self) -> int:
        """Return the number of tasks of all users that wait for a GPU."""
        return self._call("GET", "/task/queuing", lambda body: int(body["sum"]))

    def create_data_set(self, name: str, description: str | None) -> str:
        """Create a data set without files and return its id."""
        data_set = {"name": name} | ({"desc": description} if description else {})
        return self._call("POST", "/task/dataset", lambda body: str(body["cuid"]), data_set)

    def close_data_set(self, cuid: str, is_complete: bool) -> None:
        """Report that all files of a data set are uploaded, or that the upload failed."""
        body = {"cuid": cuid, "status": "SUCCESS" if is_complete else "FAILURE"}
        self._call("PATCH", "/task/dataset/status", _nothing, body)

    def data_sets(self) -> dict[str, str]:
        """Return the names of this user's data sets by id."""
        return self._call("GET", "/task/datasets", lambda body: {item["cuid"]: item["name"] for item in body})

    def _log_in(self) -> str:
        self._session.cookies.clear()
        headers = {"authorization": self._account.key}
        try:
            sid, username = self._exchange("POST", "/login/api_key", _session, headers=headers)
        except _Refused as refused:
            raise self._user_error(refused) from None
        self._session.cookies.set("sid", sid)
        return username

    def _call(self, method: str, path: str, read: Callable[[Any], Result], body: Any = None) -> Result:
        """Return what `read` extracts from the body of the answer. Raises UserError if the service refuses."""
        try:
            return self._call_raw(method, path, read, body)
        except _Refused as refused:
            raise self._user_error(refused) from None

    def _call_raw(self, method: str, path: str, read: Callable[[Any], Result], body: Any = None) -> Result:
        """Return what `read` extracts from the body of the answer; log in again if needed. Raises _Refused."""
        try:
            return self._exchange(method, path, read, json=body)
        except _Refused as refused:
            if refused.status not in (401, 403):
                raise
        self._log_in()  # The session may have expired.
        return self._exchange(method, path, read, json=body)

    def _exchange(self, method: str, path: str, read: Callable[[Any], Result], **options: Any) -> Result:
        """Call the service and try again while it is down. `options` are passed to `requests`."""
        # A repeated POST could create a second task or data set, so it is tried once.
        tries = 1 if method == "POST" and path.startswith("/task") else TRIES
        return retry(lambda: self._try(method, path, read, **options), ServiceDown, tries)

    def _try(self, method: str, path: str, read: Callable[[Any], Result], **options: Any) -> Result:
        """Call the service once. Raises ServiceDown or _Refused."""
        call = f"{method} {path.partition('?')[0]}"
        try:
            answer = self._session.request(
                method, self._url + path, timeout=_TIMEOUT_SECONDS, allow_redirects=False, **options
            )
        except requests.RequestException as error:
            # Only the kind of error is shown, because its text may contain headers.
            problem = f"{self._url} cannot be reached ({_reason(error)})"
            raise ServiceDown(f"{problem}; try again later, or: {ALTERNATIVES}") from None
        if (answer.status_code >= 500 and answer.status_code not in _NOT_SUPPORTED) or answer.status_code == 429:
            problem = f"{self._url} fails ({call}: {answer.status_code})"
            raise ServiceDown(f"{problem}; try again later, or: {ALTERNATIVES}")
        if not answer.ok or answer.is_redirect or answer.status_code >= 300:
            raise _Refused(answer.status_code, call, _message(answer))
        try:
            return read(answer.json() if answer.content else None)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _Refused(404, call, "the answer has an unexpected form") from None

    def _start_error(self, refused: _Refused, task: Mapping[str, Any]) -> UserError:
        if refused.status == 401 and task.get("combo"):
            remedy = f"choose {' or '.join(get_args(Combo))}, or remove the key"
            return UserError("metadata.combo", task["combo"], "the service does not have this combo", remedy)
        if refused.status == 404 and task.get("datasets"):
            known = ", ".join(f"{cuid} ({name})" for cuid, name in self.data_sets().items()) or "none"
            data_set = task["datasets"][0]
            return UserError("spec.volumes", data_set, "there is no such data set", f"yours: {known}")
        if refused.status == 406:
            remedy = "wait until one ends, or stop one with `stop`"
            return TooManyTasks("task", None, "too many tasks for this account", remedy)
        return self._user_error(refused)

    def _user_error(self, refused: _Refused) -> UserError:
        if refused.status in (401, 403):
            remedy = "copy the key from https://swanlab.cn/settings, and verify the account there"
            return UserError("SWANLAB_API_KEY", None, f"the service refuses the key ({refused})", remedy)
        if 300 <= refused.status < 400:
            expected = f"this client is too old for the service ({refused})"
            return UserError("SwanLab Launch", None, expected, ALTERNATIVES)
        if refused.status in _NOT_SUPPORTED:
            expected = f"{self._url} no longer has SwanLab Launch ({refused})"
            return UserError("SwanLab Launch", None, expected, ALTERNATIVES)
        return UserError("SwanLab Launch", None, f"the service refuses the request ({refused})")

    def _state(self, task: Mapping[str, Any]) -> TaskState:
        project, experiment = task.get("pName"), task.get("eId")
        page = f"https://swanlab.cn/@{self.username}/{project}/runs/{experiment}" if project and experiment else ""
        return TaskState(
            cuid=task["cuid"],
            name=task["name"],
            status=task["status"],
            combo=task.get("combo") or "",
            created=task.get("createdAt") or "",
            started=task.get("startedAt") or "",
            finished=task.get("finishedAt") or "",
            message=one_line(task.get("msg") or ""),
            page=page,
        )


# ---- Reading answers ----


def _nothing(body: Any) -> None:
    """Ignore the body of the answer."""


def _session(body: Any) -> tuple[str, str]:
    return str(body["sid"]), str(body["userInfo"]["username"])


def _keys(body: Any) -> dict[str, Any]:
    keys = {name: body["credentials"][name] for name in ("tmpSecretId", "tmpSecretKey", "sessionToken")}
    return {name: str(body[name]) for name in ("region", "bucket", "prefix")} | {"credentials": keys}


def _reason(error: requests.RequestException) -> str:
    kinds: dict[type[requests.RequestException], str] = {
        requests.exceptions.SSLError: "its certificate is not trusted",
        requests.exceptions.ProxyError: "the proxy fails",
        requests.exceptions.ConnectTimeout: "no connection in time",
        requests.exceptions.ReadTimeout: "no answer in time",
        requests.exceptions.ConnectionError: "no connection",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), type(error).__name__)


def _message(answer: requests.Response) -> str:
    """Return the message in the body of an answer, cut to 200 characters; empty if there is none."""
    try:
        body = answer.json()
    except ValueError:
        return ""
    message = body.get("message") or body.get("msg") if isinstance(body, dict) else None
    return one_line(str(message))[:200] if message else ""
