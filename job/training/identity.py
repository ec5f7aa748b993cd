"""What a run is made of, and cannot change while it is one run."""

from dataclasses import asdict
from typing import Any

from job.config import Config
from job.data.manifest import Manifest
from job.model.spec import ModelSpec

TOKENIZER_FOLDER = "tokenizer"
"""Of a run, in its prefix: its checkpoints are usable without the shards."""


def identity_of(config: Config, spec: ModelSpec, manifest: Manifest) -> dict[str, Any]:
    """What cannot change within a run: with another of these, a checkpoint or its cursor would mean something else."""
    return {
        "model": asdict(spec),
        "data": manifest.fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
        "context_length": config.train.context_length,
        "global_batch_size": config.train.global_batch_size,
        "order": {
            "seed": config.data.seed,
            "shuffle_bytes": min(int(config.data.shuffle_bytes), sum(shard.size for shard in manifest.train)),
            "node_groups": config.data.node_groups,
        },
    }
