"""Kills a run at random moments, and starts it again like a launcher, until it is done."""

import signal
import statistics
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
from chaos_start import PATIENCE_SECONDS, Start, processes_of
from fault_proxy import SLOW_DOWN, Fault, FaultProxy, Refusal

from job import storage
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint import CheckpointName
from job.runs.checkpoint_list import lineage, list_checkpoints

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
"""Faults of the store during the whole run, in about one of twenty requests."""
_LONGEST_SECONDS = 3600
"""Longest time for all the steps that are left after the last kill."""
_UPLOAD_REQUESTS = 30
"""Approximate number of requests of one checkpoint: three files in two parts each, small files, deleting old ones."""


class Moment(Enum):
    """When a run is killed."""

    START_UP = "start-up"
    STEP = "a step"
    UPLOAD = "an upload"
    EVALUATION = "an evaluation"
    STOP = "a stop"


class KillKind(Enum):
    """How a run is killed."""

    KILL_WORKER = "SIGKILL to one worker"
    KILL_WORKERS = "SIGKILL to all workers"
    KILL_LAUNCHER = "SIGKILL to the launcher"
    KILL_SUPERVISOR = "SIGKILL to the supervisor"
    SIGTERM = "SIGTERM to any process"
    SIGINT = "SIGINT to any process"
    SIGUSR1 = "SIGUSR1 to any process"
    OUTAGE = "S3 outage"
    BAD_BYTES = "SIGKILL to all workers, and a damaged checkpoint"


REQUESTS = (KillKind.SIGTERM, KillKind.SIGINT, KillKind.SIGUSR1)


@dataclass(frozen=True)
class Kill:
    """One planned kill of the run."""

    moment: Moment
    what: KillKind
    random: Random = field(repr=False)
    """Generator for the other choices: which process, and how long after the moment."""


def plan(runs: int, seed: int) -> list[Kill]:
    """Return this number of kills, with each kind and each moment equally often, in random order and combination."""
    random = Random(seed)

    def shuffled(choices: list[Any]) -> Iterator[Any]:
        while True:
            yield from random.sample(choices, len(choices))

    moments, whats = shuffled(list(Moment)), shuffled(list(KillKind))
    drawn = [[next(moments), next(whats)] for _ in range(runs)]
    # The job survives an outage, so the next kill cannot be at the start-up.
    for before, after in reversed(list(pairwise(drawn))):
        if before[1] is KillKind.OUTAGE and after[0] is Moment.START_UP:
            before[0], after[0] = after[0], before[0]
    return [Kill(moment, what, Random(random.random())) for moment, what in drawn]


@dataclass
class KillResult:
    """The result of a kill."""

    kill: Kill
    details: list[str] = field(default_factory=list)
    """Random choices of the kill, in words."""
    code: int | None = None
    """Exit code of the start that was killed; None: it went on."""
    first_step_seconds: float | None = None
    """Seconds that the next start needed to its first step."""
    redone_steps: int = 0
    """Steps that the next start had to repeat."""


class Chaos:
    """Starts a run again and again, kills it as planned, and checks each start.

    Args:
        output: `run.output`.
        settings: settings file of the run.
        evaluate_every: `evaluate.every` in these settings.
        kills: the planned kills.
        server: the S3 server.
        proxy: the proxy through which the run uses the server.
        scratch: folder for temporary files of the run.
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
        self.lines: list[KillResult] = []
        self.starts = 0
        self.damaged: set[CheckpointName] = set()
        self.survivors: list[str] = []
        """Processes of a killed start that were still alive at the first step of the next start."""
        self._began = time.monotonic()
        self._last_step = 0
        self._first_seconds: list[float] = []
        self.seconds = 0.0

    def run(self) -> None:
        """Start the run again until it is done."""
        code: int | None = None
        while code != EXIT_DONE:
            code = self._start()
        self.seconds = time.monotonic() - self._began
        assert not self._left, f"the run was done after {len(self._plan) - len(self._left)} kills: give it more steps"

    def _start(self) -> int:
        before, known = self._newest_attempt(), self._newest_good()
        self.starts += 1
        start = Start(self.starts, self._settings, self._proxy, self._scratch)
        ended_by: KillResult | None = None
        try:
            while ended_by is None and self._left:
                kill = self._left[0]
                line = KillResult(kill)
                self._wait_for(kill.moment, kill.random, start, line)
                if not start.is_alive and kill.moment is not Moment.STOP:
                    break  # The job has ended by itself, so the run must be done.
                self._left.pop(0)
                if self._do(kill, line, start):
                    ended_by = line
                else:
                    self.lines.append(line)
                    self._say(line, start)
            code = start.end(PATIENCE_SECONDS if ended_by is not None else _LONGEST_SECONDS)
        except BaseException:
            print(start.output(), flush=True)
            raise
        finally:
            with suppress(ProcessLookupError):
                start.process.kill()
        self._judge(start, code, ended_by, before, known)
        return code

    # ---- One kill ----

    def _do(self, kill: Kill, line: KillResult, start: Start) -> bool:
        """Do a kill now. Returns True if it ends the job."""
        random = kill.random
        if kill.what is KillKind.OUTAGE:
            seconds = random.uniform(1, 6)
            line.details.append(f"{seconds:.1f} s")
            self._proxy.start_outage()
            time.sleep(seconds)
            self._proxy.end_outage()
            return kill.moment is Moment.STOP or not start.is_alive
        if kill.what in REQUESTS:
            self._request(signal.Signals[kill.what.name], random, start, line)
        elif kill.what in (KillKind.KILL_WORKERS, KillKind.BAD_BYTES):
            _send(signal.SIGKILL, start.workers())
        elif kill.what is KillKind.KILL_WORKER:
            workers = start.workers()
            _send(signal.SIGKILL, workers and [random.choice(workers)])
        elif kill.what is KillKind.KILL_LAUNCHER:
            _send(signal.SIGKILL, start.launcher())
        else:
            start.process.kill()
        return True

    def _wait_for(self, moment: Moment, random: Random, start: Start, line: KillResult) -> None:
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
            start.wait_until(lambda: any(step % self._evaluate_every == 0 for step in start.steps[done:]))
            seconds = 0.4
        else:
            start.await_steps(random.randint(1, 8))
            self._request(random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)), random, start, line)
            start.await_line("stopping:")
            seconds = 0.8
        time.sleep(random.uniform(0, seconds))

    def _request(self, number: signal.Signals, random: Random, start: Start, line: KillResult) -> None:
        """Ask a random process of the job to stop."""
        if processes := start.processes():
            name, process = random.choice(sorted(processes.items()))
            line.details.append(f"{number.name} to the {name}")
            _send(number, [process])

    def _damage(self, line: KillResult) -> None:
        """Damage or remove a file of the newest checkpoint, if there is another one to resume from."""
        random, good = line.kill.random, self._good()
        if len(good) < 2:
            line.details.append("there was only one")
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

    # ---- Results ----

    def _judge(
        self, start: Start, code: int, ended_by: KillResult | None, before: int, known: CheckpointName | None
    ) -> None:
        """Assert that a start ended as expected."""
        ours = self._attempt_of(before)
        assert code in self._expected_codes(ended_by, start, ours), f"exit code {code}, {ended_by}:\n{start.output()}"
        if ours is not None and ours.from_step is not None:
            arrived = self._newest_good(below=ours.number)  # A request may have been on its way.
            possible = {0 if name is None else name.step for name in (known, arrived)}
            assert ours.from_step in possible, f"it went on from {ours.from_step}, not {possible}:\n{start.output()}"
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
            assert saved is not None and saved.step >= self._last_step, f"{saved}:\n{start.output()}"
        if ended_by is not None:
            ended_by.code = code
            if ended_by.kill.what is KillKind.BAD_BYTES:
                self._damage(ended_by)
            self.lines.append(ended_by)
            self._say(ended_by, start)

    @staticmethod
    def _expected_codes(ended_by: KillResult | None, start: Start, ours: Attempt | None) -> set[int]:
        if ended_by is None:
            return {EXIT_DONE}
        what = ended_by.kill.what
        codes = {
            KillKind.KILL_WORKER: {EXIT_FAILED},
            KillKind.KILL_WORKERS: {EXIT_FAILED},
            KillKind.BAD_BYTES: {EXIT_FAILED},
            KillKind.KILL_LAUNCHER: {128 + signal.SIGKILL},
            KillKind.KILL_SUPERVISOR: {-signal.SIGKILL},
            KillKind.OUTAGE: set[int](),
        }.get(what, {EXIT_STOPPED})
        if ended_by.kill.moment is Moment.STOP:
            codes |= {EXIT_STOPPED, *(128 + number for number in (signal.SIGTERM, signal.SIGINT) if what in REQUESTS)}
        if ended_by.kill.moment is Moment.START_UP and ours is None and what in REQUESTS:
            codes |= {-signal.Signals[what.name], EXIT_INTERRUPTED}  # Python was still starting.
        return codes

    def _attempt_of(self, before: int) -> Attempt | None:
        """Return the record of the last start; None if it did not write one."""
        newest = Attempts(self._output).newest()
        return newest if newest is not None and newest.number > before else None

    def _newest_attempt(self) -> int:
        return (Attempts(self._output).numbers() or [0])[-1]

    def _good(self, below: int | None = None) -> list[CheckpointName]:
        """Return the undamaged checkpoints to resume from, by attempts below `below`, the oldest first."""
        names = [name for name in list_checkpoints(self._output) if below is None or name.attempt < below]
        return [name for name in lineage(Attempts(self._output), names) if name not in self.damaged]

    def _newest_good(self, below: int | None = None) -> CheckpointName | None:
        good = self._good(below)
        return good[-1] if good else None

    def _say(self, line: KillResult, start: Start) -> None:
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
        """Return the largest number of starts in a row that made no newer checkpoint."""
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
        """Return the kills and their results as a Markdown table."""
        rows = [
            "| kill | times | exit code | median seconds to the first step of the next start | steps redone |",
            "|---|---|---|---|---|",
        ]
        for what in KillKind:
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
            f"{self.starts} starts, at most {self.longest_streak()} in a row without a newer checkpoint; "
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
