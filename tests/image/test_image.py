"""Tests of the built image: it is pushed, pulled by its digest, and trains, stops and resumes as any user."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from job import storage
from job.demo.server import S3Server
from job.runs.metrics_file import read_metrics
from tests.image.registry import Registry
from tests.image.stand_in import REPOSITORY, SECRET, Engine, build_image, engine
from tests.small_run import prepare_sample, write_settings

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

ANY_USER = "54321:54321"
STEPS = 60
_RUN_SECONDS = 240


@dataclass(frozen=True)
class Published:
    """The image on another engine, which pulled it by its digest."""

    docker: Engine
    reference: str
    pushed: str
    """Last line that `push` printed."""
    registry: Registry

    def start(self, *words: str, user: str = "10001:0", more: str = "", **variables: str) -> subprocess.Popen[str]:
        """Start the image as `make run` does: no root, no capabilities, and only /tmp and scratch are writable."""
        variables |= {"REFERENCE": self.reference, "RUN_ARGS": f"--user {user} {more}"}
        return subprocess.Popen(
            [REPOSITORY / "launch/image.sh", "run", *words],
            env=os.environ | self.docker.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def configuration(self) -> dict:
        """Return the configuration of the image."""
        return json.loads(self.docker("image", "inspect", self.reference).stdout)[0]["Config"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("published")
    with Registry(folder) as registry:
        name = {"REGISTRY": registry.address, "IMAGE": "team/wikillm", "TAG": "tried"}
        with engine() as here:
            build_image(here, **name)
            pushed = here.make("push", **name).splitlines()[-1]
        try:
            with engine(folder / "elsewhere") as elsewhere:
                elsewhere("pull", "--quiet", pushed, timeout=600)
                yield Published(elsewhere, pushed, pushed, registry)
        finally:
            shutil.rmtree(folder / "elsewhere")


def test_push_prints_the_digest_that_the_registry_has(published: Published) -> None:
    assert (
        published.pushed
        == f"{published.registry.address}/team/wikillm@{published.registry.digest('team/wikillm', 'tried')}"
    )


def test_labels_contain_the_git_revision(published: Published) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    labels = published.configuration()["Labels"]
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == head.stdout.strip()
    assert "unknown" not in labels.values()


def test_image_starts_the_entrypoint_and_not_as_root(published: Published) -> None:
    configuration = published.configuration()
    assert configuration["User"] == "10001:0"
    assert configuration["Entrypoint"] == ["tini", "--", "python", "-m", "job"]
    assert (configuration["WorkingDir"], configuration["Volumes"]) == ("/app", {"/scratch": {}})


def test_sbom_lists_the_locked_packages(published: Published) -> None:
    with published.start("/app/sbom.cdx.json", more="--entrypoint cat") as process:
        components = json.load(process.stdout)["components"]
    listed = {component["name"].lower().replace("_", "-"): component["version"] for component in components}
    lock = (REPOSITORY / "requirements-image.lock").read_text()
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", lock, re.MULTILINE))
    assert {name: version.partition("+")[0] for name, version in listed.items()}.items() <= locked.items()
    assert {
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "swanlab",
        "s3fs",
        "modelscope",
        "tensorboard",
    } <= listed.keys()


def test_libraries_that_the_image_adds_can_be_loaded(published: Published) -> None:
    script = """
import ctypes, glob
for library in ("libibverbs.so.1", "librdmacm.so.1"):
    ctypes.CDLL(library)
assert glob.glob("/usr/lib/*/libibverbs/libmlx5-rdmav*.so"), "no driver for the cards"
from modelscope import snapshot_download
from torch.utils.tensorboard import SummaryWriter
print("all")
"""
    with published.start("-c", script, more="--entrypoint python") as process:
        output = process.communicate(timeout=_RUN_SECONDS)[0]
    assert output.splitlines()[-1] == "all", output


def test_no_layer_contains_a_build_secret(published: Published) -> None:
    layers = published.docker.folder / "data/overlay2"
    found = subprocess.run(["grep", "-rlF", SECRET, layers], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, ""), "grep finds nothing"
    history = published.docker("history", "--no-trunc", published.reference).stdout
    assert "ENTRYPOINT" in history
    assert "netrc" not in history


@pytest.mark.parametrize("user", ["10001:0", ANY_USER])
def test_any_user_can_compile_kernels_and_write_only_to_scratch(published: Published, user: str) -> None:
    script = """
        id -u; id -g
        awk '/^(CapEff|CapBnd|NoNewPrivs)/ { print $2 }' /proc/self/status
        awk '$2 == "/" { print substr($4, 1, 2) }' /proc/mounts
        touch /tmp/x "$HOME/x" "$WIKILLM_SCRATCH/x"
        python -c 'import getpass; print(getpass.getuser())'
        for tool in gcc tini; do command -v $tool >/dev/null || echo "has no $tool"; done
        for tool in pip uv make g++ nvcc git; do command -v $tool; done
        echo '#include <Python.h>' | gcc -shared -fPIC -x c - -o /tmp/x.so \\
            -I"$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
        ls / | grep '[.]sh$'
        cd / && python -m job --version >/dev/null 2>&1; python -c 'import job; print(job.__file__)'
    """
    uid, gid = user.split(":")
    with published.start("-c", script, user=user, more="--entrypoint sh", SCRATCH=f"of-{uid}") as process:
        lines = process.communicate(timeout=_RUN_SECONDS)[0].splitlines()
    assert lines == [uid, gid, "0000000000000000", "0000000000000000", "1", "ro", "wikillm", "/app/job/__init__.py"]


def test_sigterm_exits_75_and_another_user_can_finish_the_run(
    published: Published, s3_server: S3Server, tmp_path: Path
) -> None:
    data = prepare_sample(s3_server, tmp_path)
    output = f"{s3_server.create_bucket('image')}/run"
    settings = write_settings(tmp_path, data, output)
    settings.chmod(0o644)
    mounted = f"--volume {settings}:/settings.yaml:ro"
    words = (
        "train",
        "--config",
        "/settings.yaml",
        "--data.cache_dir",
        "null",  # The job then uses its private folder in /scratch.
        "--train.max_steps",
        f"{STEPS}",
    )

    with published.start(*words, more=f"{mounted} --name first") as first:
        printed = read_until(first, "step 5/")
        stopped_at = time.monotonic()
        published.docker("stop", "--time=120", "first")
        printed += first.communicate(timeout=_RUN_SECONDS)[0]
    assert first.returncode == 75, printed
    assert time.monotonic() - stopped_at < 60
    started = storage.read_bytes(storage.join(output, "run.json"))
    before = read_metrics(output)

    with published.start(*words, user=ANY_USER, SCRATCH="of-another-user", more=mounted) as second:
        printed = second.communicate(timeout=_RUN_SECONDS)[0]
    assert second.returncode == 0, printed
    assert storage.read_bytes(storage.join(output, "run.json")) == started
    rows = read_metrics(output)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert rows[: len(before)] == before
    assert 5 <= len([row for row in before if "train/loss" in row]) < STEPS
    assert storage.exists(storage.join(output, "final/model.safetensors"))


def test_pin_base_writes_the_digest_of_the_registry(published: Published, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a base")
    base = f"{published.registry.address}/cuda:13"
    with subprocess.Popen(["tar", "-c", "-C", tmp_path, "file"], stdout=subprocess.PIPE) as files:
        published.docker("import", "-", base, stdin=files.stdout)
    published.docker("push", base)
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"# a comment\nARG BASE_IMAGE={base}\nFROM ${{BASE_IMAGE}}\n")
    for _ in range(2):  # A pinned base can be pinned again.
        published.docker.make("pin-base", DOCKERFILE=str(dockerfile))
        digest = published.registry.digest("cuda", "13")
        assert dockerfile.read_text() == f"# a comment\nARG BASE_IMAGE={base}@{digest}\nFROM ${{BASE_IMAGE}}\n"


def read_until(process: subprocess.Popen[str], beginning: str) -> str:
    """Read the output up to the line that begins with `beginning`, and return it."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(beginning):
            return output
    raise AssertionError(f"no line began with {beginning!r}:\n{output}")
