"""The direction of imports in `job`: each part imports only earlier parts."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import REPOSITORY

ORDER = (
    ("errors",),
    ("config",),
    ("storage", "tracking", "model"),
    ("data",),
    ("runs",),
    ("run_report",),
    ("training",),
    ("launcher",),
    ("preflight",),
    ("demo",),
    ("init", "trying"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""The parts of `job`, in the order of import. Parts in the same line do not import each other."""
WINGS = [part for line in ORDER for part in line if (REPOSITORY / "job" / part).is_dir()]
LEVEL = {part: level for level, line in enumerate(ORDER) for part in line}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the parts of `job` that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "job":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("job."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("job."))


def part_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "job").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "job").rglob("*.py")), ids=lambda path: path.stem)
def test_file_imports_only_earlier_parts(path: Path) -> None:
    part = part_of(path)
    for imported in imports_of(path):
        if imported == part or imported not in LEVEL:
            continue
        # A file that is not listed in the order, such as job/report.py, is below all wings.
        assert LEVEL[imported] < LEVEL.get(part, LEVEL["storage"]), f"{path} imports job.{imported}"


@pytest.mark.parametrize("wing", WINGS)
def test_wing_imports_alone(wing: str) -> None:
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((REPOSITORY / "job" / wing).glob("*.py"))
    ]
    later = {part for part, level in LEVEL.items() if level > LEVEL[wing]}
    script = "import importlib, sys\n"
    script += f"[importlib.import_module(one) for one in {modules}]\n"
    script += f"print([name for name in sys.modules if name.startswith('job.') and name.split('.')[1] in {later}])\n"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


def test_no_two_files_of_job_have_the_same_name() -> None:
    names = [path.name for path in (REPOSITORY / "job").rglob("*.py") if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_one_module_of_models_and_training_names_cuda() -> None:
    names = re.compile(r"torch\.cuda|\.is_cuda|backends\.cuda|[\"'](?:cuda|nccl)[\"']")
    naming = {
        path.name
        for wing in ("model", "training")
        for path in (REPOSITORY / "job" / wing).glob("*.py")
        if names.search(path.read_text(encoding="utf-8"))
    }
    assert naming == {"gpu.py"}
