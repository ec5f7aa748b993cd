"""Names of test functions: short enough to read in a report."""

import ast

from small_run import REPOSITORY

LONGEST_NAME = 65
"""Characters of a test function's name, with ``test_``."""


def test_test_names_have_at_most_65_characters() -> None:
    names = [
        node.name
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 500
    assert [name for name in names if len(name) > LONGEST_NAME] == []


def test_tests_that_need_a_gpu_are_all_in_one_folder() -> None:
    marked = {
        path.parent.name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if "pytest.mark." + "gpu" in path.read_text(encoding="utf-8")
    }
    assert marked == {"gpu"}, "`pytest -m gpu` reads no other folder"
    unmarked = [
        path.name for path in (REPOSITORY / "tests/gpu").glob("test_*.py") if "pytestmark" not in path.read_text()
    ]
    assert unmarked == []
