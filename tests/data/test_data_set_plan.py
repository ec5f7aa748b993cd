"""plan.json prevents two recipes from mixing in one folder, and does not block a corrected command."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from corpus_files import json_lines
from preparation import REPOSITORY, SAMPLE, KiB
from preparation import recipe as recipe_of

from job import storage
from job.data import make_shards
from job.data import prepare as prepare_module
from job.data.manifest import MANIFEST_NAME, load_manifest
from job.data.prepare import prepare
from job.data.tokenizer import TextTokenizer, train_tokenizer
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError

recipe = partial(recipe_of, slice_bytes=4 * KiB)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer([record["text"] for record in SAMPLE], 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(bucket: str) -> str:
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines(SAMPLE[:20]))
    return f"{bucket}/corpus.jsonl"


def check_whole(url: str) -> None:
    """Check that every shard is what the manifest says, and that every part belongs to the manifest's plan."""
    manifest = load_manifest(url)
    plan = storage.read_bytes(f"{url}/plan.json")
    assert manifest.plan == hashlib.sha256(plan).hexdigest()
    for shard in manifest.train + manifest.validation:
        assert hashlib.sha256(storage.read_bytes(f"{url}/{shard.name}")).hexdigest() == shard.sha256
    for entry in storage.list_files(f"{url}/parts"):
        assert json.loads(storage.read_bytes(entry.url))["plan"] == manifest.plan


# ---- Two recipes ----


def call_during_first_slice(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Call `act` once, when the next `prepare` has chosen its slices and before any slice is finished."""
    make = make_shards._prepare_group
    is_first = [True]

    def interrupted(*arguments: Any) -> None:
        if is_first:
            is_first.clear()
            act()
        make(*arguments)

    monkeypatch.setattr(make_shards, "_prepare_group", interrupted)


def test_second_command_is_refused_while_the_first_runs(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    """Runs two real commands; the first one is suspended as soon as it has created the plan."""
    words = ("--data.source", corpus, "--data.shards", f"{bucket}/shards", "--tokenizer.source", str(tokenizer.folder))
    command = [sys.executable, "-m", "job", "prepare", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, "--data.slice_bytes", "2KiB"], cwd=REPOSITORY, **pipes)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 120
        while not storage.exists(f"{bucket}/shards/plan.json"):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run([*command, "--data.seed", "1"], cwd=REPOSITORY, capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        output = first.communicate(timeout=120)
    finally:
        first.kill()
    assert second.returncode == EXIT_REFUSED
    (line,) = second.stderr.splitlines()
    assert "data.slice_bytes is 2048 there and 67108864 here; data.seed is 2333 there and 1 here" in line
    assert first.returncode == EXIT_DONE, output
    check_whole(f"{bucket}/shards")


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("data.seed is 2333 there and 1 here", {"seed": 1}),
        ("data.validation_fraction is 0.1 there and 0.3 here", {"validation_fraction": 0.3}),
        ("data.text_field is 'text' there and 'title' here", {"text_field": "title"}),
        ("tokenizer.source is '", {}),
    ],
)
def test_second_recipe_is_refused_during_the_first_slice(
    setting: str,
    changes: dict[str, Any],
    corpus: str,
    bucket: str,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = train_tokenizer([], 257, tmp_path) if setting.startswith("tokenizer") else tokenizer
    refused: list[str] = []

    def start_another() -> None:
        with pytest.raises(UserError) as error:
            prepare(recipe(corpus, **changes), other, f"{bucket}/shards")
        refused.append(str(error.value))

    call_during_first_slice(monkeypatch, start_another)
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None
    assert setting in refused[0] and "data.shards" in refused[0]
    check_whole(f"{bucket}/shards")
    assert load_manifest(f"{bucket}/shards").seed == 2333


def test_worker_stops_if_its_plan_was_replaced(
    corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is deleted and prepared again with other settings while an old worker is still running."""
    url = f"{bucket}/shards"

    def replace_data_set() -> None:
        storage.delete_tree(url)
        assert prepare(recipe(corpus, seed=1), tokenizer, url) is not None

    call_during_first_slice(monkeypatch, replace_data_set)
    with pytest.raises(UserError, match=r"holds an unfinished data set that differs: data\.seed is 1 there"):
        prepare(recipe(corpus), tokenizer, url)
    check_whole(url)
    assert load_manifest(url).seed == 1


def test_two_plans_never_write_the_same_file(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    written = []
    for seed in (1, 2):
        assert prepare(recipe(corpus, seed=seed), tokenizer, f"{bucket}/{seed}") is not None
        names = {entry.url.removeprefix(f"{bucket}/{seed}/") for entry in storage.list_files(f"{bucket}/{seed}")}
        written.append({name for name in names if name.startswith(("parts", "train", "validation"))})
    assert len(written[0]) > 10 and written[0].isdisjoint(written[1])


def test_finished_data_set_of_another_recipe_is_refused(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    prepare(recipe(corpus), tokenizer, f"{bucket}/shards")
    before = storage.list_files(f"{bucket}/shards")
    with pytest.raises(UserError, match=r"finished data set that differs: data\.seed is 2333 there and 1 here"):
        prepare(recipe(corpus, seed=1), tokenizer, f"{bucket}/shards")
    storage.delete([f"{bucket}/shards/plan.json"])
    with pytest.raises(UserError, match=r"holds a finished data set that differs: it has no plan\.json"):
        prepare(recipe(corpus, seed=1), tokenizer, f"{bucket}/shards")
    assert [file.url for file in before if "plan.json" not in file.url] == [
        file.url for file in storage.list_files(f"{bucket}/shards")
    ]


# ---- A corrected command ----


@pytest.mark.parametrize("mistake", [{"text_field": "txt"}, {"text_field": "text", "id_field": "text"}])
def test_corrected_command_works_after_a_failure_before_any_part(
    mistake: dict[str, str], corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = recipe(corpus, **mistake)
    if "id_field" in mistake:
        # This stands for any other failure, such as a full disk.
        monkeypatch.setattr(
            make_shards, "_prepare_group", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full"))
        )
    with pytest.raises((UserError, OSError)):
        prepare(wrong, tokenizer, f"{bucket}/shards")
    monkeypatch.undo()
    assert storage.list_files(f"{bucket}/shards") == []
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None
    check_whole(f"{bucket}/shards")


def test_corpus_without_text_leaves_nothing_behind(bucket: str, tokenizer: TextTokenizer) -> None:
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines([{"text": "", "content": "长江"}] * 3))
    assert prepare(recipe(f"{bucket}/corpus.jsonl", slice_bytes=1024), tokenizer, f"{bucket}/shards", (1, 2)) is None
    with pytest.raises(UserError, match="no text to train on"):
        prepare(recipe(f"{bucket}/corpus.jsonl", slice_bytes=1024), tokenizer, f"{bucket}/shards", (0, 2))
    assert storage.list_files(f"{bucket}/shards") == []
    corrected = recipe(f"{bucket}/corpus.jsonl", text_field="content", validation_fraction=0)
    assert prepare(corrected, tokenizer, f"{bucket}/shards") is not None


def test_plan_stays_after_a_failure_that_left_parts(bucket: str, tokenizer: TextTokenizer) -> None:
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines(SAMPLE[:20]) + b"broken\n")
    with pytest.raises(UserError, match="bad record"):
        prepare(recipe(f"{bucket}/corpus.jsonl"), tokenizer, f"{bucket}/shards")
    assert storage.exists(f"{bucket}/shards/plan.json")
    assert prepare(recipe(f"{bucket}/corpus.jsonl", on_bad_record="skip"), tokenizer, f"{bucket}/shards") is not None


def test_failure_never_removes_the_plan_of_another_worker(
    corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second worker of the same plan fails; the plan belongs to the first worker, which continues."""

    def fail_another() -> None:
        with monkeypatch.context() as broken:
            broken.setattr(prepare_module, "Encoder", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(OSError):
                prepare(recipe(corpus), tokenizer, f"{bucket}/shards", (1, 2))
        assert storage.exists(f"{bucket}/shards/plan.json")

    call_during_first_slice(monkeypatch, fail_another)
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None


def test_worker_continues_if_its_plan_was_removed(
    corpus: str, bucket: str, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_during_first_slice(monkeypatch, lambda: storage.delete([f"{bucket}/shards/plan.json"]))
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards") is not None
    check_whole(f"{bucket}/shards")


# ---- A changed corpus ----


def test_corpus_replaced_between_two_workers_is_refused(corpus: str, bucket: str, tokenizer: TextTokenizer) -> None:
    assert prepare(recipe(corpus), tokenizer, f"{bucket}/shards", (0, 2)) is None
    changed = storage.read_bytes(corpus).replace("的".encode(), "地".encode())
    storage.write_bytes(corpus, changed)
    with pytest.raises(UserError, match=r"data\.source has other content in corpus\.jsonl"):
        prepare(recipe(corpus), tokenizer, f"{bucket}/shards", (1, 2))
    assert not storage.exists(f"{bucket}/shards/{MANIFEST_NAME}")


@pytest.mark.parametrize("is_remote", [True, False])
def test_corpus_replaced_while_a_worker_reads_it_is_refused(
    is_remote: bool, bucket: str, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"{bucket if is_remote else tmp_path}/corpus.jsonl"
    storage.write_bytes(source, json_lines(SAMPLE[:20]))
    url = f"{bucket}/shards"
    changed = storage.read_bytes(source).replace("的".encode(), "地".encode())
    call_during_first_slice(monkeypatch, lambda: storage.write_bytes(source, changed))
    with pytest.raises(UserError, match=r"data\.source.*was replaced or removed while it was read"):
        prepare(recipe(source), tokenizer, url)
    assert storage.list_files(url) == []


def test_files_that_only_one_worker_has_are_named(bucket: str, tokenizer: TextTokenizer) -> None:
    for name in ("a", "b"):
        storage.write_bytes(f"{bucket}/corpus/{name}.jsonl", json_lines(SAMPLE[:5]))
    assert prepare(recipe(f"{bucket}/corpus/"), tokenizer, f"{bucket}/shards", (0, 2)) is None
    storage.write_bytes(f"{bucket}/corpus/c.jsonl", json_lines(SAMPLE[:5]))
    with pytest.raises(UserError, match=r"data\.source has c\.jsonl only here"):
        prepare(recipe(f"{bucket}/corpus/"), tokenizer, f"{bucket}/shards", (1, 2))
