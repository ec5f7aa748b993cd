"""What a run is made of, and cannot change while it is one run."""

from collections.abc import Iterator, Mapping
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


_SECTIONS = {"model": "model", "order": "data"}
"""Parts of the identity, and the section of the settings that each comes from."""
_SHOWN_DIGITS = 12


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What of `now` differs, each as ``model.hidden_size was 96, is 128``."""
    for part, value in now.items():
        was = before.get(part)
        if was == value:
            continue
        if part in _SECTIONS:
            earlier = was if isinstance(was, dict) else {}
            for key in value:
                if earlier.get(key) != value[key]:
                    yield f"{_SECTIONS[part]}.{key} was {earlier.get(key)}, is {value[key]}"
        elif part in ("data", "tokenizer"):
            what = "the data set" if part == "data" else "the tokenizer"
            yield f"{what} was {str(was)[:_SHOWN_DIGITS]}, is {str(value)[:_SHOWN_DIGITS]} (fingerprints)"
        else:
            yield f"train.{part} was {was}, is {value}"
