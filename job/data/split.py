"""Which documents are held out: a hash of each document's own identity, so nothing else can move it."""

from hashlib import blake2b

SPLIT_RULE = "blake2b-64(id, or text where there is no id; key = seed, 8 bytes little-endian) < fraction * 2^64"


def is_held_out(document_id: str | None, text: str, seed: int, validation_fraction: float) -> bool:
    """Whether a document belongs to the validation split.

    It depends on the document and the seed alone: not on order, on workers, or on which other documents there are.
    """
    identity = text if document_id is None else document_id
    digest = blake2b(identity.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < validation_fraction * 2**64
