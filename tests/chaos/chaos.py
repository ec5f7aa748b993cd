"""Kills a run at random moments, over and over, and starts it again as a launcher would, until it is done."""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import psutil
from fault_proxy import SLOW_DOWN, Fault, FaultProxy, Refusal
from small_run import REPOSITORY

from job import storage
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint import Name, lineage, list_checkpoints

DRIZZLE = {
    SLOW_DOWN: 0.01,
    Fault.RESET_REQUEST: 0.005,
    Fault.RESET_ANSWER: 0.005,
    Fault.TRUNCATE_ANSWER: 0.005,
    Fault.SHORT_ANSWER: 0.005,
    Fault.FLIP_REQUEST: 0.005,
    Fault.FLIP_ANSWER: 0.005,
    Fault.STALL: 0.001,
    Fault.THROTTLE: 0.01,
}
"""What the store does to the run all the time, in one of twenty requests."""
EXTENSIONS = "extensions"
"""Where DeepSpeed would compile, under a lock that is a mere file and outlives whoever is killed."""
_MARK = "WIKILLM_CHAOS"
"""In the environment of every process of the job: the number of its start."""
_LOOK_SECONDS = 0.002
_LOOK_AT_PROCESSES_SECONDS = 0.02
_PATIENCE_SECONDS = 240
_LONGEST_SECONDS = 3600
"""For all the steps that are left when nothing kills it any more."""
"""Longest wait for something that has to happen, on a machine that has other things to do."""
_DEATH_SECONDS = 60
_UPLOAD_REQUESTS = 30
"""What a checkpoint takes, about: three files in two parts each, two small ones, the manifest, the old ones' end."""


class Moment(Enum):
    START_UP = "start-up"
    STEP = "a step"
    UPLOAD = "an upload"
    EVALUATION = "an evaluation"
    STOP = "a stop"


class What(Enum):
    KILL_WORKER = "SIGKILL to one worker"
    KILL_WORKERS = "SIGKILL to all workers"
    KILL_LAUNCHER = "SIGKILL to the launcher"
    KILL_SUPERVISOR = "SIGKILL to the supervisor"
    SIGTERM = "SIGTERM to any process"
    SIGINT = "SIGINT to any process"
    SIGUSR1 = "SIGUSR1 to any process"
    OUTAGE = "S3 outage"
    BAD_BYTES = "SIGKILL to all workers, and a damaged checkpoint"


REQUESTS = (What.SIGTERM, What.SIGINT, What.SIGUSR1)


@dataclass(frozen=True)
class Kill:
    """What is done to the run, and when."""

    moment: Moment
    what: What
    random: Random = field(repr=False)
    """Draws what else there is: to whom, how long after the moment."""


def plan(runs: int, seed: int) -> list[Kill]:
    """So many kills; all sorts and all moments come equally often, in random order and combination."""
    random = Random(seed)

    def shuffled(choices: list[Any]) -> Iterator[Any]:
        while True:
            yield from random.sample(choices, len(choices))

    moments, whats = shuffled(list(Moment)), shuffled(list(What))
    drawn = [[next(moments), next(whats)] for _ in range(runs)]
    # The job lives on through an outage: its start-up is over then.
    for before, after in reversed(list(pairwise(drawn))):
        if before[1] is What.OUTAGE and after[0] is Moment.START_UP:
            before[0], after[0] = after[0], before[0]
    return [Kill(moment, what, Random(random.random())) for moment, what in drawn]


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
        """Those it has said it has done."""
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

    def await_(self, happened: Callable[[], bool], look_seconds: float = _LOOK_SECONDS) -> bool:
        """Whether that has happened before the job ended."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not happened():
            if not self.is_alive:
                self._reader.join()
                return happened()
            if time.monotonic() > deadline:
                raise AssertionError(f"it stands still:\n{self.told()}")
            time.sleep(look_seconds)
        return True

    def await_request(self, number: int = 0, first: int | None = None, *, method: str = "", path: str = "") -> bool:
        """Waits for a request that is such, from the `first` on, and for so many more of any sort."""
        at = self._first_request if first is None else first

        def happened() -> bool:
            nonlocal at
            while at < len(self._proxy.requests):
                request = self._proxy.requests[at]
                if request.method.startswith(method) and path in request.path:
                    return len(self._proxy.requests) > at + number
                at += 1
            return False

        return self.await_(happened)

    def await_line(self, beginning: str) -> bool:
        return self.await_(lambda: any(line.startswith(beginning) for line in self.lines))

    def await_steps(self, number: int) -> bool:
        """Waits for so many more steps."""
        done = len(self.steps) + number
        return self.await_(lambda: len(self.steps) >= done)

    def processes(self) -> dict[str, psutil.Process]:
        """Those that it consists of now, by what they are."""
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
        """Its workers, when they are there."""
        found: list[psutil.Process] = []

        def are_there() -> bool:
            found[:] = [one for name, one in self.processes().items() if name.startswith("worker")]
            return len(found) == 2

        self.await_(are_there, _LOOK_AT_PROCESSES_SECONDS)
        return found

    def launcher(self) -> list[psutil.Process]:
        """Its launcher, when that is there."""
        self.await_(lambda: "launcher" in self.processes(), _LOOK_AT_PROCESSES_SECONDS)
        return [one for name, one in self.processes().items() if name == "launcher"]

    def end(self, seconds: float) -> int:
        """Its exit code, when it has ended, which it must in time."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.told()}") from None
        self._reader.join(_DEATH_SECONDS)  # its workers may hold the pipe for a moment more
        return code

    def told(self) -> str:
        return "\n".join(self.lines)


def processes_of(is_asked_for: Callable[[int], bool]) -> list[psutil.Process]:
    """What lives of the starts with such numbers."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            number = one.environ().get(_MARK)
            if number is not None and is_asked_for(int(number)) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


@dataclass
class Line:
    """What became of a kill."""

    kill: Kill
    details: list[str] = field(default_factory=list)
    """What was drawn for it."""
    code: int | None = None
    """Of the start that it ended; None: it went on."""
    first_step_seconds: float | None = None
    """What the start after it took to its first step."""
    redone_steps: int = 0


class Chaos:
    """The whole story of a run that is killed as planned.

    Args:
        output: the run's prefix.
        settings: its settings.
        evaluate_every: one of them.
        kills: what is to be done to it.
        server: the store itself.
        proxy: through which the run sees the store.
        scratch: temporary files of the run.
    """

    def __init__(
        self,
        output: str,
        settings: Path,
        evaluate_every: int,
        kills: list[Kill],
        server: S3Server,
        proxy: FaultProxy,
        scratch: Path,
    ) -> None:
        self._output, self._settings, self._evaluate_every = output, settings, evaluate_every
        self._plan, self._left = kills, list(kills)
        self._server, self._proxy, self._scratch = server, proxy, scratch
        self.lines: list[Line] = []
        self.starts = 0
        self.damaged: set[Name] = set()
        self.survivors: list[str] = []
        """Processes that had outlived their job when the next one was at its first step."""
        self._began = time.monotonic()
        self._last_step = 0
        self._first_seconds: list[float] = []
        self.seconds = 0.0

    def run(self) -> None:
        """Starts the run until it is done."""
        code: int | None = None
        while code != EXIT_DONE:
            code = self._start()
        self.seconds = time.monotonic() - self._began
        assert not self._left, f"the run was done after {len(self._plan) - len(self._left)} kills: give it more steps"

    def _start(self) -> int:
        before, known = self._newest_attempt(), self._newest_good()
        self.starts += 1
        start = Start(self.starts, self._settings, self._proxy, self._scratch)
        ended_by: Line | None = None
        try:
            while ended_by is None and self._left:
                kill = self._left[0]
                line = Line(kill)
                self._wait_for(kill.moment, kill.random, start, line)
                if not start.is_alive and kill.moment is not Moment.STOP:
                    break  # by itself: it must be done
                self._left.pop(0)
                if self._do(kill, line, start):
                    ended_by = line
                else:
                    self.lines.append(line)
                    self._say(line, start)
            code = start.end(_PATIENCE_SECONDS if ended_by is not None else _LONGEST_SECONDS)
        except BaseException:
            print(start.told(), flush=True)
            raise
        finally:
            with suppress(ProcessLookupError):
                start.process.kill()
        self._judge(start, code, ended_by, before, known)
        return code

    # ---- One kill ----

    def _do(self, kill: Kill, line: Line, start: Start) -> bool:
        """Does it now; whether that ends the job."""
        random = kill.random
        if kill.what is What.OUTAGE:
            seconds = random.uniform(1, 6)
            line.details.append(f"{seconds:.1f} s")
            self._proxy.start_outage()
            time.sleep(seconds)
            self._proxy.end_outage()
            return kill.moment is Moment.STOP or not start.is_alive
        if kill.what in REQUESTS:
            self._request(signal.Signals[kill.what.name], random, start, line)
        elif kill.what in (What.KILL_WORKERS, What.BAD_BYTES):
            _send(signal.SIGKILL, start.workers())
        elif kill.what is What.KILL_WORKER:
            workers = start.workers()
            _send(signal.SIGKILL, workers and [random.choice(workers)])
        elif kill.what is What.KILL_LAUNCHER:
            _send(signal.SIGKILL, start.launcher())
        else:
            start.process.kill()
        return True

    def _wait_for(self, moment: Moment, random: Random, start: Start, line: Line) -> None:
        now = len(self._proxy.requests)
        seconds = 0.2
        if moment is Moment.START_UP:
            stage, seconds = random.randrange(7), 1.0
            waits: list[Callable[[], Any]] = [
                lambda: True,
                start.launcher,
                start.workers,
                start.await_request,
                lambda: start.await_request(method="PUT", path="/attempts/"),
                lambda: start.await_request(method="GET", path="/model.safetensors") if self._newest_good() else True,
                lambda: start.await_line("run "),
            ]
            waits[stage]()
        elif moment is Moment.STEP:
            start.await_steps(random.randint(1, 8))
        elif moment is Moment.UPLOAD:
            number = random.randrange(_UPLOAD_REQUESTS)
            line.details.append(f"{number} requests into it")
            start.await_request(number, now, method="P", path="/checkpoints/")
            seconds = 0.05
        elif moment is Moment.EVALUATION:
            done = len(start.steps)
            start.await_(lambda: any(step % self._evaluate_every == 0 for step in start.steps[done:]))
            seconds = 0.4
        else:
            start.await_steps(random.randint(1, 8))
            self._request(random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)), random, start, line)
            start.await_line("stopping:")
            seconds = 0.8
        time.sleep(random.uniform(0, seconds))

    def _request(self, number: signal.Signals, random: Random, start: Start, line: Line) -> None:
        """Asks it to stop."""
        if processes := start.processes():
            name, process = random.choice(sorted(processes.items()))
            line.details.append(f"{number.name} to the {name}")
            _send(number, [process])

    def _damage(self, line: Line) -> None:
        """Changes or removes a file of the newest checkpoint, if there is another one to go on from."""
        random, good = line.kill.random, self._good()
        if len(good) < 2:
            line.details.append("there was but one")
            return
        name = good[-1]
        entry = random.choice(storage.list_files(name.url(self._output)))
        bucket, _, key = entry.url.removeprefix("s3://").partition("/")
        client = self._server.client()
        data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        how = random.choice(["one bit of", "half of", "without"])
        metadata = client.head_object(Bucket=bucket, Key=key)["Metadata"] if random.random() < 0.5 else {}
        if how == "without":
            client.delete_object(Bucket=bucket, Key=key)
        else:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            body = bytes(data[: len(data) // 2] if how == "half of" else data)
            client.put_object(Bucket=bucket, Key=key, Body=body, Metadata=metadata)
        self.damaged.add(name)
        line.details.append(f"{how} {name}/{key.rpartition('/')[2]}")

    # ---- What came of it ----

    def _judge(self, start: Start, code: int, ended_by: Line | None, before: int, known: Name | None) -> None:
        """Compares how a start has gone with what has to hold."""
        ours = self._attempt_of(before)
        assert code in self._expected_codes(ended_by, start, ours), f"exit code {code}, {ended_by}:\n{start.told()}"
        if ours is not None and ours.from_step is not None:
            arrived = self._newest_good(below=ours.number)  # a request may still have been under way
            possible = {0 if name is None else name.step for name in (known, arrived)}
            assert ours.from_step in possible, f"it went on from {ours.from_step}, not {possible}:\n{start.told()}"
            redone = max(self._last_step - ours.from_step, 0)
            self._last_step = ours.from_step
            if self.lines:
                self.lines[-1].redone_steps += redone
                self.lines[-1].first_step_seconds = start.first_step_seconds
        if start.steps:
            self._last_step = start.steps[-1]
            assert start.first_step_seconds is not None
            self._first_seconds.append(start.first_step_seconds)
            self.survivors += [f"{one}" for one in processes_of(lambda number: number < start.number)]
        if code == EXIT_STOPPED and start.steps:
            saved = self._newest_good()
            assert saved is not None and saved.step >= self._last_step, f"{saved}:\n{start.told()}"
        if ended_by is not None:
            ended_by.code = code
            if ended_by.kill.what is What.BAD_BYTES:
                self._damage(ended_by)
            self.lines.append(ended_by)
            self._say(ended_by, start)

    @staticmethod
    def _expected_codes(ended_by: Line | None, start: Start, ours: Attempt | None) -> set[int]:
        if ended_by is None:
            return {EXIT_DONE}
        what = ended_by.kill.what
        codes = {
            What.KILL_WORKER: {EXIT_FAILED},
            What.KILL_WORKERS: {EXIT_FAILED},
            What.BAD_BYTES: {EXIT_FAILED},
            What.KILL_LAUNCHER: {128 + signal.SIGKILL},
            What.KILL_SUPERVISOR: {-signal.SIGKILL},
            What.OUTAGE: set[int](),
        }.get(what, {EXIT_STOPPED})
        if ended_by.kill.moment is Moment.STOP:
            codes |= {EXIT_STOPPED, *(128 + number for number in (signal.SIGTERM, signal.SIGINT) if what in REQUESTS)}
        if ended_by.kill.moment is Moment.START_UP and ours is None and what in REQUESTS:
            codes |= {-signal.Signals[what.name], EXIT_INTERRUPTED}  # Python itself was still starting
        return codes

    def _attempt_of(self, before: int) -> Attempt | None:
        """The record of the last start, if it got as far as to write one."""
        newest = Attempts(self._output).newest()
        return newest if newest is not None and newest.number > before else None

    def _newest_attempt(self) -> int:
        return (Attempts(self._output).numbers() or [0])[-1]

    def _good(self, below: int | None = None) -> list[Name]:
        """The checkpoints that the run can go on from, by attempts with a number `below` that, the oldest first."""
        names = [name for name in list_checkpoints(self._output) if below is None or name.attempt < below]
        return [name for name in lineage(Attempts(self._output), names) if name not in self.damaged]

    def _newest_good(self, below: int | None = None) -> Name | None:
        good = self._good(below)
        return good[-1] if good else None

    def _say(self, line: Line, start: Start) -> None:
        started = "" if start.first_step_seconds is None else f"first step after {start.first_step_seconds:4.1f} s, "
        what = ": ".join([line.kill.what.value, *([", ".join(line.details)] if line.details else [])])
        became = "it went on" if line.code is None else f"exit code {line.code}"
        seconds = time.monotonic() - self._began
        step = start.steps[-1] if start.steps else self._last_step
        print(
            f"{len(self.lines):4d}/{len(self._plan)} | {seconds:6.0f} s | start {start.number:3d}: {started}"
            f"step {step:4d} | in {line.kill.moment.value}: {what} | {became}",
            flush=True,
        )

    def longest_streak(self) -> int:
        """Most starts one after the other that left no newer checkpoint."""
        attempts = Attempts(self._output)
        longest = streak = 0
        at = -1
        for number in attempts.numbers():
            one = attempts.read(number)
            step = at if one is None or one.from_step is None else one.from_step
            streak, at = (streak + 1 if step <= at else 1), max(step, at)
            longest = max(longest, streak)
        return longest

    def table(self) -> str:
        """What was done, and what came of it."""
        rows = [
            "| what | times | exit code | seconds to the first step after it, median | steps redone |",
            "|---|---|---|---|---|",
        ]
        for what in What:
            lines = [line for line in self.lines if line.kill.what is what]
            codes = Counter("went on" if line.code is None else str(line.code) for line in lines)
            seconds = [line.first_step_seconds for line in lines if line.first_step_seconds is not None]
            rows.append(
                f"| {what.value} | {len(lines)} | {', '.join(f'{code} x {n}' for code, n in codes.most_common())} | "
                f"{_median(seconds)} | {sum(one.redone_steps for one in lines)} |"
            )
        moments = Counter(line.kill.moment.value for line in self.lines)
        faults = Counter({_name_of(fault): n for fault, n in self._proxy.injected.items()})
        rows += [
            "",
            f"moments: {', '.join(f'{moment} x {n}' for moment, n in moments.most_common())}",
            f"faults of the store: {', '.join(f'{fault} x {n}' for fault, n in faults.most_common())}"
            f" in {len(self._proxy.requests)} requests",
            f"{self.starts} starts, at most {self.longest_streak()} one after the other without a newer checkpoint; "
            f"{_median(self._first_seconds)} s to the first step, median",
            f"{self._last_step} steps, {sum(one.redone_steps for one in self.lines)} redone; {self.seconds:.0f} s",
        ]
        return "\n".join(rows)


def _name_of(fault: Fault | Refusal | str) -> str:
    return fault if isinstance(fault, str) else fault.name if isinstance(fault, Fault) else str(fault.status)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "-"


def _send(number: int, processes: list[psutil.Process]) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
