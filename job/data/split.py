"""The rule that puts a document into the training or the validation split, by a hash of its id or text."""

from hashlib import blake2b

SPLIT_RULE = "blake2b-64(id, or text where there is no id; key = seed, 8 bytes little-endian) < fraction * 2^64"


def is_validation(document_id: str | None, text: str, seed: int, validation_fraction: float) -> bool:
    """Return True if a document belongs to the validation split.

    The answer depends only on the document and the seed, not on the order, the workers or the other documents.
    """
    identity = text if document_id is None else document_id
    digest = blake2b(identity.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < validation_fraction * 2**64
