"""Opening a run: which checkpoint is chosen, which ones are skipped, and what is refused before the claim."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from small_run import DataSet, read_json, stored
from test_checkpoint import COMPATIBILITY_KEY, FILES, METRICS, STATE, parameters

from job import storage
from job.data.batching import BatchCut
from job.errors import NoProgress, UserError
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint import CheckpointFiles
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.choices import Choice, Choices
from job.runs.launch_context import LaunchContext
from job.runs.resume import OpenedRun, open_run
from job.runs.run import replace_run
from job.runs.run_status import RunStatus


class Opener:
    """Starts one run again and again."""

    def __init__(self, output: str, data_set: DataSet, folder: Path) -> None:
        self.output, self.printed = output, list[str]()
        self._tokenizer, self._folder = data_set.tokenizer, folder
        self.before: Attempt | None = None
        """The attempt whose choices the last start was to keep."""

    def _choose(self, before: Attempt | None) -> Choices:
        self.before = before
        return Choices(Choice("ddp"), Choice("fp32"), Choice("cpu"), BatchCut(1, 1, 8), Choice("9"))

    def start(self, resume: str = "auto", job_id: str | None = None, **changes: Any) -> OpenedRun:
        self.printed.clear()
        arguments = {
            "compatibility_key": COMPATIBILITY_KEY,
            "max_attempts": 100,
            "choose": self._choose,
            "config": {"train": {"epochs": 1}},
        } | changes
        return open_run(
            self.output,
            name=None,
            resume=resume,
            start=LaunchContext("a-start", 0.0, None, job_id, lambda: False, lambda line: None, "cpu", "a test"),
            tokenizer=self._tokenizer,
            folder=self._folder,
            say=self.printed.append,
            **arguments,
        )

    def save(self, opened: OpenedRun, step: int) -> str:
        state = replace(STATE, run_id=opened.record.id, attempt=opened.attempt.number, step=step)
        return save_checkpoint(self.output, state, dict(parameters()), METRICS).url

    def start_and_return_step(self, *args: Any, **kw: Any) -> int | None:
        opened = self.start(*args, **kw)
        return None if opened.checkpoint is None else opened.checkpoint.state.step


@pytest.fixture
def opener(bucket: str, data_set: DataSet, tmp_path: Path) -> Opener:
    return Opener(f"{bucket}/run", data_set, tmp_path)


def test_choices_are_kept_only_with_a_checkpoint(opener: Opener) -> None:
    opener.start()
    assert opener.before is None
    second = opener.start()
    assert opener.before is None, "nothing of what attempt 1 computed is left"
    opener.save(second, 10)
    third = opener.start()
    assert opener.before is not None
    assert (opener.before.number, opener.before.choices) == (2, second.choices.record())
    assert third.attempt.micro_batch_size == 8


def test_damaged_record_of_an_attempt_does_not_change_choices(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    opener.start()
    storage.write_bytes(f"{opener.output}/attempts/00000002.json", b"{")
    opener.start()
    assert opener.before is not None and opener.before.number == 1
    storage.write_bytes(f"{opener.output}/attempts/00000001.json", b"{")
    storage.write_bytes(f"{opener.output}/attempts/00000003.json", b"{")
    opener.start()
    assert opener.before is not None and opener.before.config == STATE.config, "the checkpoint has the settings"


def test_run_keeps_its_id_and_continues_from_its_newest_checkpoint(opener: Opener, tmp_path: Path) -> None:
    first = opener.start()
    assert (first.checkpoint, first.metrics, first.attempt.number) == (None, b"", 1)
    opener.save(first, 10)
    opener.save(first, 20)
    second = opener.start()
    assert second.record == first.record
    assert second.checkpoint is not None and second.checkpoint.state.step == 20
    assert second.metrics == METRICS
    assert list(CheckpointFiles(tmp_path)) == [name for name, _ in parameters()]
    newest = Attempts(opener.output).newest()
    assert newest is not None and (newest.number, newest.from_step) == (2, 20)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damaged_checkpoints_are_skipped_for_an_older_one(opener: Opener, name: str) -> None:
    first = opener.start()
    urls = [opener.save(first, step) for step in (10, 20, 30)]
    content = storage.read_bytes(f"{urls[1]}/{name}")
    storage.write_bytes(f"{urls[1]}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    storage.write_bytes(f"{urls[2]}/{name}", b"")
    assert opener.start_and_return_step() == 10
    skipped = [line for line in opener.printed if line.startswith("skipped checkpoint ")]
    assert [url in line and name in line for url, line in zip(urls[:0:-1], skipped, strict=True)] == [True, True]
    assert opener.start_and_return_step() == 10
    assert not any(line.startswith("skipped checkpoint") for line in opener.printed), (
        "the skipped checkpoints do not belong to the run any more"
    )


def test_nothing_starts_over_if_no_checkpoint_is_good(opener: Opener) -> None:
    first = opener.start()
    for step in (10, 20):
        storage.write_bytes(f"{opener.save(first, step)}/manifest.json", b"{")
    before = stored(opener.output)
    with pytest.raises(UserError, match=r"no checkpoint can be used: step-00000020-a1: .*; step-00000010-a1: "):
        opener.start()
    assert stored(opener.output) == before
    assert opener.start_and_return_step("never") is None


def test_nothing_starts_over_if_all_tensor_files_are_damaged(opener: Opener) -> None:
    url = opener.save(opener.start(), 10)
    storage.write_bytes(f"{url}/exp_avg.safetensors", b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"step-00000010-a1: exp_avg.safetensors does not match the size"):
            opener.start()


def test_checkpoints_without_run_json_are_not_overwritten(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    storage.delete([f"{opener.output}/run.json"])
    before = stored(opener.output)
    with pytest.raises(UserError, match=r"checkpoints but no run.json, so it is unknown which run they belong to"):
        opener.start()
    assert stored(opener.output) == before


def test_incompatible_start_does_not_claim_the_run(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    before = stored(opener.output)
    with pytest.raises(UserError, match="global_batch_size was 8, is 16"):
        opener.start(compatibility_key=COMPATIBILITY_KEY | {"global_batch_size": 16})
    assert stored(opener.output) == before


def test_attempt_without_a_recorded_end_is_named(opener: Opener) -> None:
    opener.start()
    opener.start()
    assert opener.printed[0].startswith("taking over the run from attempt 1 (process ")


# ---- Changed settings ----


def test_changed_settings_are_printed_and_recorded(opener: Opener) -> None:
    opener.start()
    assert opener.printed[1:] == []
    opened = opener.start(config={"train": {"epochs": 3}})
    assert opener.printed[1:] == ["changed since attempt 1: train.epochs: 1 → 3"]
    record = read_json(f"{opener.output}/attempts/00000002.json")
    assert (record["config"], record["changed"]) == ({"train": {"epochs": 3}}, {"train.epochs": [1, 3]})
    assert opened.settings_before == {"train": {"epochs": 1}}
    opener.start(config={"train": {"epochs": 3}})
    assert opener.printed[1:] == []
    assert read_json(f"{opener.output}/attempts/00000003.json")["changed"] is None


def test_settings_before_come_from_the_checkpoint_of_an_old_version(opener: Opener) -> None:
    first = opener.start()
    storage.write_bytes(
        f"{opener.output}/attempts/00000001.json",
        json.dumps(
            {key: value for key, value in asdict(first.attempt).items() if key not in ("config", "changed")}
        ).encode(),
    )
    state = replace(STATE, run_id=first.record.id, attempt=1, step=10, config={"train": {"epochs": 1}})
    save_checkpoint(opener.output, state, dict(parameters()), METRICS)
    opener.start(config={"train": {"epochs": 3}})
    assert opener.printed[1:] == ["changed since step-00000010-a1: train.epochs: 1 → 3"]


def test_run_that_starts_over_has_no_settings_before(opener: Opener) -> None:
    opener.start()
    opened = opener.start("never", config={"train": {"epochs": 3}})
    assert opened.settings_before is None and not any("changed" in line for line in opener.printed)


# ---- train.resume never ----


def test_never_begins_a_new_run(opener: Opener) -> None:
    first = opener.start()
    opener.save(first, 10)
    restarted = opener.start("never")
    assert restarted.checkpoint is None and restarted.record.id != first.record.id
    restarted = opener.start()
    assert restarted.checkpoint is None, "checkpoints of the old run do not belong to the new one"
    opener.save(restarted, 5)
    assert opener.start_and_return_step() == 5


def test_never_starts_over_only_once_in_a_job(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    opened = opener.start("never", job_id="7")
    opener.save(opened, 3)
    again = opener.start("never", job_id="7")
    assert again.record == opened.record
    assert again.checkpoint is not None and again.checkpoint.state.step == 3
    assert opener.start_and_return_step("never", job_id="8") is None


# ---- train.resume with a checkpoint ----


def test_run_begins_at_a_named_checkpoint_and_then_continues(opener: Opener, bucket: str, data_set: DataSet) -> None:
    other = Opener(f"{bucket}/other", data_set, opener._folder)
    origin = other.save(other.start(), 30)
    opened = opener.start(origin)
    assert opened.checkpoint is not None and opened.checkpoint.url == origin
    assert opened.metrics == b"", "the metrics belong to the other run"
    opened = opener.start(origin)
    assert opened.checkpoint is not None and opened.checkpoint.url == origin, "nothing has been saved since"
    opener.save(opened, 35)
    assert opener.start_and_return_step(origin) == 35
    assert opener.start_and_return_step() == 35
    assert stored(other.output).keys() >= {f"{origin}/manifest.json"}


def test_run_that_goes_back_ignores_later_checkpoints(opener: Opener) -> None:
    first = opener.start()
    urls = {step: opener.save(first, step) for step in (10, 20, 30)}
    back = opener.start(urls[10])
    assert back.checkpoint is not None and back.checkpoint.state.step == 10
    assert back.metrics == METRICS
    opener.save(back, 15)
    assert opener.start_and_return_step() == 15


def test_damaged_named_checkpoint_is_refused(opener: Opener) -> None:
    first = opener.start()
    urls = [opener.save(first, step) for step in (10, 20)]
    storage.write_bytes(f"{urls[1]}/state.json", b"{}")
    before = stored(opener.output)
    with pytest.raises(UserError, match=r"state.json does not match the size"):
        opener.start(urls[1])
    assert stored(opener.output) == before


def test_claim_of_a_dead_start_with_never_starts_over(opener: Opener) -> None:
    """A start with ``never`` claims the run first: if it dies then, no later start uses the old run's checkpoints."""
    first = opener.start()
    opener.save(first, 10)
    claimed = Attempts(opener.output).claim("a-new-run", "a-start", None, "never")
    restarted = opener.start()
    assert (restarted.record.id, restarted.checkpoint, restarted.attempt.number) == (
        "a-new-run",
        None,
        claimed.number + 1,
    )
    assert read_json(f"{opener.output}/run.json")["id"] == "a-new-run"
    opener.save(restarted, 5)
    assert opener.start_and_return_step() == 5


def test_run_json_of_a_superseded_start_is_corrected(opener: Opener) -> None:
    """Two starts with ``never`` race, and the older one writes run.json after the newer one."""
    opener.start()
    late, newer = opener.start("never"), opener.start("never")
    replace_run(opener.output, late.record)
    opener.save(newer, 5)
    opened = opener.start()
    assert opened.record.id == newer.record.id == read_json(f"{opener.output}/run.json")["id"]
    assert opened.checkpoint is not None and opened.checkpoint.state.step == 5


# ---- Attempts without progress ----


def test_start_gives_up_after_too_many_and_the_next_one_tries_again(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    for _ in range(3):
        failed = opener.start(max_attempts=3).attempt
        Attempts(opener.output).update(
            replace(failed, from_step=10, ended=RunStatus.FAILED, error="the disk is on fire")
        )
    before = stored(opener.output)
    with pytest.raises(NoProgress, match=r"3 attempts from step 10 without a new checkpoint.*the disk is on fire"):
        opener.start(max_attempts=3)
    changed = stored(opener.output).keys() ^ before.keys()
    assert changed == {f"{opener.output}/attempts/gave-up-after-00000004.json"}, "giving up does not claim the run"
    assert opener.start_and_return_step(max_attempts=3) == 10, "after a give-up, the next start is a person's decision"


def test_simultaneous_starts_never_give_up(opener: Opener) -> None:
    for _ in range(6):
        opener.start(max_attempts=1)
