"""Disks that are full, read-only or forbidden: one line that names the path and the setting, and exit code 78."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import GOOD, _job, _lines, _options

from job import cli, commands
from job import config as settings
from job.errors import EXIT_REFUSED, disk_error
from job.setting_origin import name_setting

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Function that mounts a disk of `kilobytes` in memory, filled until only `left` bytes are free."""
    with ExitStack() as closing:

        def mounted(name: str, kilobytes: int = 64, left: int | None = None, option: str = "rw") -> Path:
            folder = tmp_path / name
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"{option},size={kilobytes}k,mode=777", "tmpfs", str(folder)]
            if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip("only root can mount a disk")
            closing.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            if left is not None:
                (folder / "fill").write_bytes(bytes(kilobytes * 1024 - left))
            return folder

        yield mounted


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings with an existing corpus and tokenizer."""
    folder = tmp_path_factory.mktemp("right")
    (folder / "wiki.jsonl").write_bytes(_lines(GOOD))
    options = _options(folder)
    assert _job("tokenizer", options, {})[0] == 0
    return options


def assert_one_line(ended: tuple[int, str], *words: str) -> None:
    code, said = ended
    assert (code, said.count("\n")) == (EXIT_REFUSED, 1), said
    assert all(word in said for word in words), said


# ---- Whole commands ----


def test_full_tmpdir_error_names_tmpdir(right: dict[str, str], tmp_path: Path, mount: Mount) -> None:
    small = mount("small", left=8192)
    options = right | {"tokenizer.source": str(tmp_path / "tokenizer")}
    assert_one_line(_job("tokenizer", options, {"TMPDIR": str(small)}), f"TMPDIR: '{small}", "no space left")
    assert not (tmp_path / "tokenizer").exists()


def test_disk_that_fills_up_keeps_no_part_of_a_tokenizer(right: dict[str, str], mount: Mount) -> None:
    written = Path(right["tokenizer.source"], "tokenizer.json").stat().st_size
    place = mount("place", kilobytes=256, left=-(-written // 4096) * 4096)  # The first file fits, and nothing else.
    options = right | {"tokenizer.source": f"{place}/tokenizer"}
    assert_one_line(_job("tokenizer", options, {}), f"tokenizer.source: '{place}/tokenizer/", "no space left")
    assert not list((place / "tokenizer").iterdir())


def test_unusable_tmpdir_is_reported(right: dict[str, str], tmp_path: Path, mount: Mount) -> None:
    options = right | {"tokenizer.source": str(tmp_path / "tokenizer")}
    full = mount("full", left=0)
    expected = f"TMPDIR: '{full}': cannot be written (full or read-only?); temporary files go to /tmp\n"
    assert _job("tokenizer", options, {"TMPDIR": str(full)}) == (0, expected)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_read_only_shards_error_names_the_setting(right: dict[str, str], mount: Mount, processes: str) -> None:
    place = mount("place", option="ro")
    options = right | {"data.shards": f"{place}/shards", "data.processes": processes}
    assert_one_line(_job("prepare", options, {}), f"data.shards: '{place}/shards'", "read-only")


def test_demo_in_a_read_only_folder_gives_one_line(mount: Mount) -> None:
    place = mount("place", option="ro")
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(
        [sys.executable, "-m", "job", "demo"], cwd=place, env=environment, capture_output=True, text=True
    )
    assert_one_line((ended.returncode, ended.stderr), "demo-output", "read-only")


@pytest.mark.recovery
def test_workers_error_names_a_read_only_output(right: dict[str, str], mount: Mount, tmp_path: Path) -> None:
    place = mount("place", option="ro")
    options = right | {"data.shards": str(tmp_path / "shards"), "run.output": f"{place}/run"}
    assert _job("prepare", options, {})[0] == 0
    assert_one_line(_job("train", options, {}), f"run.output: '{place}/run", "read-only")


# ---- Errors of the operating system become one line ----


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EROFS, "x", "/out/run/run.json"),
            "run.output: '/out/run/run.json': the file system is read-only",
        ),
        (PermissionError(errno.EACCES, "x", "/out/run"), "run.output: '/out/run': permission denied"),
        (OSError(errno.ENOSPC, "x", "/out/shards/a"), "data.shards: '/out/shards/a': no space left on the disk"),
        (OSError(errno.EDQUOT, "x", "relative/a"), "tracking.log_dir: 'relative/a': the disk quota is used up"),
        (OSError(errno.ENOSPC, "x", "/tmpdir/wikillm-1/a"), "TMPDIR: '/tmpdir/wikillm-1/a': no space left"),
        (OSError(errno.EACCES, "x", "/elsewhere"), "/elsewhere: permission denied"),
        (
            NotADirectoryError(errno.ENOTDIR, "x", "/out/run/a"),
            "run.output: '/out/run/a': a part of this path is a file",
        ),
        (Exception("No space left on device (os error 28)"), "a disk of this machine: no space left on the disk"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/a']"), "TMPDIR: '/tmpdir': no folder for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_disk_error_names_its_setting(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    monkeypatch.setenv("TMPDIR", "/tmpdir")
    tree: dict[str, Any] = {"run": {"output": "/out/run"}, "data": {"shards": "/out/shards"}}
    config = settings.build(tree | {"tracking": {"log_dir": "relative"}})
    found = disk_error(error)
    assert found is not None
    assert str(name_setting(config, found)).startswith(said)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "x", "/out"), OSError(errno.EBADF, "x"), KeyError("x"), PermissionError("s3"),
     ConnectionRefusedError(errno.ECONNREFUSED, "x"), FileExistsError(errno.EEXIST, "x", "s3://bucket/key")],
    ids=repr,
)  # fmt: skip
def test_possible_program_error_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert disk_error(error) is None

    def failing(*_: object) -> int:
        raise error

    monkeypatch.setattr(commands, "prepare", failing)
    with pytest.raises(type(error)):
        cli.main(["prepare"])


def test_disk_error_ends_a_command_with_one_line_and_78(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.ENOSPC, "x", "runs/a/run.json")

    monkeypatch.setattr(commands, "prepare", failing)
    assert cli.main(["prepare", "--run.output", "runs/a"]) == EXIT_REFUSED
    expected = "run.output: 'runs/a/run.json': no space left on the disk; free some space, or name another folder\n"
    assert capsys.readouterr().err == expected
