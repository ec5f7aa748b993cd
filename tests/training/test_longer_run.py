"""Tests that a wsd run continued from before its decay equals one that was planned longer."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import (
    REPOSITORY,
    DataSet,
    WriteSettings,
    checkpoint_urls,
    run,
    saved_steps,
    tensor_files,
    write_settings,
)

from job.config import load
from job.errors import EXIT_DONE, EXIT_STOPPED, UserError
from job.runs.attempts import Attempt
from job.runs.checkpoint import open_checkpoint
from job.runs.launch_context import LaunchContext
from job.runs.metrics_file import read_metrics
from job.training.rank0 import Rank0Duties, SavePolicy
from job.training.setup import open_data

STOP_IN_DECAY = Path(__file__).parent / "stop_in_decay"
BATCH = {"schedule": "wsd", "global_batch_size": 128, "micro_batch_size": 32, "epochs": 1, "max_steps": None}
"""The sample has 19 steps in an epoch, and fewer sequences in the last one."""
STEPS, BEFORE_DECAY = 19, 15
LONG_STEPS, BEFORE_LONG_DECAY = 38, 30
KEEP_ONE = {"every": 4, "keep": 1}
TWO_PROCESSES = {"processes": 2, "strategy": "zero2"}


def trained(settings: Path, *words: str, expected: int = EXIT_DONE, **environment: str) -> str:
    """Train, and return what was printed."""
    code, out, err = run("train", settings, *words, **environment)
    assert (code, err) == (expected, ""), out + err
    return out


def last(output: str) -> tuple[dict[str, str], int, int]:
    """Return the tensor files of the last checkpoint, and its sequences and tokens."""
    url = checkpoint_urls(output)[-1]
    state = open_checkpoint(url).state
    return tensor_files(url), state.windows_consumed, state.tokens_seen


@pytest.mark.recovery
def test_extended_wsd_run_equals_one_planned_longer(data_set: DataSet, bucket: str, tmp_path: Path) -> None:
    short, extended, planned = (f"{bucket}/{name}" for name in ("short", "extended", "planned"))
    settings = {
        output: write_settings(tmp_path, data_set, output, train=BATCH | TWO_PROCESSES, checkpoint=KEEP_ONE)
        for output in (short, extended, planned)
    }

    # ---- A run that is stopped in its decay keeps the checkpoint before it, and names it once at its end ----
    stop = {"PYTHONPATH": f"{STOP_IN_DECAY}:{REPOSITORY}", "STOPS_AT": str(BEFORE_DECAY)}
    out = trained(settings[short], expected=EXIT_STOPPED, **stop)
    assert "wsd: 5 warm-up, 10 stable, 4 decay steps" in out
    assert saved_steps(short)[0] == BEFORE_DECAY < saved_steps(short)[1] < STEPS
    out += trained(settings[short])
    assert saved_steps(short) == [BEFORE_DECAY, STEPS]
    rates = {row["step"]: row["train/learning_rate"] for row in read_metrics(short)}
    assert rates[BEFORE_DECAY] == 1e-2 > rates[BEFORE_DECAY + 1]
    ((checkpoint, options),) = re.findall(r"--train\.resume (\S+) (.*) \(to keep what", out)
    assert checkpoint == f"{short}/checkpoints/step-{BEFORE_DECAY:08d}-a1"
    assert options == f"--train.max_steps {LONG_STEPS} --train.epochs 3"

    # ---- The printed options, in another place and in the same one, give the run that was planned longer ----
    trained(settings[planned], *options.split())
    for output in (extended, short):
        out = trained(settings[output], "--train.resume", checkpoint, *options.split())
        assert (
            f"the schedule ends at step {LONG_STEPS} instead of {STEPS} and decays after step {BEFORE_LONG_DECAY} "
            f"instead of {BEFORE_DECAY}: the learning rate of step {BEFORE_DECAY + 1} is 1.00e-02, it would have been "
            "8.00e-03"
        ) in out
        assert "decay since" not in out
        assert last(output) == last(planned)
        assert saved_steps(output) == saved_steps(planned) == [BEFORE_LONG_DECAY, LONG_STEPS]


def test_train_refuses_a_decay_longer_than_the_run(settings: WriteSettings) -> None:
    open_data(load(str(settings(train=BATCH | {"decay_steps": 14}))))
    with pytest.raises(UserError, match=r"^train.decay_steps: 15: expected at most 14: the run has 19 steps, the warm"):
        open_data(load(str(settings(train=BATCH | {"decay_steps": 15}))))


def test_save_before_the_decay_does_not_wait_for_a_later_step(tmp_path: Path) -> None:
    policy = SavePolicy(5, None, 1, None, None, None, decay_after=12)
    context = LaunchContext("", 0.0, None, None, lambda: False, print, "cpu", "a test")
    attempt = Attempt(1, "a-run", "", None, "", 0, "", "auto")
    opened, state = SimpleNamespace(attempt=attempt, checkpoint=None), SimpleNamespace(empty_snapshot=lambda: None)
    duties = Rank0Duties(policy, context, str(tmp_path), opened, state, 1, print)  # type: ignore[arg-type]
    try:
        duties._saver.poll = lambda seconds: False  # type: ignore[method-assign]
        assert [step for step in range(1, 20) if duties.wants_save(step)] == [12], "an upload is under way all the time"
        duties._saver.failures, duties._saver.failed_at = 1, 1e12
        assert [step for step in range(1, 20) if duties.wants_save(step)] == [12], "the next try is due much later"
    finally:
        duties.close()
