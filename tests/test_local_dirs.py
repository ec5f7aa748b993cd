"""The scratch folder: it is private to the user, and the caches of the libraries are in it."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

from job.errors import UserError
from job.local_dirs import private_folder, scratch_folder, use_scratch

NOBODY = 65534
UID = os.getuid()
AS_ROOT = pytest.mark.skipif(UID != 0, reason="gives files to another user")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder like /tmp, in which everybody can make folders."""
    folder = tmp_path / "base"
    folder.mkdir()
    folder.chmod(0o1777)
    for above in takewhile(lambda one: one != Path(gettempdir()), (tmp_path, *tmp_path.parents)):
        above.chmod(0o755)  # Others cannot enter the folders of pytest.
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(0o700)
    return folder


def as_user(uid: int, work: Callable[[], Any]) -> str:
    """Return, as text, what `work` returns or raises in a child process of this user."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o7777


# ---- The folder ----


def test_missing_folders_are_made_private(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "a" / "b" / "wikillm-1", "WIKILLM_SCRATCH")
    assert [mode(folder) for folder in (made, made.parent, made.parent.parent)] == [0o700] * 3
    (made / "kept").touch()
    assert private_folder(made, "WIKILLM_SCRATCH") == made
    assert (made / "kept").exists()


def another_users(folder: Path) -> None:
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, NOBODY)


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        pytest.param(another_users, f"belongs to uid {NOBODY}, not to you (uid {UID})", marks=AS_ROOT),
        (link, "symbolic link"),
        (dangling_link, "symbolic link"),
        (open_to_all, "everybody can write to this folder (mode 0777, expected 0700)"),
        (Path.touch, "this is a file of uid"),
    ],
)
@pytest.mark.parametrize("variable", ["WIKILLM_SCRATCH", "SLURM_TMPDIR", "TMPDIR"])
def test_folder_that_is_not_private_is_refused_in_one_line(
    variable: str, plant: Callable[[Path], None], found: str, base: Path, home: Path
) -> None:
    planted = base / f"wikillm-{UID}"
    plant(planted)
    environment = {variable: str(base), "HOME": str(home), "SLURM_JOB_ID": "1"}
    with pytest.raises(UserError) as caught:
        use_scratch(print, environment)
    said = str(caught.value)
    assert said.startswith(f"{variable}: '{planted}': ") and found in said and "\n" not in said
    assert "set WIKILLM_SCRATCH to a folder" in said
    assert environment == {variable: str(base), "HOME": str(home), "SLURM_JOB_ID": "1"}


@pytest.mark.parametrize("permissions", [0o755, 0o770, 0o775])
def test_rights_of_others_are_removed_from_own_folder(permissions: int, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(permissions)
    private_folder(tmp_path / "mine", "WIKILLM_SCRATCH")
    assert mode(tmp_path / "mine") == 0o700


@AS_ROOT
def test_planted_cache_of_compiled_code_is_refused(base: Path, home: Path) -> None:
    mine = base / f"wikillm-{UID}"
    mine.mkdir()
    another_users(mine / "inductor")
    mine.chmod(0o775)
    with pytest.raises(UserError, match=rf"inductor': this folder belongs to uid {NOBODY}"):
        use_scratch(print, {"WIKILLM_SCRATCH": str(base), "HOME": str(home)})


@AS_ROOT
def test_each_user_has_a_folder_in_a_shared_base(base: Path, home: Path) -> None:
    environment = {"WIKILLM_SCRATCH": str(base), "HOME": str(home)}
    assert use_scratch(print, dict(environment)) == base / "wikillm-0"
    assert as_user(NOBODY, lambda: use_scratch(print, dict(environment))) == f"{base}/wikillm-{NOBODY}"
    assert [(mode(folder), folder.stat().st_uid) for folder in sorted(base.iterdir())] == [(0o700, 0), (0o700, NOBODY)]


@AS_ROOT
def test_folder_that_cannot_be_made_gives_one_line(base: Path) -> None:
    base.chmod(0o755)
    said = as_user(NOBODY, lambda: use_scratch(print, {"WIKILLM_SCRATCH": str(base)}))
    wrong = f"'{base}/wikillm-{NOBODY}': this folder cannot be made: Permission denied; "
    assert said.startswith(f"UserError: WIKILLM_SCRATCH: {wrong}") and "\n" not in said


@AS_ROOT
def test_command_refuses_another_users_scratch_folder(base: Path, home: Path) -> None:
    another_users(base / f"wikillm-{UID}")
    variables = {"WIKILLM_SCRATCH": str(base), "HOME": str(home), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "job", "tokenizer"]
    found = subprocess.run(command, env=variables, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (78, "")
    assert found.stderr.startswith("WIKILLM_SCRATCH: ") and found.stderr.count("\n") == 1


# ---- What is put there ----


def test_library_caches_are_in_the_scratch_folder(base: Path, home: Path) -> None:
    environment = {"WIKILLM_SCRATCH": str(base), "HOME": str(home)}
    folder = use_scratch(print, environment)
    expected = {
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "MPLCONFIGDIR": "matplotlib",
        "HF_HOME": "huggingface",
    }
    assert {name: Path(environment[name]) for name in expected} == {
        name: folder / child for name, child in expected.items()
    }
    assert {mode(folder / child) for child in (*expected.values(), "shards")} == {0o700}
    assert environment["HOME"] == str(home)


def test_torch_keeps_compiled_code_in_the_scratch_folder(
    base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    environment = {"WIKILLM_SCRATCH": str(base), "HOME": str(home)}
    folder = use_scratch(print, environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Path(cache_dir()) == folder / "inductor"


def test_variables_set_by_the_user_are_kept(base: Path, home: Path) -> None:
    own = {"TORCHINDUCTOR_CACHE_DIR": "/a", "TRITON_HOME": "/b", "HF_HOME": "/c", "MPLCONFIGDIR": "/d"}
    environment = {"WIKILLM_SCRATCH": str(base), "HOME": str(home)} | own
    before = dict(environment)
    use_scratch(print, environment)
    assert environment == before


def test_hub_cache_in_the_home_folder_is_kept(base: Path, home: Path) -> None:
    (home / ".cache" / "huggingface").mkdir(parents=True)
    environment = {"WIKILLM_SCRATCH": str(base), "HOME": str(home)}
    use_scratch(print, environment)
    assert "HF_HOME" not in environment


def test_home_writable_by_everybody_is_replaced(base: Path) -> None:
    """In the image, /scratch is both the home folder and the scratch base."""
    (base / ".cache" / "huggingface").mkdir(parents=True)
    (base / ".aws").mkdir()
    (base / ".aws" / "credentials").touch()
    environment = {"WIKILLM_SCRATCH": str(base), "HOME": str(base)}
    folder = use_scratch(print, environment)
    assert environment["HOME"] == str(folder / "home") and mode(folder / "home") == 0o700
    assert environment["HF_HOME"] == str(folder / "huggingface")
    assert "AWS_SHARED_CREDENTIALS_FILE" not in environment


@AS_ROOT
def test_unwritable_home_is_replaced_and_credentials_are_found(base: Path, home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").touch()
    home.chmod(0o755)

    def replaced() -> tuple[list[str], str, str, str]:
        said: list[str] = []
        environment = {"TMPDIR": str(base), "HOME": str(home)}
        use_scratch(said.append, environment)
        again = scratch_folder(environment)[0]
        return said, environment["HOME"], environment["AWS_SHARED_CREDENTIALS_FILE"], str(again)

    folder = f"{base}/wikillm-{NOBODY}"
    line = f"HOME: '{home}' cannot be written: {folder}/home is used as the home folder"
    expected = ([line], f"{folder}/home", f"{home}/.aws/credentials", folder)
    assert as_user(NOBODY, replaced) == str(expected)


@AS_ROOT
def test_uid_without_passwd_entry_gets_a_scratch_folder(base: Path) -> None:
    folder = f"{base}/wikillm-1234567"
    assert as_user(1234567, lambda: use_scratch(print, {"TMPDIR": str(base)})) == folder
