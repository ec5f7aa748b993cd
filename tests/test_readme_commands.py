"""The commands of the READMEs and the docs: each is run unchanged in a fresh shell, or a comment says why it is not."""

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

ENGLISH = ["README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*[!h].md")))]
COMMANDS = [block for page in ENGLISH for block in blocks_of(page) if block.kind == "bash"]
RUN_HERE = [block for block in COMMANDS if not block.needs and block.after is None]
SLOW_SECONDS = 900
MINE = """\
run: {output: data/runs/mine}
data: {shards: data/shards, cache_dir: cache}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 48}
train: {context_length: 32, micro_batch_size: 2, global_batch_size: 8, warmup_steps: 2, max_steps: 20, precision: fp32}
checkpoint: {every: 10}
tracking: {mode: disabled}
"""
"""A reader's own configs/mine.yaml."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a reader's own settings file and a small data set."""
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    (folder / "configs" / "mine.yaml").write_text(MINE)
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))
    recipe = Recipe(str(SAMPLE), "text", "id", "stop", slice_bytes=2**20, validation_fraction=0.1, seed=2333)
    assert prepare(recipe, tokenizer, str(folder / "data" / "shards")) is not None
    return folder


def chinese(page: str) -> str:
    return f"{page.removesuffix('.md')}.zh.md"


@pytest.mark.parametrize("page", [name for page in ENGLISH for name in (page, chinese(page))])
def test_every_block_is_text_runs_or_has_a_reason_not_to(page: str) -> None:
    blocks = blocks_of(page)
    assert {block.kind for block in blocks} <= {"bash", "text"}
    for block in blocks:
        assert set(block.needs) <= REASONS.keys(), block.text
        assert block.after in (None, "demo")
        if block.kind == "text":
            assert not re.search(r"^(make|python|\.venv/|export|sbatch|kubectl)\b", block.text, re.M)


@pytest.mark.parametrize("page", ENGLISH)
def test_both_languages_have_the_same_commands_and_reasons(page: str) -> None:
    in_english, in_chinese = (
        [(block.commands, block.needs, block.after, block.is_slow) for block in blocks_of(name) if block.kind == "bash"]
        for name in (page, chinese(page))
    )
    assert in_english == in_chinese


@pytest.mark.parametrize(
    "block", [block for block in RUN_HERE if not block.is_slow], ids=lambda block: block.text.split("\n")[0][:40]
)
def test_block_runs_unchanged_in_a_fresh_shell(place: Path, block: Block) -> None:
    run_in_fresh_shell(block.text, place)


@pytest.mark.recovery
@pytest.mark.timeout(SLOW_SECONDS)
@pytest.mark.parametrize(
    "block", [block for block in RUN_HERE if block.is_slow], ids=lambda block: block.text.split("\n")[0][:40]
)
def test_slow_block_runs_unchanged_in_an_empty_checkout(tmp_path: Path, block: Block) -> None:
    printed = run_in_fresh_shell(block.text, checkout(tmp_path), SLOW_SECONDS)
    assert "长城" in printed


def test_blocks_not_run_are_valid_shell_with_known_settings(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    skipped = [block for block in COMMANDS if block.needs]
    for block in skipped:
        assert subprocess.run(["bash", "-n"], input=block.text, text=True).returncode == 0, block.text
        lines = block.text.replace("\\\n", " ").splitlines()
        for line in [line for line in lines if "-m job " in line]:
            words = shlex.split(line.partition("-m job ")[2], comments=True)
            arguments = parse(words)
            settings.load(arguments.config_path, arguments.overrides)
        for line in lines:  # A bare `python` works only in an active environment.
            assert not re.search(r"(^|\s)python3? ", line), line
    with capsys.disabled():
        reasons = sorted({reason for block in skipped for reason in block.needs})
        counts = {reason: sum(reason in block.needs for block in skipped) for reason in reasons}
        listed = "; ".join(f"{reason} ({counts[reason]}): {REASONS[reason]}" for reason in reasons)
        print(f"\n{len(RUN_HERE)} blocks run, {len(skipped)} blocks need something else: {listed}")


def test_printed_commands_need_no_active_environment() -> None:
    for path in sorted([*(REPOSITORY / "job").rglob("*.py"), *(REPOSITORY / "launch").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                bare_command = re.search(
                    r"(^|`|: )python -m (job|launch)\b|(?<!-m )pip install|swanlab (sync|watch) -", node.value
                )
                assert bare_command is None, f"{path}:{node.lineno}: {bare_command}: use job.invocation"
