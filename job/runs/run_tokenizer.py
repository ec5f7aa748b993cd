"""The tokenizer that a run keeps beside its checkpoints, and the check that a tokenizer is the expected one."""

from job import storage
from job.data.manifest import Manifest
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.runs.compatibility import SHOWN_DIGITS

TOKENIZER_FOLDER = "tokenizer"
"""Folder inside `run.output`. It makes the checkpoints usable without the data set."""


def run_tokenizer_url(output: str) -> str:
    """Return the folder or URL of the tokenizer of the run at `output`."""
    return storage.join(output, TOKENIZER_FOLDER)


def check_tokenizer(
    tokenizer: TextTokenizer,
    fingerprint: str,
    *,
    found_in: str,
    product: str,
    setting: str,
    value: str,
    remedy: str,
) -> None:
    """Raise a UserError if `tokenizer` is not the one with this fingerprint.

    Args:
        tokenizer: the tokenizer that was found.
        fingerprint: fingerprint of the expected tokenizer.
        found_in: folder or URL of `tokenizer`, for the message.
        product: what was made with the expected tokenizer, such as "the data set".
        setting: name of the setting to change, such as ``data.shards``.
        value: value of that setting.
        remedy: what to do about it.
    """
    if tokenizer.fingerprint != fingerprint:
        expected = (
            f"the tokenizer in {found_in} has fingerprint {tokenizer.fingerprint[:SHOWN_DIGITS]}, "
            f"but {product} was made with {fingerprint[:SHOWN_DIGITS]}"
        )
        raise UserError(setting, value, expected, remedy)


def check_data_set_tokenizer(tokenizer: TextTokenizer, manifest: Manifest, shards_url: str) -> None:
    """Raise a UserError if the tokenizer beside the shards is not the one that made them.

    Args:
        tokenizer: the tokenizer that is stored with the data set.
        manifest: the data set.
        shards_url: folder or URL of the data set.
    """
    check_tokenizer(
        tokenizer,
        manifest.tokenizer_fingerprint,
        found_in=storage.join(shards_url, manifest.tokenizer),
        product="the data set",
        setting="data.shards",
        value=shards_url,
        remedy="restore the tokenizer of the data set, or prepare again",
    )
