"""One start of a run that the chaos test kills: its process, its output and its workers."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from fault_proxy import FaultProxy
from small_run import REPOSITORY

EXTENSIONS = "extensions"
"""Folder in which DeepSpeed would compile, with a lock file that would stay after a kill."""
_MARK = "WIKILLM_CHAOS"
"""Environment variable of every process of the job, with the number of the start."""
_LOOK_SECONDS = 0.002
_LOOK_AT_PROCESSES_SECONDS = 0.02
PATIENCE_SECONDS = 240
"""Longest wait for something that must happen, on a busy machine."""
_DEATH_SECONDS = 60


class Start:
    """One start of the run."""

    def __init__(self, number: int, settings: Path, proxy: FaultProxy, scratch: Path) -> None:
        self.number, self._proxy = number, proxy
        self.began = time.monotonic()
        self._first_request = len(proxy.requests)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "job", "train", "--config", str(settings)],
            cwd=REPOSITORY,
            env=os.environ
            | {"AWS_ENDPOINT_URL": proxy.endpoint_url, "TMPDIR": str(scratch), _MARK: str(number)}
            | {"TORCH_EXTENSIONS_DIR": str(scratch / EXTENSIONS)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.first_step_seconds: float | None = None
        self.steps: list[int] = []
        """Steps that the run has logged."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self.lines.append(text)
            if text.startswith("step ") and " | loss " in text:
                if self.first_step_seconds is None:
                    self.first_step_seconds = time.monotonic() - self.began
                self.steps.append(int(text.split("/")[0].removeprefix("step ")))

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, happened: Callable[[], bool], look_seconds: float = _LOOK_SECONDS) -> bool:
        """Wait for a condition. Returns False if the job ends before it holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            if not self.is_alive:
                self._reader.join()
                return happened()
            if time.monotonic() > deadline:
                raise AssertionError(f"the run makes no progress:\n{self.output()}")
            time.sleep(look_seconds)
        return True

    def await_request(self, number: int = 0, first: int | None = None, *, method: str = "", path: str = "") -> bool:
        """Wait for a request with this method and path, from number `first` on, and for `number` more requests."""
        at = self._first_request if first is None else first

        def happened() -> bool:
            nonlocal at
            while at < len(self._proxy.requests):
                request = self._proxy.requests[at]
                if request.method.startswith(method) and path in request.path:
                    return len(self._proxy.requests) > at + number
                at += 1
            return False

        return self.wait_until(happened)

    def await_line(self, beginning: str) -> bool:
        return self.wait_until(lambda: any(line.startswith(beginning) for line in self.lines))

    def await_steps(self, number: int) -> bool:
        """Wait for this number of further steps."""
        done = len(self.steps) + number
        return self.wait_until(lambda: len(self.steps) >= done)

    def processes(self) -> dict[str, psutil.Process]:
        """Return the running processes of the job, by their role."""
        found: dict[str, psutil.Process] = {}
        with suppress(psutil.NoSuchProcess):
            found["supervisor"] = psutil.Process(self.process.pid)
            for one in found["supervisor"].children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    words = one.cmdline()
                    if "job.launcher.agent" in words:
                        found["launcher"] = one
                    elif words[1:] == ["-u", "-m", "job.launcher.worker"]:
                        found[f"worker {one.environ()['RANK']}"] = one
        return found

    def workers(self) -> list[psutil.Process]:
        """Wait for both workers, and return them."""
        found: list[psutil.Process] = []

        def are_there() -> bool:
            found[:] = [one for name, one in self.processes().items() if name.startswith("worker")]
            return len(found) == 2

        self.wait_until(are_there, _LOOK_AT_PROCESSES_SECONDS)
        return found

    def launcher(self) -> list[psutil.Process]:
        """Wait for the launcher, and return it."""
        self.wait_until(lambda: "launcher" in self.processes(), _LOOK_AT_PROCESSES_SECONDS)
        return [one for name, one in self.processes().items() if name == "launcher"]

    def end(self, seconds: float) -> int:
        """Wait until the job has ended, and return its exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.output()}") from None
        self._reader.join(_DEATH_SECONDS)  # Workers may keep the pipe open for a moment.
        return code

    def output(self) -> str:
        return "\n".join(self.lines)


def processes_of(is_asked_for: Callable[[int], bool]) -> list[psutil.Process]:
    """Return the living processes of all starts whose number satisfies the condition."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            number = one.environ().get(_MARK)
            if number is not None and is_asked_for(int(number)) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found
