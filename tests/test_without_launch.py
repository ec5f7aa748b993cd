"""The image has only job/ and configs/: every module imports there, and `check --place` names the missing checks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import REPOSITORY

from job.errors import EXIT_REFUSED

PLACES = ("swanlab", "kubernetes", "kubernetes/spot", "slurm")
PROGRAM = """
import contextlib, importlib, io, json, pathlib, sys
names = [".".join(path.with_suffix("").parts) for path in sorted(pathlib.Path("job").rglob("*.py"))]
modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
for module in modules:
    importlib.import_module(module)
from job.cli import main
checks = {}
for place in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["check", "--place", place, *sys.argv[2:]])
    checks[place] = [code, printed.getvalue()]
launch = [name for name in sys.modules if name.partition(".")[0] == "launch"]
print(json.dumps({"modules": modules, "launch": launch, "checks": checks}))
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the image."""
    folder = tmp_path_factory.mktemp("image")
    for name in ("job", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python that imports from the folder, and not from this repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SWANLAB"))}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "SWANLAB_ROOT": str(folder / "nobody")},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def seen(image: Path) -> dict[str, Any]:
    """Imported modules, and exit code and output of `check` for each place."""
    places = ("--data.shards", str(image / "shards"), "--run.output", str(image / "run"))
    done = python(image, "-c", PROGRAM, json.dumps(PLACES), "--config", "configs/demo.yaml", *places)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_module_of_job_imports_without_launch(seen: dict[str, Any]) -> None:
    assert {"job.cli", "job.training.train", "job.launcher.worker", "job.preflight.check"} < set(seen["modules"])
    assert seen["launch"] == []


@pytest.mark.parametrize("place", PLACES)
def test_check_says_that_launch_checks_are_missing(place: str, seen: dict[str, Any]) -> None:
    code, printed = seen["checks"][place]
    assert code == EXIT_REFUSED, "the data set does not exist"
    assert f"the checks of {place} are not available here" in " ".join(printed.split())


def test_error_inside_launch_is_not_taken_for_its_absence(image: Path, tmp_path: Path) -> None:
    shutil.copytree(image, tmp_path / "broken")
    (tmp_path / "broken" / "launch" / "checks").mkdir(parents=True)
    (tmp_path / "broken" / "launch" / "checks" / "__init__.py").write_text("import no_such_package")
    done = python(tmp_path / "broken", "-m", "job", "check", "--place", "slurm", "--config", "configs/demo.yaml")
    assert "No module named 'no_such_package'" in done.stderr
