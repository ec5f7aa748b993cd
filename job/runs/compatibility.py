"""The compatibility key of a run: everything that must stay the same for a checkpoint to be continued."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from job.config import Data, Train
from job.data.manifest import Manifest
from job.model.spec import ModelSpec

_SECTIONS = {"model": "model", "order": "data"}
"""Parts of the key that are mappings, and the section of the settings that each one comes from."""
SHOWN_DIGITS = 12
"""Digits of a fingerprint that messages show."""


EARLIER_VALUES: dict[str, Any] = {"optimizer": "adamw", "model": {"architecture": "qwen2", "init": "default"}}
"""Values of runs of earlier versions, whose keys do not have these entries."""


def compatibility_key(train: Train, data: Data, spec: ModelSpec, manifest: Manifest) -> dict[str, Any]:
    """Return what must not change within a run; it is stored as `TrainingState.identity`.

    If any of it changed, the weights of a checkpoint or its position in the data would mean something else.
    """
    return {
        "model": asdict(spec),
        "optimizer": train.optimizer,
        "data": manifest.fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
        "context_length": train.context_length,
        "global_batch_size": train.global_batch_size,
        "order": {
            "seed": data.seed,
            "shuffle_bytes": min(int(data.shuffle_bytes), sum(shard.size for shard in manifest.train)),
            "node_groups": data.node_groups,
        },
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe each difference between two compatibility keys, such as ``model.hidden_size was 96, is 128``."""
    for part, value in now.items():
        earlier = before.get(part, EARLIER_VALUES.get(part))
        if earlier == value:
            continue
        if part in _SECTIONS:
            earlier_values = EARLIER_VALUES.get(part, {}) | (earlier if isinstance(earlier, dict) else {})
            for key in value:
                if earlier_values.get(key) != value[key]:
                    yield f"{_SECTIONS[part]}.{key} was {earlier_values.get(key)}, is {value[key]}"
        elif part in ("data", "tokenizer"):
            what = "the data set" if part == "data" else "the tokenizer"
            yield f"{what} was {str(earlier)[:SHOWN_DIGITS]}, is {str(value)[:SHOWN_DIGITS]} (fingerprints)"
        else:
            yield f"train.{part} was {earlier}, is {value}"
