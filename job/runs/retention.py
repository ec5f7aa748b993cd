"""Retention: which checkpoints of a run are kept, and deleting the others."""

from collections.abc import Iterable

from job import storage
from job.runs.attempts import Attempts
from job.runs.checkpoint import MANIFEST, CheckpointName, checkpoints_url
from job.runs.checkpoint_list import checkpoint_folders, lineage


def most_kept(keep: int, schedule: str) -> int:
    """Return how many checkpoints a run keeps without `keep_every`; `wsd` adds the one before the decay.

    A run that was made longer after its decay keeps one more for each further decay.
    """
    return keep + 1 if schedule == "wsd" else keep


def newest_up_to(names: Iterable[CheckpointName], step: int) -> CheckpointName | None:
    """Return the newest checkpoint with at most `step` steps; None if there is none."""
    return max((name for name in names if name.step <= step), default=None)


def kept_checkpoints(
    names: list[CheckpointName], keep: int, keep_every: int | None, decays_after: Iterable[int] = ()
) -> set[CheckpointName]:
    """Return the checkpoints to keep: the newest ones, one for each multiple of `keep_every`, one before each decay.

    Args:
        names: checkpoints of the run, the oldest first.
        keep: number of newest checkpoints to keep.
        keep_every: interval in steps; the first checkpoint at or after each multiple of it is kept for ever.
        decays_after: `TrainingState.decays_after`; the newest checkpoint at or before each of these steps is kept for
            ever. If the checkpoint at that step could not be saved, an earlier one takes its place.
    """
    milestones: dict[int, CheckpointName] = {}
    if keep_every is not None:
        for name in names:
            milestones.setdefault(name.step // keep_every, name)
    before_decays = filter(None, (newest_up_to(names, step) for step in decays_after))
    return {*names[-keep:], *before_decays, *(name for multiple, name in milestones.items() if multiple > 0)}


def delete_old_checkpoints(
    output: str, keep: int, keep_every: int | None, newest: CheckpointName, decays_after: Iterable[int] = ()
) -> None:
    """Delete the checkpoints that are not kept after `newest` was written, and the rest of interrupted uploads.

    Files of attempts after `newest.attempt` are left alone: the caller may have been superseded without knowing it.

    Args:
        output: folder or URL of the run.
        keep: number of newest checkpoints to keep.
        keep_every: see `kept_checkpoints`.
        newest: the checkpoint that the caller has just written.
        decays_after: see `kept_checkpoints`.
    """
    folders = {
        name: complete for name, complete in checkpoint_folders(output).items() if name.attempt <= newest.attempt
    }
    names = [name for name, is_complete in folders.items() if is_complete]
    names = [name for name in lineage(Attempts(output), names) if name <= newest]
    kept = kept_checkpoints(names, keep, keep_every, decays_after)
    for name in folders.keys() - kept:
        discard_checkpoint(output, name)

    def is_abandoned(file_url: str) -> bool:
        name = CheckpointName.of_file(file_url)
        return name is not None and name.attempt <= newest.attempt

    storage.abort_uploads(checkpoints_url(output), is_abandoned)


def discard_checkpoint(output: str, name: CheckpointName) -> None:
    """Delete all files of a checkpoint, its manifest first, so that an interrupted deletion leaves no checkpoint."""
    storage.delete([storage.join(name.url(output), MANIFEST)])
    storage.delete_tree(name.url(output))
