"""Where a start goes on from: what is chosen, what is passed by, and what is refused before anything is touched."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from small_run import DataSet, read_json, stored
from test_checkpoint import FILES, IDENTITY, METRICS, STATE, parameters

from job import storage
from job.data.batching import BatchCut
from job.errors import NoProgress, UserError
from job.runs.attempts import FAILED, Attempts
from job.runs.checkpoint import CheckpointFiles, save_checkpoint
from job.runs.launch_context import Start
from job.runs.resume import OpenedRun, open_run
from job.runs.run import replace_run


class Opener:
    """Starts of one run, one after the other."""

    def __init__(self, output: str, data_set: DataSet, folder: Path) -> None:
        self.output, self.said = output, list[str]()
        self._tokenizer, self._folder = data_set.tokenizer, folder

    def start(self, resume: str = "auto", job_id: str | None = None, **changes: Any) -> OpenedRun:
        self.said.clear()
        told = {
            "identity": IDENTITY,
            "max_attempts": 100,
            "cut": lambda before: BatchCut(1, 1, 8),
            "config": {"train": {"epochs": 1}},
        } | changes
        return open_run(
            self.output,
            name=None,
            resume=resume,
            start=Start("a-start", 0.0, None, job_id, lambda: False, lambda line: None, "cpu", "a test"),
            tokenizer=self._tokenizer,
            folder=self._folder,
            say=self.said.append,
            **told,
        )

    def save(self, opened: OpenedRun, step: int) -> str:
        state = replace(STATE, run_id=opened.record.id, attempt=opened.attempt.number, step=step)
        return save_checkpoint(self.output, state, dict(parameters()), METRICS).url

    def goes_on_from(self, *args: Any, **kw: Any) -> int | None:
        opened = self.start(*args, **kw)
        return None if opened.checkpoint is None else opened.checkpoint.state.step


@pytest.fixture
def opener(bucket: str, data_set: DataSet, tmp_path: Path) -> Opener:
    return Opener(f"{bucket}/run", data_set, tmp_path)


def test_a_run_keeps_its_id_and_goes_on_from_its_newest_checkpoint_with_its_log(opener: Opener, tmp_path: Path) -> None:
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
def test_a_damaged_one_is_passed_by_and_the_one_before_is_used(opener: Opener, name: str) -> None:
    first = opener.start()
    urls = [opener.save(first, step) for step in (10, 20, 30)]
    content = storage.read_bytes(f"{urls[1]}/{name}")
    storage.write_bytes(f"{urls[1]}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    storage.write_bytes(f"{urls[2]}/{name}", b"")
    assert opener.goes_on_from() == 10
    passed_by = [line for line in opener.said if line.startswith("passed by: ")]
    assert [url in line and name in line for url, line in zip(urls[:0:-1], passed_by, strict=True)] == [True, True]
    assert opener.goes_on_from() == 10
    assert not any(line.startswith("passed by") for line in opener.said), "they are not part of the run any more"


def test_if_none_is_good_nothing_is_begun_anew(opener: Opener) -> None:
    first = opener.start()
    for step in (10, 20):
        storage.write_bytes(f"{opener.save(first, step)}/manifest.json", b"{")
    before = stored(opener.output)
    with pytest.raises(UserError, match=r"none of the checkpoints is good: step-00000020-a1: .*; step-00000010-a1: "):
        opener.start()
    assert stored(opener.output) == before
    assert opener.goes_on_from("never") is None


def test_if_the_tensors_of_none_are_good_nothing_is_begun_anew(opener: Opener) -> None:
    url = opener.save(opener.start(), 10)
    storage.write_bytes(f"{url}/exp_avg.safetensors", b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"step-00000010-a1: exp_avg.safetensors is not what its manifest says"):
            opener.start()


def test_checkpoints_without_the_runs_record_are_not_written_over(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    storage.delete([f"{opener.output}/run.json"])
    before = stored(opener.output)
    with pytest.raises(UserError, match=r"no run.json that says whose they are"):
        opener.start()
    assert stored(opener.output) == before


def test_a_start_that_does_not_fit_does_not_take_the_run_from_one_that_trains(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    before = stored(opener.output)
    with pytest.raises(UserError, match="global_batch_size was 8, is 16"):
        opener.start(identity=IDENTITY | {"global_batch_size": 16})
    assert stored(opener.output) == before


def test_one_that_has_not_said_that_it_ended_is_named(opener: Opener) -> None:
    opener.start()
    opener.start()
    assert opener.said[0].startswith("taking the run over from attempt 1 (process ")


# ---- Other settings ----


def test_a_setting_that_differs_from_before_is_said_and_recorded(opener: Opener) -> None:
    opener.start()
    assert opener.said[1:] == []
    opened = opener.start(config={"train": {"epochs": 3}})
    assert opener.said[1:] == ["changed since attempt 1: train.epochs: 1 → 3"]
    record = read_json(f"{opener.output}/attempts/00000002.json")
    assert (record["config"], record["changed"]) == ({"train": {"epochs": 3}}, {"train.epochs": [1, 3]})
    assert opened.settings_before == {"train": {"epochs": 1}}
    opener.start(config={"train": {"epochs": 3}})
    assert opener.said[1:] == []
    assert read_json(f"{opener.output}/attempts/00000003.json")["changed"] is None


def test_a_checkpoint_tells_the_settings_of_an_earlier_version(opener: Opener) -> None:
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
    assert opener.said[1:] == ["changed since step-00000010-a1: train.epochs: 1 → 3"]


def test_a_run_that_begins_anew_has_no_settings_before(opener: Opener) -> None:
    opener.start()
    opened = opener.start("never", config={"train": {"epochs": 3}})
    assert opened.settings_before is None and not any("changed" in line for line in opener.said)


# ---- never ----


def test_never_begins_a_new_run(opener: Opener) -> None:
    first = opener.start()
    opener.save(first, 10)
    anew = opener.start("never")
    assert anew.checkpoint is None and anew.record.id != first.record.id
    anew = opener.start()
    assert anew.checkpoint is None, "the old run's checkpoints are none of the new one's"
    opener.save(anew, 5)
    assert opener.goes_on_from() == 5


def test_never_begins_anew_once_in_a_job(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    begun = opener.start("never", job_id="7")
    opener.save(begun, 3)
    again = opener.start("never", job_id="7")
    assert again.record == begun.record
    assert again.checkpoint is not None and again.checkpoint.state.step == 3
    assert opener.goes_on_from("never", job_id="8") is None


# ---- A checkpoint that is named ----


def test_a_run_begins_at_a_named_checkpoint_and_then_goes_on(opener: Opener, bucket: str, data_set: DataSet) -> None:
    other = Opener(f"{bucket}/other", data_set, opener._folder)
    origin = other.save(other.start(), 30)
    begun = opener.start(origin)
    assert begun.checkpoint is not None and begun.checkpoint.url == origin
    assert begun.metrics == b"", "the log is the other run's"
    begun = opener.start(origin)
    assert begun.checkpoint is not None and begun.checkpoint.url == origin, "nothing was saved since"
    opener.save(begun, 35)
    assert opener.goes_on_from(origin) == 35
    assert opener.goes_on_from() == 35
    assert stored(other.output).keys() >= {f"{origin}/manifest.json"}


def test_a_run_that_goes_back_leaves_what_came_after(opener: Opener) -> None:
    first = opener.start()
    urls = {step: opener.save(first, step) for step in (10, 20, 30)}
    back = opener.start(urls[10])
    assert back.checkpoint is not None and back.checkpoint.state.step == 10
    assert back.metrics == METRICS
    opener.save(back, 15)
    assert opener.goes_on_from() == 15


def test_a_named_checkpoint_that_is_damaged_is_refused(opener: Opener) -> None:
    first = opener.start()
    urls = [opener.save(first, step) for step in (10, 20)]
    storage.write_bytes(f"{urls[1]}/state.json", b"{}")
    before = stored(opener.output)
    with pytest.raises(UserError, match=r"state.json is not what its manifest says"):
        opener.start(urls[1])
    assert stored(opener.output) == before


def test_start_that_died_before_it_replaced_the_record_has_begun_anew(opener: Opener) -> None:
    """``never`` claims the run first: whatever happens then, nobody goes on with the old run's checkpoints."""
    first = opener.start()
    opener.save(first, 10)
    claimed = Attempts(opener.output).claim("a-new-run", "a-start", None, "never")
    anew = opener.start()
    assert (anew.record.id, anew.checkpoint, anew.attempt.number) == ("a-new-run", None, claimed.number + 1)
    assert read_json(f"{opener.output}/run.json")["id"] == "a-new-run"
    opener.save(anew, 5)
    assert opener.goes_on_from() == 5


def test_record_written_by_a_start_that_lost_the_run_is_put_right(opener: Opener) -> None:
    """Two starts with ``never`` at the same time: the older one writes run.json after the newer one."""
    opener.start()
    late, newer = opener.start("never"), opener.start("never")
    replace_run(opener.output, late.record)
    opener.save(newer, 5)
    opened = opener.start()
    assert opened.record.id == newer.record.id == read_json(f"{opener.output}/run.json")["id"]
    assert opened.checkpoint is not None and opened.checkpoint.state.step == 5


# ---- No progress ----


def test_start_after_too_many_gives_up_and_the_one_after_that_tries_again(opener: Opener) -> None:
    opener.save(opener.start(), 10)
    for _ in range(3):
        failed = opener.start(max_attempts=3).attempt
        Attempts(opener.output).update(replace(failed, from_step=10, ended=FAILED, error="the disk is on fire"))
    before = stored(opener.output)
    with pytest.raises(NoProgress, match=r"3 attempts from step 10 without one new checkpoint.*the disk is on fire"):
        opener.start(max_attempts=3)
    changed = stored(opener.output).keys() ^ before.keys()
    assert changed == {f"{opener.output}/attempts/gave-up-after-00000004.json"}, "it has claimed nothing"
    assert opener.goes_on_from(max_attempts=3) == 10, "a person has looked at it"


def test_many_starts_at_once_never_give_up(opener: Opener) -> None:
    for _ in range(6):
        opener.start(max_attempts=1)
