"""The data set: is there one, are its shards there and whole, and is its tokenizer the one that made them?"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from job import storage
from job.config import Config
from job.data import hub
from job.data.corpus import Listing, list_corpus
from job.data.dataset_files import Choice, is_on_hub
from job.data.manifest import Manifest, Shard, load_manifest
from job.data.shard_files import copy_name
from job.data.tokenizer import load_tokenizer, refuse_surrounding_tokens
from job.errors import UserError
from job.invocation import command
from job.local_dirs import cache_folder
from job.preflight.findings import Findings

_CHUNK_BYTES = 2**20
_PARALLEL_READS = 4
_SHOWN = 3


def check_data(findings: Findings, config: Config, deep: bool) -> Manifest | None:
    """The manifest of the data set; None if there is none yet, and then the corpus is looked for.

    Args:
        findings: takes the rows.
        config: all settings.
        deep: read every shard, where it is stored and in the cache of this machine, and compare its sha256; notes that
            it was verified before are ignored.
    """
    manifest = None
    with findings.guard("data set"):
        manifest = load_manifest(config.data.shards)
        tokens = sum(shard.tokens for shard in manifest.train)
        held_out = sum(shard.tokens for shard in manifest.validation)
        findings.right(
            "data set", f"{tokens:,} training tokens, {held_out:,} held out, {manifest.vocab_size:,} entries"
        )
    if manifest is None:
        _check_corpus(findings, config)
        return None
    with findings.guard("shards"):
        _check_shards(findings, config.data.shards, manifest, deep)
    if deep and storage.is_remote(config.data.shards):
        with findings.guard("copies of shards"):
            _check_copies(findings, cache_folder(config.data.cache_dir), manifest)
    with findings.guard("tokenizer"):
        _check_tokenizer(findings, config, manifest)
    return manifest


def _check_corpus(findings: Findings, config: Config) -> None:
    source, data = config.data.source, config.data
    if is_on_hub(source):
        findings.unsure("corpus", f"{source} is on a hub, which is asked by `prepare`")
        return
    with findings.guard("corpus"):
        choice = Choice(data.subset, data.source_split, data.text_documents)
        list_corpus(source, lambda listing: _say_listed(findings, listing), choice)


def _say_listed(findings: Findings, listing: Listing) -> None:
    findings.right("corpus", f"{len(listing.files)} files, {listing.size / 1e6:,.1f} MB")
    if what := listing.what_is_left_out():
        findings.right("corpus, left out", what)
    if twice := listing.in_two_forms():
        shown = "; ".join(" and ".join(names) for names in twice[:_SHOWN])
        findings.unsure(
            "corpus, twice?",
            f"{len(twice)} name{'s' * (len(twice) != 1)} in several forms: {shown}",
            "keep one of each",
        )


def _check_shards(findings: Findings, shards_url: str, manifest: Manifest, deep: bool) -> None:
    shards = manifest.train + manifest.validation
    sizes = _sizes(shards_url, shards)
    missing = [shard.name for shard in shards if shard.name not in sizes]
    damaged = [shard.name for shard in shards if sizes.get(shard.name, shard.size) != shard.size]
    if deep and not missing and not damaged:
        damaged = _with_another_sha256(shards_url, shards)
    remedy = f"delete what is damaged and run `{command('prepare')}` again, which makes what is missing"
    if missing:
        findings.wrong("shards", f"{len(missing)} of {len(shards)} are missing: {_some(missing)}", remedy)
    elif damaged:
        findings.wrong("shards", f"{len(damaged)} of {len(shards)} are damaged: {_some(damaged)}", remedy)
    else:
        how = "every sha256 is right" if deep else "with the right sizes; --deep reads them all"
        findings.right("shards", f"{len(shards)} files, {sum(shard.size for shard in shards) / 1e6:,.1f} MB, {how}")


def _sizes(shards_url: str, shards: tuple[Shard, ...]) -> dict[str, int]:
    """The sizes of the shards that are there, by name."""
    if storage.is_web(shards_url):  # can be read, but not listed

        def size(shard: Shard) -> tuple[str, int] | None:
            url = storage.join(shards_url, shard.name)
            return (shard.name, storage.size(url)) if storage.exists(url) else None

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return dict(found for found in pool.map(size, shards) if found is not None)
    root = shards_url if storage.is_remote(shards_url) else str(Path(shards_url.removeprefix("file://")).expanduser())
    return {entry.url.removeprefix(root.rstrip("/") + "/"): entry.size for entry in storage.list_files(shards_url)}


def _check_copies(findings: Findings, folder: Path, manifest: Manifest) -> None:
    shards = manifest.train + manifest.validation
    copies = {copy_name(shard): shard for shard in shards if (folder / copy_name(shard)).exists()}
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        right = pool.map(lambda name: storage.sha256_file(folder / name) == copies[name].sha256, copies)
        damaged = [name for name, is_right in zip(copies, right, strict=True) if not is_right]
    if damaged:
        found = f"{len(damaged)} of {len(copies)} files in {folder} are damaged: {_some(damaged)}"
        findings.unsure("copies of shards", found, "`train` fetches them again; if it happens again, look at the disk")
    elif copies:
        findings.right("copies of shards", f"{len(copies)} files in {folder}, every sha256 is right")


def _with_another_sha256(shards_url: str, shards: tuple[Shard, ...]) -> list[str]:
    def is_damaged(shard: Shard) -> bool:
        digest = hashlib.sha256()
        with storage.open_read(storage.join(shards_url, shard.name)) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest() != shard.sha256

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return [shard.name for shard, damaged in zip(shards, pool.map(is_damaged, shards), strict=True) if damaged]


def _check_tokenizer(findings: Findings, config: Config, manifest: Manifest) -> None:
    url = storage.join(config.data.shards, manifest.tokenizer)
    with TemporaryDirectory(prefix="wikillm-") as scratch:
        try:
            tokenizer = load_tokenizer(url, scratch)
        except UserError as error:
            raise UserError("data.shards", url, error.expected, "put the tokenizer back, or prepare again") from None
        if (found := tokenizer.fingerprint) != manifest.tokenizer_fingerprint:
            expected = "the tokenizer beside the shards is not the one that made them"
            findings.wrong("tokenizer", expected, "put the right one back, or prepare again")
            return
        refuse_surrounding_tokens(tokenizer, "data.shards", url)
        source = config.tokenizer.source
        if (storage.is_remote(source) and not hub.has_scheme(source)) or Path(source).expanduser().is_dir():
            try:
                other = load_tokenizer(source, scratch).fingerprint
            except UserError:  # training has no need of it
                other = found
            if other != found:
                expected = f"the data set's {found[:12]} is not that of tokenizer.source, {other[:12]}"
                findings.unsure("tokenizer", expected, "training uses the data set's; `prepare` again for another")
                return
    findings.right("tokenizer", f"{found[:12]}, the one that made the shards")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
