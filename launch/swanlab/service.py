"""SwanLab's service: what can be asked of it, and one line for whatever it answers instead.

Bodies are JSON. `POST /login/api_key` gives a session, whose id goes with every call as a cookie.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import requests

from job.errors import UserError, one_line
from job.redaction import learn_value

ELSEWHERE = (
    "the same run goes on under Slurm (sbatch launch/slurm.sh), on Kubernetes (kubectl apply -k launch/kubernetes/...) "
    "and on any Docker host (docker run)"
)
ENDED = ("COMPLETED", "CRASHED", "STOPPED")
"""The states that a task does not leave; before them come QUEUING, PREPARE and RUNNING."""
_TIMEOUT_SECONDS = (10, 60)
"""For a connection, and for an answer."""
_TRIES = 4
_PAUSE_SECONDS = 0.25
"""Times 4, 16, 64: between the tries."""
_LISTED_SECONDS = (0, 1, 2, 4, 8)
"""Pauses in which a task that was taken appears in the list."""
_GONE = (404, 405, 410, 501)

Result = TypeVar("Result")


class ServiceDown(OSError):
    """The service is not reached, or fails: it may pass."""


class TooManyTasks(UserError):
    """The account has as many tasks as it may have."""


class _Refused(Exception):
    """An answer that says no."""

    def __init__(self, status: int, call: str, said: str) -> None:
        super().__init__(f"{call}: {status} {said}".rstrip())
        self.status = status


@dataclass(frozen=True)
class Account:
    """Who asks, and where."""

    key: str
    """A secret: it goes into a header and into a task, never into a line."""
    host: str

    def __repr__(self) -> str:
        return f"Account(host={self.host!r})"


def find_account() -> Account:
    """The API key and the service, where SwanLab itself finds them: SWANLAB_API_KEY and SWANLAB_API_HOST, or what
    `swanlab login` has saved.

    Raises:
        UserError: there is no key.
    """
    os.environ.pop("SWANLAB_DEBUG", None)  # its output holds the key that `swanlab login` has saved
    import swanlab

    found = swanlab.Settings()
    if not found.api_key:
        raise UserError("SWANLAB_API_KEY", None, "is not set", "set it, or run `swanlab login`")
    learn_value(found.api_key)
    return Account(found.api_key, found.api_host)


@dataclass(frozen=True)
class TaskState:
    """A task, as the service tells of it."""

    cuid: str
    name: str
    status: str
    combo: str
    created: str
    started: str
    finished: str
    message: str
    page: str
    """Of its run in the dashboard, once it has one."""

    @property
    def has_ended(self) -> bool:
        """Whether it stays as it is."""
        return self.status in ENDED


class Service:
    """A session with the service.

    Args:
        account: who asks, and where.

    Raises (by every method):
        UserError: the key is refused, the service does not know what is asked of it, or finds it wrong.
        ServiceDown: it is not reached, or fails, after some tries where trying again does no harm.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._url = f"{account.host}/api"
        self._session = requests.Session()
        self._session.headers["swanlab-sdk"] = version("swanlab")
        self._session.auth = lambda request: request  # else a ~/.netrc would overwrite the header
        self.username = self._log_in()

    def store_keys(self) -> dict[str, Any]:
        """Temporary keys for the object store, the bucket, and the prefix in it that is this user's."""
        return self._ask("GET", "/user/codes/sts", _keys)

    def start(self, task: Mapping[str, Any]) -> str:
        """Starts a task; returns its id.

        Args:
            task: what POST /task takes but the key.

        Raises:
            TooManyTasks: as many as there may be.
        """
        before = {one.cuid for one in self.tasks()}
        missing = ServiceDown(f"{self._url} took the task, but does not list it")
        try:
            self._call("POST", "/task", _nothing, dict(task) | {"conf": {"key": self._account.key}})
        except _Refused as refused:
            raise self._not_started(refused, task) from None
        except ServiceDown as error:  # or only its answer was lost
            missing = error
        for pause_seconds in _LISTED_SECONDS:  # no answer names it: it is the one that was not there
            time.sleep(pause_seconds)
            new = [one.cuid for one in self.tasks() if one.cuid not in before and one.name == task["name"]]
            if new:
                return new[-1]
        raise missing

    def tasks(self, number: int = 10) -> list[TaskState]:
        """The newest tasks."""
        return self._ask("GET", f"/task?num={number}", lambda found: [self._state(one) for one in found])

    def task(self, cuid: str) -> TaskState:
        """A task."""
        try:
            return self._call("GET", f"/task/{cuid}", self._state)
        except _Refused as refused:
            if refused.status != 404:
                raise self._mistake(refused) from None
        known = ", ".join(one.cuid for one in self.tasks()) or "none"  # raises if no task can be asked for at all
        raise UserError("task", cuid, "there is no such task", f"the newest are: {known}")

    def stop(self, cuid: str, message: str) -> None:
        """Stops a task, and says why to whoever looks at it."""
        self.task(cuid)
        self._ask("PATCH", "/task/status", _nothing, {"cuid": cuid, "status": "STOPPED", "msg": message})

    def queuing(self) -> int:
        """How many tasks wait for a GPU, everybody's."""
        return self._ask("GET", "/task/queuing", lambda found: int(found["sum"]))

    def create_data_set(self, name: str, description: str | None) -> str:
        """A data set without files; returns its id."""
        body = {"name": name} | ({"desc": description} if description else {})
        return self._ask("POST", "/task/dataset", lambda found: str(found["cuid"]), body)

    def close_data_set(self, cuid: str, is_whole: bool) -> None:
        """Says that its files are all there, or that this failed."""
        body = {"cuid": cuid, "status": "SUCCESS" if is_whole else "FAILURE"}
        self._ask("PATCH", "/task/dataset/status", _nothing, body)

    def data_sets(self) -> dict[str, str]:
        """The names of the data sets by id."""
        return self._ask("GET", "/task/datasets", lambda found: {one["cuid"]: one["name"] for one in found})

    def _log_in(self) -> str:
        self._session.cookies.clear()
        headers = {"authorization": self._account.key}
        try:
            sid, username = self._exchange("POST", "/login/api_key", _session, headers=headers)
        except _Refused as refused:
            raise self._mistake(refused) from None
        self._session.cookies.set("sid", sid)
        return username

    def _ask(self, method: str, path: str, read: Callable[[Any], Result], body: Any = None) -> Result:
        try:
            return self._call(method, path, read, body)
        except _Refused as refused:
            raise self._mistake(refused) from None

    def _call(self, method: str, path: str, read: Callable[[Any], Result], body: Any = None) -> Result:
        """What `read` finds in the answer. Raises _Refused."""
        try:
            return self._exchange(method, path, read, json=body)
        except _Refused as refused:
            if refused.status not in (401, 403):
                raise
        self._log_in()  # the session may be over
        return self._exchange(method, path, read, json=body)

    def _exchange(self, method: str, path: str, read: Callable[[Any], Result], **more: Any) -> Result:
        tries = 1 if method == "POST" and path.startswith("/task") else _TRIES  # two might make two of it
        for number in range(1, tries):
            try:
                return self._try(method, path, read, **more)
            except ServiceDown:
                time.sleep(_PAUSE_SECONDS * 4**number)
        return self._try(method, path, read, **more)

    def _try(self, method: str, path: str, read: Callable[[Any], Result], **more: Any) -> Result:
        call = f"{method} {path.partition('?')[0]}"
        try:
            answer = self._session.request(
                method, self._url + path, timeout=_TIMEOUT_SECONDS, allow_redirects=False, **more
            )
        except requests.RequestException as error:
            # Only its kind is told: what it says may hold headers.
            raise ServiceDown(f"{self._url} is not reached ({_reason(error)}); if it stays so, {ELSEWHERE}") from None
        if (answer.status_code >= 500 and answer.status_code not in _GONE) or answer.status_code == 429:
            raise ServiceDown(f"{self._url} fails ({call}: {answer.status_code}); if it stays so, {ELSEWHERE}")
        if not answer.ok or answer.is_redirect or answer.status_code >= 300:
            raise _Refused(answer.status_code, call, _said(answer))
        try:
            return read(answer.json() if answer.content else None)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _Refused(404, call, "an answer of another kind") from None

    def _not_started(self, refused: _Refused, task: Mapping[str, Any]) -> UserError:
        if refused.status == 401 and task.get("combo"):
            remedy = "choose H800-1 or RTX3090-1, or leave it out"
            return UserError("metadata.combo", task["combo"], "the service does not have this combo", remedy)
        if refused.status == 404 and task.get("datasets"):
            known = ", ".join(f"{cuid} ({name})" for cuid, name in self.data_sets().items()) or "none"
            wanted = task["datasets"][0]
            return UserError("spec.volumes", wanted, "there is no such data set", f"yours are: {known}")
        if refused.status == 406:
            return TooManyTasks("task", None, "too many tasks", "wait for one to end, or `stop` one")
        return self._mistake(refused)

    def _mistake(self, refused: _Refused) -> UserError:
        if refused.status in (401, 403):
            remedy = "copy it from https://swanlab.cn/settings, where the account has to be verified too"
            return UserError("SWANLAB_API_KEY", None, f"the service refuses the key ({refused})", remedy)
        if 300 <= refused.status < 400:
            return UserError("SwanLab Launch", None, f"this client is too old for the service ({refused})", ELSEWHERE)
        if refused.status in _GONE:
            expected = f"{self._url} no longer knows it ({refused})"
            return UserError("SwanLab Launch", None, expected, ELSEWHERE)
        return UserError("SwanLab Launch", None, f"the service refuses ({refused})")

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


# ---- What answers hold ----


def _nothing(found: Any) -> None:
    """Where it is enough that there is an answer."""


def _session(found: Any) -> tuple[str, str]:
    return str(found["sid"]), str(found["userInfo"]["username"])


def _keys(found: Any) -> dict[str, Any]:
    keys = {name: found["credentials"][name] for name in ("tmpSecretId", "tmpSecretKey", "sessionToken")}
    return {name: str(found[name]) for name in ("region", "bucket", "prefix")} | {"credentials": keys}


def _reason(error: requests.RequestException) -> str:
    kinds: dict[type[requests.RequestException], str] = {
        requests.exceptions.SSLError: "its certificate is not trusted",
        requests.exceptions.ProxyError: "the proxy fails",
        requests.exceptions.ConnectTimeout: "no connection in time",
        requests.exceptions.ReadTimeout: "no answer in time",
        requests.exceptions.ConnectionError: "no connection",
    }
    return next((what for kind, what in kinds.items() if isinstance(error, kind)), type(error).__name__)


def _said(answer: requests.Response) -> str:
    """The reason that an answer gives, in a few words."""
    try:
        body = answer.json()
    except ValueError:
        return ""
    message = body.get("message") or body.get("msg") if isinstance(body, dict) else None
    return one_line(str(message))[:200] if message else ""
