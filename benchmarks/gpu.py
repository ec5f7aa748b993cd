"""Measure the tutorial's model on a GPU: first correctness, then the speed and the time of each optimization.

    python -m benchmarks.gpu [--budget SECONDS] [--json FILE] [--trace FOLDER] [--tiny]

It needs the job's packages, but no network and no data: the tokens are random. With torch, transformers and accelerate
alone, the rows of the job's engine are missing. Each row is measured in its own process (`benchmarks/gpu_case.py`), so
that no memory is left from another row. A row that fails, or that needs a package that is not installed, says so. The
most important rows come first (`benchmarks/gpu_plan.py`); a row that would not fit into the rest of the budget is left
out and says so. Last come what the results decide (`benchmarks/gpu_conclusions.py`) and the table of training. The exit
code is 1 if a loss or a gradient is wrong.

``--tiny`` is for a machine without a GPU: it runs every row that a CPU can do, in seconds. Its numbers mean nothing.
"""

import argparse
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from benchmarks import gpu_plan
from benchmarks.gpu_conclusions import conclusions
from benchmarks.gpu_plan import ENGINE, Case
from benchmarks.gpu_tables import Result, tables

REPOSITORY = Path(__file__).parent.parent
BUDGET_SECONDS = 360.0
CHILD = ("-m", "benchmarks.gpu_case")
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "DS_IGNORE_CUDA_DETECTION": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""Variables of the processes that measure, as the job sets them for its workers (`job/launcher/supervisor.py`), unless
the user has set them."""
MANY_CPUS = 8
"""With this many CPUs, the next process imports its libraries while one measures."""


class Measurer:
    """Run cases in other processes, one at a time.

    Args:
        budget_seconds: Seconds for all cases, counted from now.
        shares: Whether one process does as many cases as possible. Tiny cases need this: otherwise most of their time
            would be the import of libraries.
        looks_ahead: Whether the next process imports its libraries while one measures. This needs many cores.
    """

    def __init__(self, budget_seconds: float, *, shares: bool, looks_ahead: bool) -> None:
        self._ends_at = time.monotonic() + budget_seconds
        self._shares, self._looks_ahead = shares, looks_ahead
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._ready: dict[str, subprocess.Popen[bytes]] = {}
        self._results = list[Result]()

    def measure(self, case: Case) -> Result:
        """Return the fields of `case` with its measurements, or with `why` there are none; never raises."""
        began = time.monotonic()
        left_seconds, expected = self._ends_at - began, gpu_plan.expected_seconds(case, self._results)
        if left_seconds < expected:
            left = f"{max(0, left_seconds):.0f} s of the budget were left, and it takes about {expected:.0f} s"
            return {**asdict(case), "why": f"left out: {left}"}
        limit = min(left_seconds, case.limit_seconds)
        # Accelerate can set up only one strategy in a process, so each strategy needs its own process.
        role = case.trainer if self._shares and case.trainer in ENGINE else ""
        child = self._ready.pop(role, None) or self._start()
        keeps_child = self._shares
        start_of_log = self._log.seek(0, os.SEEK_END)
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):  # If the process has ended, the read below sees the end of the file.
                child.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
                child.stdin.flush()
            if self._looks_ahead:
                self._ready[role] = self._start()
            if not select.select([child.stdout], [], [], limit)[0]:
                keeps_child = False
                measured = {"why": f"stopped after {limit:.0f} s{', with its compilation' * case.compiles}"}
            elif answer := child.stdout.readline():
                measured = json.loads(answer)
            else:
                keeps_child = False
                measured = {"why": f"its process exited with {child.wait()}: {self._last_line(start_of_log)}"}
        finally:
            if keeps_child:
                self._ready[role] = child
            else:
                _kill(child)
        result = {**asdict(case), **measured, "took_seconds": time.monotonic() - began}
        self._results.append(result)
        return result

    def close(self) -> None:
        """Kill the processes that wait for a case."""
        while self._ready:
            _kill(self._ready.popitem()[1])

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *CHILD],
            cwd=REPOSITORY,
            # Show the process only one GPU: transformers' Trainer would use all of them.
            env=ENVIRONMENT
            | os.environ
            | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # The compiler's processes are in the same session and are killed with it.
        )

    def _last_line(self, start: int) -> str:
        """Return the last line that is not empty in the log from byte `start` on."""
        self._log.seek(start)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _kill(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def is_wrong(result: Result) -> bool:
    """Return True if a check failed: an error is above its tolerance, or our own loss was not checked at all."""
    if result["kind"] != "check":
        return False
    is_ours_unchecked = "why" in result and result["loss"] == "ours"
    return is_ours_unchecked or not all(error["is_right"] for error in result.get("errors", []))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases, print the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_SECONDS,
        metavar="SECONDS",
        help="seconds for all rows (default: %(default).0f)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file to write all measurements to, updated after each row"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="folder to write the profiler's traces of a step to"
    )
    parser.add_argument("--tiny", action="store_true", help="use sizes for a CPU, to test that the script works")
    options = parser.parse_args(arguments)

    began = time.monotonic()
    cases, results = list[Case](), list[Result]()
    looks_ahead = not options.tiny and (os.cpu_count() or 1) >= MANY_CPUS
    measurer = Measurer(options.budget, shares=options.tiny, looks_ahead=looks_ahead)

    def measure(new_cases: list[Case]) -> None:
        for case in map(gpu_plan.shrunk, new_cases) if options.tiny else new_cases:
            result = measurer.measure(case)
            cases.append(case)
            results.append(result)
            speed = f"{result['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in result else "done"
            outcome = result.get("why") or speed
            print(
                f"{time.monotonic() - began:4.0f} s  {case.model} {case.context_length:,} {case.name}: {outcome}",
                flush=True,
            )
            write(conclusions=[])

    def write(**concluded: object) -> None:
        if options.json:
            content = {"date": f"{datetime.date.today()}", "seconds": time.monotonic() - began, "rows": results}
            options.json.write_text(json.dumps(content | concluded, indent=1, ensure_ascii=False) + "\n")

    for folder in filter(None, (options.trace, options.json and options.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        measure(gpu_plan.first_cases())
        default, zero2 = (
            gpu_plan.as_measured(next(case for case in cases if case.trainer == trainer), results) for trainer in ENGINE
        )
        measure(gpu_plan.deciding_cases(default, zero2, options.trace))
        measure(gpu_plan.lever_cases())
        measure(gpu_plan.other_cases(gpu_plan.best_case(cases, results)))
    finally:
        measurer.close()
    concluded = conclusions(results)
    write(conclusions=[conclusion._asdict() for conclusion in concluded])
    wrong = [result["name"] for result in results if is_wrong(result)]
    machine = next((result["machine"] for result in results if "machine" in result), "unknown machine")
    print("\n".join(tables(results, concluded)))
    print(f"\n{machine}, {datetime.date.today()}; {time.monotonic() - began:.0f} s")
    print(f"WRONG or not checked: {', '.join(wrong)}" if wrong else "all checks passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # Exit through `finally`.
    sys.exit(main())
