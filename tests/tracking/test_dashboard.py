"""Test SwanLab's local dashboard: `swanlab watch` in a real process, read with a real browser."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import free_port
from tracked_run import begin, end

from job.runs.run import new_run_id

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_SECONDS = 20

pytestmark = [
    pytest.mark.recovery,
    pytest.mark.skipif(
        importlib.util.find_spec("swanboard") is None,
        reason="the dashboard is not installed: pip install 'swanlab[dashboard]'",
    ),
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard that shows one run with two attempts."""
    folder = tmp_path_factory.mktemp("watched")
    run_id = new_run_id()
    end(begin(folder, {}, mode="local", run_id=run_id, ending="STOPPED"))
    run = end(begin(folder, {}, mode="local", run_id=run_id, first_step=10))
    port = free_port()
    program, *arguments = shlex.split(run.how_to_watch)
    command = [str(Path(program).absolute()), *arguments, "-p", str(port)]
    with (folder / "watch.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, folder / "watch.log")
        yield address
    finally:
        process.kill()  # SIGTERM would let it wait for open connections of the browser
        process.wait()


def wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until `address` answers; fail with the content of `log` if the process ends or the deadline passes."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def look(address: str, *expected: str) -> str:
    """Return the page as the browser has built it, once it contains all texts in `expected`."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --window-size=1400,1000 --virtual-time-budget=10000"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        with tempfile.TemporaryDirectory() as profile:
            command = [str(BROWSER), *flags.split(), f"--user-data-dir={profile}", "--dump-dom", address]
            page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        missing = [text for text in expected if text not in page]
        if not missing:
            return page
        assert time.monotonic() < deadline, f"not on the page: {missing}"


def test_first_page_shows_the_project_and_every_attempt(dashboard: str) -> None:
    page = look(dashboard, "WikiLLM", ">a run<", ">a run-2<")
    assert "Crashed" not in page, "the first attempt stopped because it was asked to"
    assert "Finished" in page


def test_project_charts_draw_all_attempts_in_one_colour(dashboard: str) -> None:
    page = look(f"{dashboard}/charts", "train/loss", "train/learning_rate", "lc-legend-item")
    colours = re.findall(r'lc-legend-item" style="color: (rgb\(.+?\))', page)
    assert len(colours) == 6, "three charts with two attempts each"
    assert len(set(colours)) == 1


def test_run_page_shows_its_charts_and_texts(dashboard: str) -> None:
    page = look(f"{dashboard}/experiment/1/chart", "train/loss", "train/learning_rate", "samples", "北京市", "首都")
    assert page.count("<canvas") == 3, "one chart for each number"
