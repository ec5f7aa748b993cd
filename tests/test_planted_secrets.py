"""All commands, run with secrets in URLs, settings and environment: no output and no file contains one of them."""

import base64
import gzip
import http.server
import io
import os
import secrets
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from small_run import MODEL, REPOSITORY
from swanlab.sdk.internal.core_python.store import DataStoreReader

from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED

pytestmark = pytest.mark.recovery


def planted(name: str) -> str:
    """Return a secret that does not occur anywhere by chance."""
    return f"planted-{name}-{secrets.token_hex(6)}"


IN_URLS = {name: planted(name) for name in ("password", "signature", "session", "stop", "again", "resume", "wrong")}
IN_ENVIRONMENT = {
    name: planted(name.lower().replace("_", "-"))
    for name in (
        *("HF_TOKEN", "SWANLAB_API_KEY", "MODELSCOPE_API_TOKEN", "WANDB_API_KEY", "MY_SERVICE_SECRET"),
        *("DB_PASSWORD", "GITHUB_TOKEN"),
    )
}
IN_A_VARIABLES_URL = planted("index")
CRASH = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).with_name("leaking_crash")), str(REPOSITORY)])}


@dataclass
class Walk:
    """Runs commands, and keeps their exit codes and output."""

    folder: Path
    web: str
    server: S3Server
    codes: dict[str, int] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)

    def source(self, signature: str = IN_URLS["signature"]) -> str:
        signed = f"X-Amz-Security-Token={IN_URLS['session']}&X-Amz-Signature={signature}"
        return f"{self.web.replace('//', '//bob:' + IN_URLS['password'] + '@')}/wiki.jsonl?id=5&{signed}"

    def settings(self) -> Path:
        tree = {
            "run": {"output": "s3://planted/run", "name": f"with {IN_ENVIRONMENT['MY_SERVICE_SECRET']}"},
            "data": {
                "source": self.source(),
                "shards": "s3://planted/shards",
                "cache_dir": str(self.folder / "written" / "cache"),
                "slice_bytes": 65536,
                "processes": 2,
            },
            "tokenizer": {"source": str(self.folder / "written" / "tokenizer"), "vocab_size": 400},
            "model": MODEL,
            "train": {
                "processes": 1,
                "strategy": "ddp",
                "precision": "fp32",
                "context_length": 32,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "max_steps": 4,
                "warmup_steps": 1,
                "log_every": 1,
                "stop_file": f"{self.web}/stop?sig={IN_URLS['stop']}&se=2030&sp=r&sv=1",
            },
            "checkpoint": {"every": 2},
            "evaluate": {"every": 2, "max_windows": 4},
            "generate": {"prompts": [f"北京 {IN_ENVIRONMENT['DB_PASSWORD']}"], "max_new_tokens": 4},
            "tracking": {"mode": "offline", "log_dir": str(self.folder / "written" / "swanlog")},
        }
        path = self.folder / "settings.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True))
        return path

    def run(self, what: str, *words: str, **environment: str) -> None:
        path = self.folder / "settings.yaml"
        done = subprocess.run(
            [sys.executable, "-m", *words[:1], *words[1:2], "--config", str(path), *words[2:]],
            cwd=self.folder / "written",
            env=os.environ
            | IN_ENVIRONMENT
            | {
                "PYTHONPATH": str(REPOSITORY),
                "PIP_INDEX_URL": f"https://bob:{IN_A_VARIABLES_URL}@example.com/simple",
                "SWANLAB_ROOT": str(self.folder / "written" / "swanlab"),
                "LEAKED_URL": self.source(),
            }
            | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        self.codes[what], self.printed[what] = done.returncode, done.stdout


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that ignores the query of a URL, and logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def walk(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The result of all commands, run one after the other."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "written").mkdir()
    (folder / "web").mkdir()
    (folder / "web" / "wiki.jsonl").write_bytes(SAMPLE.read_bytes())
    s3_server.create_bucket("planted")
    handler = partial(Quiet, directory=str(folder / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        walk = Walk(folder, f"http://127.0.0.1:{server.server_port}", s3_server)
        walk.settings()
        walk.run("tokenizer", "job", "tokenizer", "--data.source", str(SAMPLE))
        walk.run("prepare", "job", "prepare")
        walk.run("new signature", "job", "prepare", "--data.source", walk.source(IN_URLS["again"]))
        walk.run("check", "job", "check")
        walk.run("train", "job", "train")
        walk.run("evaluate", "job", "evaluate")
        walk.run("generate", "job", "generate")
        walk.run("print", "job", "train", "--print-config")
        gone = walk.source(IN_URLS["wrong"]).replace("wiki.jsonl", "gone.jsonl")
        walk.run("no corpus", "job", "prepare", "--data.source", gone, "--data.shards", "s3://planted/other")
        resume = f"{walk.web}/gone?token={IN_URLS['resume']}"
        walk.run("no checkpoint", "job", "train", "--train.resume", resume, "--run.output", "s3://planted/resumed")
        walk.run("a wrong value", "job", "train", "--train.max_steps", walk.source(IN_URLS["wrong"]))
        walk.run("a wrong name", "job", "train", f"--{walk.source(IN_URLS['wrong'])}", "1")
        walk.run("submit", "launch.swanlab", "submit", "--dry-run", "--data.shards", walk.source())
        walk.run("a crash", "job", "train", "--run.output", "s3://planted/crashed", **CRASH)
        walk.run("a crash of prepare", "job", "prepare", "--data.shards", "s3://planted/c", LEAKS_IN="prepare", **CRASH)
        yield walk
        server.shutdown()


@pytest.fixture(scope="module")
def stored(walk: Walk) -> dict[str, bytes]:
    """Content of every file written on this machine and in the store; compressed files also unpacked."""
    found = {str(path): path.read_bytes() for path in (walk.folder / "written").rglob("*") if path.is_file()}
    client = walk.server.client()
    for item in client.list_objects_v2(Bucket="planted")["Contents"]:
        answer = client.get_object(Bucket="planted", Key=item["Key"])
        found[f"s3://planted/{item['Key']}"] = answer["Body"].read() + str(answer["Metadata"]).encode()
    for name, content in list(found.items()):
        if content.startswith(b"\x1f\x8b"):
            found[f"{name}, unpacked"] = gzip.decompress(content)
        elif content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                found |= {f"{name}, {one}": archive.read(one) for one in archive.namelist()}
        elif name.endswith(".swanlab"):
            reader = DataStoreReader()
            reader.open(name)
            found[f"{name}, its records"] = b"".join(reader)
            reader.close()
    return found


def spellings(walk: Walk) -> dict[str, str]:
    """Return the name of each secret, by its spelling as text, in a URL and in base64."""
    keys = {name: walk.server.environment[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")}
    values = IN_URLS | IN_ENVIRONMENT | keys | {"PIP_INDEX_URL": IN_A_VARIABLES_URL}
    basic = base64.b64encode(f"bob:{IN_URLS['password']}".encode()).decode()
    return {
        spelled: name
        for name, value in (values | {"basic": basic}).items()
        for spelled in {value, quote(value, safe=""), base64.b64encode(value.encode()).decode()}
    }


def test_every_command_has_the_expected_exit_code(walk: Walk) -> None:
    assert walk.codes == {
        **dict.fromkeys(("tokenizer", "prepare", "new signature", "check", "train", "evaluate", "generate"), EXIT_DONE),
        "print": EXIT_DONE,
        **dict.fromkeys(("no corpus", "no checkpoint", "a wrong value", "a wrong name", "submit"), EXIT_REFUSED),
        "a crash": EXIT_FAILED,
        "a crash of prepare": EXIT_FAILED,
    }, walk.printed


def test_printed_output_holds_no_secret(walk: Walk) -> None:
    known = spellings(walk).items()
    found = {what: {name for spelled, name in known if spelled in text} for what, text in walk.printed.items()}
    assert {what: names for what, names in found.items() if names} == {}


def test_written_files_hold_no_secret(walk: Walk, stored: dict[str, bytes]) -> None:
    known = spellings(walk).items()
    found = {place: {name for spelled, name in known if spelled.encode() in text} for place, text in stored.items()}
    assert {place: names for place, names in found.items() if names} == {}


def test_texts_that_mention_secrets_were_checked(walk: Walk, stored: dict[str, bytes]) -> None:
    shown = f"{walk.web.replace('//', '//***@')}/wiki.jsonl?id=5&***"
    for name in ("run/run.json", "run/final/README.md", "crashed/attempts/00000001.json"):
        assert shown.encode() in stored[f"s3://planted/{name}"], name
    assert any("state.json" in place and shown.encode() in content for place, content in stored.items())
    assert any("swanlog" in place and shown.encode() in content for place, content in stored.items())
    assert b'"wiki.jsonl?id=5"' in stored["s3://planted/shards/plan.json"]
    for what in ("print", "no corpus", "a wrong value", "a crash", "a crash of prepare"):
        assert "***" in walk.printed[what], what
    assert all("Traceback" in walk.printed[what] for what in ("a crash", "a crash of prepare"))
