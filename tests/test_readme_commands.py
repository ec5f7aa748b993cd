"""Every command of both READMEs: run as it stands there, in a fresh shell, or excused by a reason beside it."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from printed_commands import REASONS, REPOSITORY, Block, blocks_of, checkout, run_in_fresh_shell

from job import config as settings
from job.cli import parse
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import train_tokenizer
from job.demo.walk import SAMPLE

PAGES = ("README.md", "README.zh.md")
COMMANDS = [block for block in blocks_of(PAGES[0]) if block.kind == "bash"]
RUN_HERE = [block for block in COMMANDS if not block.needs and block.after is None]
MINE = """\
run: {output: data/runs/mine}
data: {shards: data/shards, cache_dir: cache}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 48}
train: {context_length: 32, micro_batch_size: 2, global_batch_size: 8, warmup_steps: 2, max_steps: 20, precision: fp32}
checkpoint: {every: 10}
tracking: {mode: disabled}
"""
"""What a reader has in configs/mine.yaml."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a reader's own settings and a small data set."""
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    (folder / "configs" / "mine.yaml").write_text(MINE)
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))
    recipe = Recipe(str(SAMPLE), "text", "id", "stop", slice_bytes=2**20, validation_fraction=0.1, seed=2333)
    assert prepare(recipe, tokenizer, str(folder / "data" / "shards")) is not None
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_text_or_commands_that_run_or_are_excused(page: str) -> None:
    blocks = blocks_of(page)
    assert {block.kind for block in blocks} == {"bash", "text"}
    for block in blocks:
        assert set(block.needs) <= REASONS.keys(), block.text
        assert block.after in (None, "demo")
        if block.kind == "text":
            assert not re.search(r"^(make|python|\.venv/|export|sbatch|kubectl)\b", block.text, re.M)


def test_the_two_pages_have_the_same_commands_and_reasons() -> None:
    english, chinese = (
        [(block.commands, block.needs, block.after) for block in blocks_of(page) if block.kind == "bash"]
        for page in PAGES
    )
    assert english == chinese


@pytest.mark.parametrize("block", RUN_HERE, ids=lambda block: block.text.split("\n")[0][:40])
def test_a_block_runs_as_it_stands_in_a_fresh_shell(place: Path, block: Block) -> None:
    run_in_fresh_shell(block.text, place)


def test_what_is_excused_is_shell_and_its_settings_exist(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    excused = [block for block in COMMANDS if block.needs]
    for block in excused:
        assert subprocess.run(["bash", "-n"], input=block.text, text=True).returncode == 0, block.text
        lines = block.text.replace("\\\n", " ").splitlines()
        for line in [one for one in lines if "-m job " in one]:
            words = shlex.split(line.partition("-m job ")[2], comments=True)
            arguments = parse(words)
            settings.load(arguments.config_path, arguments.overrides)
        for line in lines:  # a bare `python` is none without an active environment
            assert not re.search(r"(^|\s)python3? ", line), line
    with capsys.disabled():
        reasons = sorted({reason for block in excused for reason in block.needs})
        counts = {reason: sum(reason in block.needs for block in excused) for reason in reasons}
        said = "; ".join(f"{reason} ({counts[reason]}): {REASONS[reason]}" for reason in reasons)
        print(f"\n{len(RUN_HERE)} blocks run, {len(excused)} are excused: {said}")


def test_no_printed_command_needs_an_active_environment() -> None:
    for path in sorted([*(REPOSITORY / "job").rglob("*.py"), *(REPOSITORY / "launch").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
        for one in ast.walk(tree):
            if isinstance(one, ast.Constant) and isinstance(one.value, str) and id(one) not in docstrings:
                found = re.search(
                    r"(^|`|: )python -m (job|launch)\b|(?<!-m )pip install|swanlab (sync|watch) -", one.value
                )
                assert found is None, f"{path}:{one.lineno}: {found}: use job.invocation"
