"""The checkpoints of a run: which ones are complete, belong to the run as it is now, and can be used."""

from collections.abc import Callable, Iterable, Iterator

from job import storage
from job.errors import UserError
from job.runs.attempts import Attempts
from job.runs.checkpoint import MANIFEST, Checkpoint, CheckpointName, checkpoints_url, damaged, open_checkpoint


def list_checkpoints(output: str) -> list[CheckpointName]:
    """Return the names of the complete checkpoints of the run at `output`, the oldest first.

    A checkpoint is complete if it has a manifest; damage is found only when it is opened.
    """
    return sorted(name for name, is_complete in checkpoint_folders(output).items() if is_complete)


def checkpoint_folders(output: str) -> dict[CheckpointName, bool]:
    """Return the checkpoint folders of the run at `output`, and whether each one has a manifest."""
    folders: dict[CheckpointName, bool] = {}
    for entry in storage.list_files(checkpoints_url(output)):
        if (name := CheckpointName.of_file(entry.url)) is not None:
            folders[name] = folders.get(name, False) or entry.url.endswith(f"/{MANIFEST}")
    return folders


def lineage(attempts: Attempts, names: Iterable[CheckpointName]) -> list[CheckpointName]:
    """Return the checkpoints from which the run, as it is now, came or could continue, the oldest first.

    A checkpoint is left out if a later attempt went back to a step before it: because `train.resume` named an older
    checkpoint or was ``never``, because a damaged one was skipped, or because a superseded attempt wrote it.
    """
    last_steps = {number: attempts.last_lineage_step(number) for number in {name.attempt for name in names}}
    return sorted(name for name in names if name.step <= last_steps[name.attempt])


def good_checkpoints(
    output: str, on_refusal: Callable[[UserError], None], since_attempt: int = 0, run_id: str | None = None
) -> Iterator[Checkpoint]:
    """Yield the usable checkpoints of the run at `output`, the newest first.

    Args:
        output: folder or URL of the run.
        on_refusal: called with an error that holds name and reason of each checkpoint that is skipped.
        since_attempt: skip checkpoints of attempts before this number, without a call.
        run_id: refuse checkpoints of another run; None: accept any run.
    """
    for name in reversed(lineage(Attempts(output), list_checkpoints(output))):
        if name.attempt < since_attempt:
            continue
        try:
            checkpoint = open_checkpoint(name.url(output))
            if run_id not in (None, checkpoint.state.run_id):
                raise damaged(checkpoint.url, f"it belongs to another run, {checkpoint.state.run_id}")
        except UserError as error:
            on_refusal(error)
        else:
            yield checkpoint
