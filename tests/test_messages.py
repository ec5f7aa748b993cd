"""docs/messages.md: the program prints every message of the page as it stands there, and ends with the page's code."""

import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from newcomer import GOOD, SETTINGS, Newcomer, Printed
from small_run import REPOSITORY, Job
from store_stand_ins import PLAIN, stand_in

from job import cli, commands, storage
from job.cli import parse
from job.config import Tracking, load, settings
from job.data.manifest import load_manifest
from job.errors import EXIT_DONE, EXIT_FAILED, NoProgress, UserError
from job.invocation import python
from job.launcher import device, signals
from job.model.spec import ModelSpec
from job.preflight import check
from job.runs.attempts import Attempts
from job.runs.checkpoint import TrainingState
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.compatibility import compatibility_key
from job.runs.run import begin_run
from job.runs.run_status import RunStatus
from job.runs.world import World
from job.storage import retry
from job.tracking import make_trackers
from job.training.engine import Engine
from job.training.hang_detector import HangDetector

PAGES = ("docs/messages.md", "docs/messages.zh.md")
ENDLESS = {"train__max_steps": 1_000_000, "train__epochs": 1_000_000}
GOES_ON = None
"""Exit code of a message after which the command goes on."""


# ---- The pages ----


@dataclass(frozen=True)
class Message:
    """An entry of the page."""

    name: str
    code: str
    """Exit codes in the table of contents, or – if the command goes on."""
    blocks: tuple[str, ...]
    """The messages as they are printed, each on one line, with … for what differs."""


def messages_of(page: str) -> list[Message]:
    """Return the entries of a page from top to bottom."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    codes = dict(re.findall(r"^\| \[[^\]]+\]\(#([\w-]+)\) \|[^|]+\| ([\d, ]+|–) \|$", text, re.MULTILINE))
    _, *parts = re.split(r'^<a id="([\w-]+)"></a>$', text, flags=re.MULTILINE)
    names, bodies = parts[::2], parts[1::2]
    assert list(codes) == names, "the table of contents differs from the page"
    return [
        Message(name, codes[name], tuple(map(_on_one_line, re.findall(r"^```text\n(.*?)^```$", body, re.M | re.S))))
        for name, body in zip(names, bodies, strict=True)
    ]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def is_printed(block: str, printed: str) -> bool:
    """Return True if a line of `printed` is this message; … stands for anything."""
    pattern = ".+?".join(map(re.escape, block.split("…")))
    folder = python().removesuffix("python")
    lines = printed.replace(folder, ".venv/bin/").splitlines()
    return any(re.fullmatch(pattern, _on_one_line(line)) for line in lines)


# ---- A newcomer's folder ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, tokenizer and shards that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "wiki.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GOOD))
    words = ["--data.source", f"{folder}/wiki.jsonl", "--tokenizer.source", f"{folder}/tokenizer"]
    words += ["--tokenizer.vocab_size", "300", "--data.shards", f"{folder}/shards", "--data.processes", "1"]
    assert cli.main(["prepare", *words]) == EXIT_DONE
    storage.configure(storage.StoreOptions())
    return folder


@pytest.fixture
def newcomer(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    default_store: None,
) -> Iterator[Newcomer]:
    subprocess.run(["cp", "-r", f"{prepared}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(check, "_LOG_WIDTH", 2000)  # Each row of `check` on one line.
    # These would change how this process handles signals.
    monkeypatch.setattr(signals, "hold", lambda: None)
    monkeypatch.setattr(commands, "StopRequests", lambda: None)
    newcomer = Newcomer(tmp_path, monkeypatch, capfd, lambda: request.getfixturevalue("s3_server"))
    with newcomer.closing:
        yield newcomer


# ---- How each message is caused ----

Cause = Callable[[Newcomer], list[Printed]]
CASES: dict[str, Cause] = {}
SLOW: set[str] = set()
"""Messages that only a run prints, which takes long to start."""


def message(name: str, is_slow: bool = False) -> Callable[[Cause], Cause]:
    """Register the function that causes the messages of an entry, one for each of its blocks."""

    def register(cause: Cause) -> Cause:
        CASES[name] = cause
        if is_slow:
            SLOW.add(name)
        return cause

    return register


def goes_on(printed: Printed) -> Printed:
    """Return what a command printed before it went on and succeeded."""
    assert printed.code == EXIT_DONE, printed.text
    return Printed(GOES_ON, printed.text)


def ended(job: Job) -> Printed:
    """Wait until a command has ended."""
    code, out, err = job.end()
    return Printed(code, out + err)


@message("unknown-setting")
def _(newcomer: Newcomer) -> list[Printed]:
    return [newcomer.runs("train", train__per_device_train_batch_size=8)]


@message("no-corpus")
def _(newcomer: Newcomer) -> list[Printed]:
    return [newcomer.runs("prepare", data__source="data/no-such-file.json")]


@message("text-field")
def _(newcomer: Newcomer) -> list[Printed]:
    return [newcomer.runs("prepare", data__text_field="content", data__shards=f"{newcomer.folder}/new")]


@message("not-utf-8")
def _(newcomer: Newcomer) -> list[Printed]:
    path = newcomer.folder / "wiki.jsonl"
    path.write_bytes(path.read_text(encoding="utf-8").encode("gb18030"))
    return [newcomer.runs("prepare", data__shards=f"{newcomer.folder}/new")]


@message("hub")
def _(newcomer: Newcomer) -> list[Printed]:
    newcomer.environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    shards = f"{newcomer.folder}/new"
    return [
        newcomer.runs("prepare", data__source="fjcanyue/wikipedia-zh-cn", data__shards=shards),
        newcomer.runs("prepare", tokenizer__source="Qwen/Qwen2-0.5B", data__shards=shards),
    ]


@message("no-tokenizer")
def _(newcomer: Newcomer) -> list[Printed]:
    folder = newcomer.folder
    return [goes_on(newcomer.runs("prepare", tokenizer__source=f"{folder}/new", data__shards=f"{folder}/new-shards"))]


@message("another-data-set")
def _(newcomer: Newcomer) -> list[Printed]:
    return [newcomer.runs("prepare", data__seed=1)]


@message("disk-full")
def _(newcomer: Newcomer) -> list[Printed]:
    disk = newcomer.folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a disk")
    newcomer.closing.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
    (disk / "fill").write_bytes(bytes(2**16))
    return [newcomer.runs("prepare", data__shards=f"{disk}/shards")]


@message("store-key")
def _(newcomer: Newcomer) -> list[Printed]:
    shards = f"{newcomer.bucket()}/shards"
    newcomer.environment(AWS_SECRET_ACCESS_KEY="a-wrong-key-of-a-test")
    wrong_key = newcomer.runs("prepare", data__shards=shards)
    newcomer.environment(AWS_ENDPOINT_URL="http://no-such-host.invalid")
    newcomer.monkeypatch.setattr(retry, "UNREACHABLE_SECONDS", 0.5)
    return [wrong_key, newcomer.runs("prepare", data__shards=shards)]


@message("conditional-writes")
def _(newcomer: Newcomer) -> list[Printed]:
    bucket = newcomer.bucket()
    shop = newcomer.closing.enter_context(stand_in(PLAIN, newcomer.start_server()))
    newcomer.environment(no_proxy="127.0.0.1", http_proxy=shop.address)
    return [newcomer.runs("prepare", data__shards=f"{bucket}/shards", store__endpoint_url=shop.endpoint_url)]


@message("no-shards")
def _(newcomer: Newcomer) -> list[Printed]:
    return [newcomer.runs("train", data__shards=f"{newcomer.folder}/none")]


@message("gpu")
def _(newcomer: Newcomer) -> list[Printed]:
    newcomer.environment(CUDA_VISIBLE_DEVICES="0")
    newcomer.monkeypatch.setattr(device, "_probe_in_subprocess", device.probe_gpus)
    unusable = newcomer.runs("train")
    newcomer.gpu("NVIDIA GeForce RTX 3090", 24576, "8.6", driver="550.54.15")
    return [unusable, newcomer.runs("check")]


@message("bf16")
def _(newcomer: Newcomer) -> list[Printed]:
    newcomer.gpu("Tesla T4", 15360, "7.5")
    return [newcomer.runs("check", train__precision="bf16")]


@message("global-batch")
def _(newcomer: Newcomer) -> list[Printed]:
    return [newcomer.runs("train", train__global_batch_size=5, train__processes=2)]


@message("warm-up")
def _(newcomer: Newcomer) -> list[Printed]:
    return [goes_on(newcomer.runs("check", train__warmup_steps=20))]


@message("no-checkpoint")
def _(newcomer: Newcomer) -> list[Printed]:
    return [goes_on(newcomer.runs("check", checkpoint__every=500))]


@message("swanlab-key")
def _(newcomer: Newcomer) -> list[Printed]:
    newcomer.monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    newcomer.environment(SWANLAB_SAVE_DIR=str(newcomer.folder), HOME=str(newcomer.folder))
    with pytest.raises(UserError) as refused:
        make_trackers(Tracking(mode="cloud"))
    return [Printed(refused.value.exit_code, str(refused.value))]


@message("port", is_slow=True)
def _(newcomer: Newcomer) -> list[Printed]:
    with socket.create_server(("", 0)) as other:
        newcomer.environment(WIKILLM_NODES="2", WIKILLM_NODE_RANK="0", MASTER_ADDR="127.0.0.1")
        newcomer.environment(MASTER_PORT=str(other.getsockname()[1]))
        return [newcomer.trains(train__node_timeout="1s")]


@message("out-of-memory", is_slow=True)
def _(newcomer: Newcomer) -> list[Printed]:
    """The second message is made by the engine's own function; `training/test_blow_up.py` lets a step run out of it."""
    newcomer.gpu("NVIDIA GeForce RTX 4090", 24564, "8.9")
    large = {"model__hidden_size": 1024, "model__num_hidden_layers": 24, "train__context_length": 2048}
    planned = newcomer.runs("check", **large, train__micro_batch_size=32, train__global_batch_size=32)
    newcomer.monkeypatch.undo()
    size = SimpleNamespace(micro_batch_size=32)
    engine = SimpleNamespace(strategy=size, smaller_micro_batches=[8, 16], device=torch.device("cuda"))
    full = Engine.does_not_fit(engine)  # type: ignore[arg-type]
    with newcomer.starts(**ENDLESS) as job:
        job.read_until("step ")
        job.workers()[0].kill()
        return [planned, Printed(full.exit_code, str(full)), ended(job)]


@message("hang")
def _(newcomer: Newcomer) -> list[Printed]:
    said: list[str] = []
    noticed = threading.Event()
    alone = World(rank=0, local_rank=0, world_size=1, local_world_size=1)
    detector = HangDetector(alone, 0.5, lambda line: (said.append(line), noticed.set())[1])
    assert noticed.wait(60)
    detector.close()
    return [Printed(EXIT_FAILED, said[0])]


@message("skipped-steps", is_slow=True)
def _(newcomer: Newcomer) -> list[Printed]:
    rates = {"train__learning_rate": 1e12, "train__min_learning_rate": 1e12, "train__max_skipped_steps": 4}
    printed = newcomer.trains(**rates)
    return [printed, printed]


@message("stopped", is_slow=True)
def _(newcomer: Newcomer) -> list[Printed]:
    with newcomer.starts(**ENDLESS) as job:
        job.read_until("step ")
        job.process.send_signal(signal.SIGTERM)
        return [ended(job)]


@message("changed-settings")
def _(newcomer: Newcomer) -> list[Printed]:
    config = load(str(newcomer.file()))
    manifest = load_manifest(config.data.shards)
    identity = compatibility_key(config.train, config.data, ModelSpec(**config.model.model_dump()), manifest)
    record = begin_run(config.run.output, None, {})
    attempt = Attempts(config.run.output).claim(record.id, "a-start", None, "auto")
    state = TrainingState(record.id, attempt.number, 10, 40, 640, identity, {})
    tensors = {key: torch.zeros(2) for key in ("param", "exp_avg", "exp_avg_sq")}
    save_checkpoint(config.run.output, state, {"weight": tensors}, b"")
    return [newcomer.runs("check", model__hidden_size=32)]


@message("taken-over", is_slow=True)
def _(newcomer: Newcomer) -> list[Printed]:
    with newcomer.starts(**ENDLESS) as job:
        job.read_until("step ")
        attempts = Attempts(f"{newcomer.folder}/run")
        older = attempts.newest()
        assert older is not None
        attempts.claim(older.run_id, "a-later-start", None, "auto")
        return [ended(job)]


@message("no-progress")
def _(newcomer: Newcomer) -> list[Printed]:
    attempts = Attempts(f"{newcomer.folder}/run")
    for number in range(3):
        attempt = attempts.claim("a-run", f"start-{number}", None, "auto")
        attempts.update(dataclasses.replace(attempt, from_step=500, ended=RunStatus.FAILED, error="something"))
    with pytest.raises(NoProgress) as refused:
        attempts.check_progress("a-run", 500, limit=3)
    return [Printed(refused.value.exit_code, str(refused.value))]


# ---- The tests ----


def test_both_pages_have_the_same_messages_in_the_same_order() -> None:
    english, chinese = map(messages_of, PAGES)
    assert english == chinese


def test_every_message_of_the_page_has_a_case_and_the_reverse() -> None:
    names = [entry.name for entry in messages_of(PAGES[0])]
    assert len(names) == 25
    assert set(names) == set(CASES) and len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.recovery] if name in SLOW else []) for name in CASES]
)
def test_message_is_printed_as_on_the_page(newcomer: Newcomer, name: str) -> None:
    [entry] = [entry for entry in messages_of(PAGES[0]) if entry.name == name]
    found = CASES[name](newcomer)
    assert len(found) == len(entry.blocks)
    for block, printed in zip(entry.blocks, found, strict=True):
        assert is_printed(block, printed.text), f"{block}\n\n{printed.text}"
        assert "Traceback" not in printed.text
    codes = dict.fromkeys("–" if printed.code is GOES_ON else str(printed.code) for printed in found)
    assert entry.code == ", ".join(codes)


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_the_page_have_only_known_settings(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    names = {setting.name for setting in settings()}
    typed = re.findall(r"`[^`\n]*-m job ([^`\n]+)`", re.sub(r"^```text\n.*?^```$", "", text, flags=re.M | re.S))
    assert typed
    for words in typed:
        assert {name for name, _ in parse(shlex.split(words)).overrides} <= names, words
    sections = "|".join(SETTINGS)
    named = set(re.findall(rf"`(?:--)?((?:{sections}|store)\.[a-z_]+)", text))
    assert named <= names
