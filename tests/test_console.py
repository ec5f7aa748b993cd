"""Standard streams that cannot be written: commands go on, and lost output is reported on the other stream."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import REPOSITORY

from job.errors import EXIT_DONE, EXIT_REFUSED
from job.report import Report

CLOSED = "it is closed"


def start(program: str, redirection: str = "", **environment: str) -> "subprocess.Popen[bytes]":
    """Run Python code after `console.install()`, with a redirection of the shell."""
    installed = f"from job import console; console.install()\n{program}"
    return subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, installed],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


def end(process: "subprocess.Popen[bytes]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", "?? ? ?"), ("ascii:strict", "?? ? ?"), ("gbk:strict", "北京 ? ?"), ("utf-8", "北京 ñ ?")],
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_character_missing_in_the_encoding_is_replaced(stream: str, encoding: str, expected: str) -> None:
    program = f"import sys; print('北京 ñ \\udcff', file=sys.{stream})"
    process = start(program, PYTHONIOENCODING=encoding)
    out, err = process.communicate(timeout=120)
    shown, other = (out, err) if stream == "stdout" else (err, out)
    assert (process.returncode, other) == (EXIT_DONE, b"")
    assert shown.decode(encoding.partition(":")[0]) == f"{expected}\n"


@pytest.mark.parametrize(("redirection", "why"), [(">/dev/full", "No space left on device"), (">&-", CLOSED)])
def test_lost_output_is_reported_on_the_other_stream(redirection: str, why: str) -> None:
    program = "import sys\nfor i in range(3): print(i, flush=True)\nsys.stderr.write('still here\\n')\nsys.exit(75)"
    code, out, err = end(start(program, redirection))
    assert (code, out) == (75, "")
    assert err.splitlines() == [
        f"standard output cannot be written ({why}); the command goes on without it",
        "still here",
        f"standard output has lost 3 lines (6 bytes): {why}",
    ]
    other_way_round = program.replace("flush=True", "file=sys.stderr").replace("stderr.write", "stdout.write")
    code, out, err = end(start(other_way_round, f"2{redirection}"))
    assert (code, err) == (75, "")
    assert "still here" in out.splitlines()
    assert f"standard error has lost 3 lines (6 bytes): {why}" in out.splitlines()


@pytest.mark.parametrize("redirection", [">&- 2>&-", ">/dev/full 2>&1", "<&- >&- 2>/dev/full"])
def test_process_without_streams_ends_normally(redirection: str) -> None:
    program = "import sys\nfor i in range(3): print(i); print(i, file=sys.stderr)\nsys.exit(75)"
    assert end(start(program, redirection)) == (75, "", "")


def test_process_survives_when_its_reader_exits() -> None:
    program = "import select\nprint('first', flush=True)\ngone = select.poll(); gone.register(1, 0); gone.poll()\n"
    program += "print('more', flush=True)\nprint('last')"
    process = start(program)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=120) == EXIT_DONE
    assert err.startswith("standard output cannot be written (Broken pipe); the command goes on without it\n")
    assert err.endswith("standard output has lost 2 lines (10 bytes): Broken pipe\n")


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        f"import os, subprocess, sys\nfile = open({str(tmp_path / 'data')!r}, 'w')\nprint('lost')\n"
        "os.system('echo lost as well 2>/dev/null')\n"
        "subprocess.run([sys.executable, '-c', 'print(123)'], stderr=subprocess.DEVNULL)\n"
        "file.write('kept'); file.close()"
    )
    code, _, err = end(start(program, "<&- >&-"))
    assert code == EXIT_DONE
    assert (tmp_path / "data").read_text() == "kept"
    assert err.endswith(f"standard output has lost 1 line (5 bytes): {CLOSED}\n")


def test_nonblocking_pipe_is_waited_for() -> None:
    program = "import os\nos.set_blocking(1, False)\nprint('x' * 1_000_000, flush=True)"
    process = start(program)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"  # The process is now waiting for its reader.
    code, out, err = end(process)
    assert (code, len(out), err) == (EXIT_DONE, 1_000_000, "")


def test_idle_reader_is_waited_for_only_once() -> None:
    program = (
        "import sys, time\nconsole.wait_at_most(0.5)\nbegan = time.monotonic()\n"
        "for i in range(1000): print('x' * 999, flush=True)\n"
        "seconds = time.monotonic() - began\nsys.stderr.write(f'{seconds}\\n')\nsys.stderr.flush()\n"
        "while console._installed[0]._is_stuck: print('y', flush=True); time.sleep(0.01)"
    )
    process = start(program)
    assert process.stdout is not None and process.stderr is not None
    first, seconds = process.stderr.readline().decode(), float(process.stderr.readline())
    assert first == "standard output cannot be written (nobody has read it for 0.5 s); the command goes on without it\n"
    assert seconds < 60, "it must wait only once, not for each line"
    code, out, err = end(process)
    assert code == EXIT_DONE
    assert out.endswith("y\n"), "output is written again once the pipe is read"
    lost = int(err.split("has lost ")[1].split(" lines")[0])
    assert lost > 800


# ---- Commands ----


@pytest.mark.parametrize(
    ("command", "redirection", "environment", "code"),
    [
        ("--help", ">/dev/full", {}, EXIT_DONE),
        ("train --print-config", ">&-", {"PYTHONIOENCODING": "ascii"}, EXIT_DONE),
        ("train --nonsense 长城", "2>&-", {"PYTHONIOENCODING": "gbk"}, EXIT_REFUSED),
    ],
)
def test_commands_survive_broken_streams(
    command: str, redirection: str, environment: dict[str, str], code: int
) -> None:
    ended = subprocess.run(
        ["bash", "-c", f'exec "$0" -m job {command} {redirection}', sys.executable],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == code
    said = ended.stdout + ended.stderr
    assert b"cannot be written" in said and b" lost " in said
    assert b"Traceback" not in said


@pytest.mark.parametrize("command", ["--help", "train --help", "train --print-config"])
def test_reader_of_printed_settings_may_exit_early(command: str) -> None:
    ended = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -m job {command} | true', sys.executable],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (EXIT_DONE, b"", b"")


def test_undecodable_argument_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "job", "train", "--run.name", b"\xff\xfe"],
        cwd=REPOSITORY,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == EXIT_REFUSED
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("command line: b'\\xff\\xfe': ")


def test_brackets_and_colons_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    names: Any = ["[/x] :100: [red]a[/red]", "[/y]", ":smile: [b]"]
    report = Report()
    report.table(names[0], [(names[1], names[2])])
    report.say(names[2])
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert out.splitlines()[-1] == names[2]
