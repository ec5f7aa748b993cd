"""Checks of the data set: does it exist, are its shards complete, and is its tokenizer the right one?"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from job import amounts, storage
from job.config_data import Data
from job.data import hub
from job.data.corpus import Listing, OnListed, list_corpus
from job.data.dataset_files import Choice, is_on_hub
from job.data.manifest import Manifest, Shard, load_manifest
from job.data.shard_files import copy_name
from job.data.tokenizer import load_tokenizer, refuse_surrounding_tokens
from job.errors import UserError
from job.invocation import command
from job.local_dirs import cache_folder
from job.preflight.findings import Findings
from job.runs.run_tokenizer import check_data_set_tokenizer

_CHUNK_BYTES = 2**20
_PARALLEL_READS = 4
_MAX_NAMES = 3
"""Names that a row lists at most."""


def check_data(
    findings: Findings,
    data: Data,
    tokenizer_source: str,
    deep: bool,
    on_listed: OnListed = lambda listing: None,
) -> Manifest | None:
    """Check the data set and return its manifest; check the corpus and return None if there is no data set yet.

    Args:
        findings: takes the rows.
        data: where the data set is, or the corpus from which it will be made.
        tokenizer_source: tokenizer that the settings name, `tokenizer.source`.
        deep: True to read every shard, in the store and in this machine's cache, and compare its sha256, even if a
            note says that the copy in the cache was verified before.
        on_listed: called with the files of the corpus if there is no data set and the corpus can be listed.
    """
    shards_url = data.shards
    manifest = None
    with findings.guard("data set"):
        manifest = load_manifest(shards_url)
        training_tokens = sum(shard.tokens for shard in manifest.train)
        validation_tokens = sum(shard.tokens for shard in manifest.validation)
        found = (
            f"{training_tokens:,} training tokens, {validation_tokens:,} validation tokens, "
            f"vocabulary of {manifest.vocab_size:,}"
        )
        findings.right("data set", found)
    if manifest is None:
        _check_corpus(findings, data, on_listed)
        return None
    with findings.guard("shards"):
        _check_shards(findings, shards_url, manifest, deep)
    if deep and storage.is_remote(shards_url):
        with findings.guard("copies of shards"):
            _check_copies(findings, cache_folder(data.cache_dir), manifest)
    with findings.guard("tokenizer"):
        _check_tokenizer(findings, shards_url, tokenizer_source, manifest)
    return manifest


def check_future_data(findings: Findings, data: Data, place: str, on_listed: OnListed) -> None:
    """Check the corpus from which the job of `place` will make the data set; `on_listed` is as in `check_data`."""
    findings.right("data set", f"{data.shards}: none yet; the Job of {place} makes it")
    _check_corpus(findings, data, on_listed)


def _check_corpus(findings: Findings, data: Data, on_listed: OnListed) -> None:
    if is_on_hub(data.source):
        found = f"{data.source} is on a hub; only `prepare` reads it"
        findings.unsure("corpus", found, "after `prepare`, the plan has the real numbers")
        return
    with findings.guard("corpus"):
        choice = Choice(data.subset, data.source_split, data.text_documents)

        def show(listing: Listing) -> None:
            _show_listing(findings, listing)
            if listing.files:
                on_listed(listing)

        list_corpus(data.source, show, choice)


def _show_listing(findings: Findings, listing: Listing) -> None:
    findings.right("corpus", f"{amounts.files(len(listing.files))}, {amounts.size(listing.size)}")
    if left_out := listing.left_out_line():
        findings.right("corpus, left out", left_out)
    if duplicates := listing.in_several_forms():
        shown = "; ".join(" and ".join(names) for names in duplicates[:_MAX_NAMES])
        found = f"{len(duplicates)} name{'s' * (len(duplicates) != 1)} in several forms: {shown}"
        findings.unsure("corpus, twice?", found, "keep one form of each")


def _check_shards(findings: Findings, shards_url: str, manifest: Manifest, deep: bool) -> None:
    shards = manifest.train + manifest.validation
    sizes = _sizes(shards_url, shards)
    missing = [shard.name for shard in shards if shard.name not in sizes]
    damaged = [shard.name for shard in shards if sizes.get(shard.name, shard.size) != shard.size]
    if deep and not missing and not damaged:
        damaged = _with_wrong_sha256(shards_url, shards)
    if missing:
        found = f"{len(missing)} of {len(shards)} are missing: {_some(missing)}"
        findings.wrong("shards", found, f"run `{command('prepare')}` again: it makes missing shards")
    elif damaged:
        found = f"{len(damaged)} of {len(shards)} are damaged: {_some(damaged)}"
        findings.wrong("shards", found, f"delete them and run `{command('prepare')}` again: it makes missing shards")
    else:
        checked = "every sha256 is right" if deep else "all sizes are right (--deep also compares every sha256)"
        total_bytes = sum(shard.size for shard in shards)
        findings.right("shards", f"{amounts.files(len(shards))}, {amounts.size(total_bytes)}, {checked}")


def _sizes(shards_url: str, shards: tuple[Shard, ...]) -> dict[str, int]:
    """Return the size in bytes of each shard that exists, by name."""
    if storage.is_web(shards_url):  # a web server has no listing, so each shard is asked for

        def size(shard: Shard) -> tuple[str, int] | None:
            url = storage.join(shards_url, shard.name)
            return (shard.name, storage.size(url)) if storage.exists(url) else None

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return dict(existing for existing in pool.map(size, shards) if existing is not None)
    root = shards_url if storage.is_remote(shards_url) else str(storage.path_of(shards_url))
    return {entry.url.removeprefix(root.rstrip("/") + "/"): entry.size for entry in storage.list_files(shards_url)}


def _check_copies(findings: Findings, folder: Path, manifest: Manifest) -> None:
    shards = manifest.train + manifest.validation
    copies = {copy_name(shard): shard for shard in shards if (folder / copy_name(shard)).exists()}
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        comparisons = pool.map(lambda name: storage.sha256_file(folder / name) == copies[name].sha256, copies)
        damaged = [name for name, is_right in zip(copies, comparisons, strict=True) if not is_right]
    if damaged:
        found = f"{len(damaged)} of {amounts.files(len(copies))} in {folder} are damaged: {_some(damaged)}"
        remedy = "nothing now: `train` downloads them again; check the disk if this happens again"
        findings.unsure("copies of shards", found, remedy)
    elif copies:
        findings.right("copies of shards", f"{amounts.files(len(copies))} in {folder}, every sha256 is right")


def _with_wrong_sha256(shards_url: str, shards: tuple[Shard, ...]) -> list[str]:
    """Return the names of the shards whose content is not that of the manifest."""

    def is_damaged(shard: Shard) -> bool:
        digest = hashlib.sha256()
        with storage.open_read(storage.join(shards_url, shard.name)) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest() != shard.sha256

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return [shard.name for shard, damaged in zip(shards, pool.map(is_damaged, shards), strict=True) if damaged]


def _check_tokenizer(findings: Findings, shards_url: str, source: str, manifest: Manifest) -> None:
    """Compare the tokenizer beside the shards with the manifest, and with `tokenizer.source` if that is a folder."""
    url = storage.join(shards_url, manifest.tokenizer)
    with TemporaryDirectory(prefix="wikillm-") as scratch:
        try:
            tokenizer = load_tokenizer(url, scratch)
        except UserError as error:
            remedy = "restore the tokenizer, or prepare again"
            raise UserError("data.shards", url, error.expected, remedy) from None
        check_data_set_tokenizer(tokenizer, manifest, shards_url)
        fingerprint = tokenizer.fingerprint
        refuse_surrounding_tokens(tokenizer, "data.shards", url)
        if (storage.is_remote(source) and not hub.has_scheme(source)) or Path(source).expanduser().is_dir():
            try:
                source_fingerprint = load_tokenizer(source, scratch).fingerprint
            except UserError:  # training does not need tokenizer.source
                source_fingerprint = fingerprint
            if source_fingerprint != fingerprint:
                found = f"the data set's is {fingerprint[:12]}, tokenizer.source is {source_fingerprint[:12]}"
                remedy = "training uses the data set's; run `prepare` again to use the other one"
                findings.unsure("tokenizer", found, remedy)
                return
    findings.right("tokenizer", f"fingerprint {fingerprint[:12]}, the one that made the shards")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
