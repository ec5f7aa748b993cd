"""The public workflow, the hooks for commits, the issue forms and the changelog agree with the repository."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from printed_commands import REPOSITORY

from job import __version__
from job.cli import COMMANDS, parse

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
HOOKS = REPOSITORY / ".pre-commit-config.yaml"


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


# ---- The workflow ----


def test_workflow_calls_lint_and_test_and_only_existing_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    runs = [step["run"].split() for workflow in WORKFLOWS for step in steps_of(workflow) if "run" in step]
    assert {words[0] for words in runs} == {"make"}
    called = {word for words in runs for word in words[1:]}
    assert {"lint", "test"} <= called <= targets


def test_workflow_pins_its_actions_and_may_only_read() -> None:
    for workflow in WORKFLOWS:
        assert read(workflow)["permissions"] == {"contents": "read"}
        used = [step["uses"] for step in steps_of(workflow) if "uses" in step]
        assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", one) for one in used)


def test_workflow_tests_every_python_that_setup_accepts() -> None:
    tested = [job["strategy"]["matrix"]["python"] for job in read(WORKFLOWS[0])["jobs"].values()]
    accepted = re.search(r"case \$version in (.*?)\) ;;", text_of("launch/setup.sh"))
    assert accepted and tested == [accepted[1].split(" | ")]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", "workflows/*.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/*_*.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_files_for_github_follow_its_schemas(schema: str, files: str) -> None:
    paths = sorted((REPOSITORY / ".github").glob(files))
    assert paths
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    ended = subprocess.run([*check, *paths], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# ---- Hooks before a commit ----


def test_hooks_are_local_and_call_what_lint_calls() -> None:
    repos = read(HOOKS)["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}, "any other language downloads its environment"
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    lint = text_of("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    called = {line.replace("$(RUN) -m", "").split()[0].replace("_", "-") for line in lint.splitlines()[1:]}
    assert called == {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks} - {"python"}


def commit(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, env=variables | {"HOME": str(folder)}
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the project's hooks switched on, and the tools of this environment in .venv."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in (HOOKS.name, "pyproject.toml"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / HOOKS.name).unlink()
    (folder / HOOKS.name).write_text(HOOKS.read_text())
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".gitignore").write_text(".venv\n")
    assert commit(folder, "init").returncode == 0
    install = [sys.executable, "-m", "pre_commit", "install"]
    installed = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return folder


def test_hooks_stop_a_commit_with_bad_style_only(clone: Path) -> None:
    (clone / "good.py").write_text('"""A file."""\n')
    (clone / "script.sh").write_text("#!/bin/sh\necho ready\n")
    commit(clone, "add", "good.py", "script.sh", HOOKS.name)
    accepted = commit(clone, "commit", "-m", "Add a file")
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    (clone / "bad.py").write_text('"""A file."""\n\nimport os\n')
    (clone / "script.sh").write_text("#!/bin/sh\necho $1\n")
    commit(clone, "add", "bad.py", "script.sh")
    refused = commit(clone, "commit", "-m", "Add another")
    assert refused.returncode == 1
    assert "F401" in refused.stderr and "SC2086" in refused.stderr
    assert commit(clone, "log", "--format=%s").stdout == "Add a file\n"


# ---- Issue forms and changelog ----


def test_bug_report_asks_for_commands_that_exist() -> None:
    form = read(REPOSITORY / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")
    fields = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    assert all(fields[name]["validations"]["required"] for name in ("what", "version", "check", "settings"))
    asked = [match for part in fields.values() for match in re.findall(r"-m job ([^`]+)`", str(part))]
    assert asked == ["--version", "check --config FILE", "train --config FILE --print-config"]
    for words in asked:
        arguments = parse(words.split())
        assert arguments.wants_version or arguments.command in COMMANDS


def test_changelog_has_this_version_and_the_next() -> None:
    headings = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.M)
    assert headings[0] == "Unreleased"
    versions = [heading.partition(" ")[0] for heading in headings[1:]]
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def test_tools_of_hooks_and_lint_are_in_the_dev_lock() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    pinned = [one for one in project["optional-dependencies"]["dev"] if "==" in one]
    locked = set(text_of("requirements-dev.lock").splitlines())
    assert {"pre-commit", "check-jsonschema", "ruff"} <= {one.partition("==")[0] for one in pinned}
    assert [one for one in pinned if one not in {line.replace("_", "-") for line in locked}] == []
