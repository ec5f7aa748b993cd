"""The settings against each other, and against the length of the run."""

from job import storage
from job.cluster.preflight.findings import Findings
from job.config import Config
from job.data.manifest import Manifest
from job.model.spec import ModelSpec
from job.training.plan import Workload
from job.training.tracking import choose_mode


def check_settings(findings: Findings, config: Config, is_here: bool) -> ModelSpec | None:
    """The model's shape; None if there is no such model.

    Args:
        findings: takes the rows.
        config: all settings.
        is_here: whether the run will be on this machine, and has its keys and packages.
    """
    findings.right("config", "every setting is known and in its range")
    train = config.train
    if train.min_learning_rate > train.learning_rate:
        found = f"train.min_learning_rate {train.min_learning_rate} is above train.learning_rate {train.learning_rate}"
        findings.wrong("learning rate", found, "let it end where it is lower")
    with findings.guard("tracking"):
        if is_here or config.tracking.mode != "cloud":
            mode, why = choose_mode(config.tracking.mode)
            findings.right("tracking", f"{mode}: {why}" + ("" if is_here else ", on this machine"))
        else:
            findings.unsure("tracking", "the cloud, with a key that has to be there", "give the nodes SWANLAB_API_KEY")
    if train.stop_file is not None:
        with findings.guard("stop file"):
            there = storage.exists(train.stop_file)
            found = f"{train.stop_file} is {'there' if there else 'not there'} (train.stop_file)"
            findings.judge("stop file", not there, found, "remove it: while it is there, every start stops at once")
    with findings.guard("model"):
        return ModelSpec(**config.model.model_dump())
    return None


def check_schedule(findings: Findings, config: Config, work: Workload) -> None:
    """Intervals against the number of steps."""
    train, checkpoint = config.train, config.checkpoint
    found = (
        f"{work.steps:,} steps of {train.global_batch_size} x {train.context_length} tokens, {work.epochs:.2f} epochs"
    )
    if train.warmup_steps >= work.steps:
        remedy = f"set train.warmup_steps to {max(1, work.steps // 20)} or so"
        findings.unsure("schedule", f"{found}: all of them in the warm-up ({train.warmup_steps} steps)", remedy)
    elif checkpoint.every > work.steps and checkpoint.every_minutes is None:
        remedy = f"set checkpoint.every to {max(1, work.steps // 10)} or so"
        findings.unsure("schedule", f"{found}, but a checkpoint every {checkpoint.every}: none before the end", remedy)
    else:
        findings.right("schedule", found)


def check_cache(findings: Findings, config: Config, manifest: Manifest) -> None:
    """What is shuffled together has to be on the disk together."""
    sizes = [shard.size for shard in manifest.train]
    most = max([*sizes, min(int(config.data.shuffle_bytes), sum(sizes))])
    if storage.is_remote(config.data.shards) and config.data.node_groups == 1:
        room = int(config.data.cache_bytes)
        found = f"{most:,} bytes of shards are shuffled together, data.cache_bytes has room for {room:,}"
        remedy = f"set data.cache_bytes to {most} or more, or data.shuffle_bytes to less"
        findings.judge("shard cache", most <= room, found, remedy)
