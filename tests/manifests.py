"""Manifests of data sets that do not exist, for tests that only calculate with them."""

from job.data.manifest import Manifest, Shard, shard_size


def manifest_of(train: list[int], validation: list[int]) -> Manifest:
    """Return a manifest whose shards have these numbers of tokens, one document each; no shard exists."""

    def shards(tokens: list[int]) -> tuple[Shard, ...]:
        return tuple(
            Shard(name=f"{i}.bin", tokens=count, documents=1, utf8_bytes=1, characters=1,
                  size=shard_size(count, 1, "uint16"), sha256="0" * 64)
            for i, count in enumerate(tokens)
        )  # fmt: skip

    return Manifest(
        fingerprint="", tokenizer_fingerprint="", vocab_size=400, dtype="uint16", eod_id=0, seed=0,
        validation_fraction=0.1, split_rule="", train=shards(train), validation=shards(validation), statistics={},
    )  # fmt: skip
