"""Preparation of a data set: the corpus becomes token shards, made slice by slice by any number of workers.

    corpus files → plan.json (created once, see `job.data.data_set_plan`)
    groups of files → slices → this worker's slices → shard files and part records (see `job.data.make_shards`)
    part records of all slices of the plan → tokenizer → manifest.json

A slice is the unit of work, and makes one shard per split. A large file is cut into slices of `data.slice_bytes`;
consecutive small files share a slice as long as they take at most `data.slice_bytes` together (see
`job.data.corpus.group_files`). So many small files do not make many small shards.

All that a worker writes follows from the plan and the slice alone. So workers that share only the object store write
the same bytes, a worker that died is simply started again, and making a slice twice does no harm. If the fast
tokenizer turns out to be wrong, only time is lost: the slices that it made in this run are made again.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from job import storage
from job.data.corpus import OnListed, group_files, list_corpus
from job.data.data_set_plan import claimed, delete_plan, ensure_plan, finished_data_set, make_plan
from job.data.encoder import Disagreement, Encoder, Engine
from job.data.fingerprint import identify
from job.data.make_shards import make_slices, token_type
from job.data.manifest import MANIFEST_NAME, Manifest, load_manifest, manifest_bytes
from job.data.parts import Counts, slice_count
from job.data.recipe import OnBadRecord, OnIdentified, OnNotice, OnProgress, Preparation, Recipe
from job.data.split import SPLIT_RULE
from job.data.tokenizer import TextTokenizer, replace_tokenizer
from job.errors import UserError

TOKENIZER_FOLDER = "tokenizer"


def prepare(
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    worker: tuple[int, int] = (0, 1),
    on_progress: OnProgress = lambda documents, utf8_bytes: None,
    on_bad_record: OnBadRecord = lambda record: None,
    on_notice: OnNotice = lambda line: None,
    engine: Engine = "auto",
    on_identified: OnIdentified = lambda corpus: None,
    on_listed: OnListed = lambda listing: None,
) -> Manifest | None:
    """Make this worker's shards; then write the manifest if the shards of all workers are finished.

    Args:
        recipe: what to make.
        tokenizer: makes tokens of text; it is stored beside the shards.
        shards_url: the folder or URL of the data set.
        worker: (i, n): this is worker i of n.
        on_progress: called several times a second with what was done; see `job.data.recipe` for these callbacks.
        on_bad_record: called with every record that is left out.
        on_notice: called with one line that says why preparation takes longer than it could.
        engine: what makes the tokens, see `job.data.encoder`. It changes the time, never a byte.
        on_identified: called with the identity of the corpus.
        on_listed: called before that with the files of the corpus, and those that are left out.

    Returns:
        The manifest if the data set is complete; None if other workers still have slices to make.

    Raises:
        UserError: the corpus cannot be read, changes while it is read, or has a bad record and the recipe says stop;
            or another plan made, or began to make, a data set at `shards_url`.
    """

    def make(preparation: Preparation, engine: Engine) -> None:
        make_slices(preparation, worker, Encoder(tokenizer, engine, on_notice), on_progress, on_bad_record)

    index, workers = worker
    shares = (range(index, index + 1), workers)
    return prepare_with(make, recipe, tokenizer, shards_url, shares, engine, on_notice, on_identified, on_listed)


def prepare_with(
    make: Callable[[Preparation, Engine], None],
    recipe: Recipe,
    tokenizer: TextTokenizer,
    shards_url: str,
    shares: tuple[range, int],
    engine: Engine,
    on_notice: OnNotice,
    on_identified: OnIdentified,
    on_listed: OnListed,
) -> Manifest | None:
    """Agree with other workers on the plan, call `make` for the slices, and write the manifest if all are finished.

    Args:
        make: makes the slices of this worker's shares with an engine; it may raise `Disagreement`.
        recipe: as in `prepare`, and so are the arguments that are not described here.
        tokenizer: as in `prepare`.
        shards_url: as in `prepare`.
        shares: (range of i, n): this worker makes shares i of n, like workers i of n.
        engine: as in `prepare`.
        on_notice: as in `prepare`.
        on_identified: as in `prepare`.
        on_listed: as in `prepare`.
    """
    files = list_corpus(recipe.source, on_listed, recipe.choice)
    identified = identify(files)
    on_identified(identified)
    plan = make_plan(identified.fingerprints, recipe.settings | {"tokenizer.source": tokenizer.fingerprint})
    if (manifest := finished_data_set(plan, shards_url)) is not None:
        return manifest
    # The groups follow from the sizes in the plan, because a file may have grown since it was listed.
    sized = [replace(file, size=fingerprint.size) for file, fingerprint in zip(files, plan.source, strict=True)]
    groups = group_files(sized, recipe.slice_bytes)
    preparation = Preparation(recipe, tokenizer, shards_url, plan, groups, identified.versions)
    with claimed(plan, shards_url, lambda: bool(preparation.parts.finished())):
        _make_exactly(preparation, shares, engine, make, on_notice)
        return _publish_manifest(preparation)


def _make_exactly(
    preparation: Preparation,
    shares: tuple[range, int],
    engine: Engine,
    make: Callable[[Preparation, Engine], None],
    on_notice: OnNotice,
) -> None:
    """Make the slices; if the fast tokenizer was wrong, delete those of this run and make them with the reference."""
    before = preparation.parts.finished()
    try:
        make(preparation, engine)
    except Disagreement as disagreement:
        on_notice(f"{disagreement}: the slices of this run are made again with the reference, slowly")
        mine, workers = shares
        made = {part: is_last for part, is_last in preparation.parts.finished().items() if part not in before}
        storage.delete(
            preparation.parts.url_of(group, number, is_last)
            for (group, number), is_last in made.items()
            if (group + number) % workers in mine
        )
        make(preparation, "reference")


def _publish_manifest(preparation: Preparation) -> Manifest | None:
    """Write the tokenizer and then the manifest if every slice is finished; otherwise return None."""
    recipe, tokenizer, shards_url = preparation.recipe, preparation.tokenizer, preparation.shards_url
    done = preparation.parts.finished()
    wanted: list[tuple[int, int]] = []
    for group in preparation.groups:
        slices = slice_count(group, done)
        if slices is None or any((group.index, number) not in done for number in range(slices)):
            return None
        wanted += [(group.index, number) for number in range(slices)]
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda part: preparation.parts.read(part[0], part[1], done[part]), wanted))
    counts = Counts()
    for part in parts:
        counts.add(part.counts)
    train = tuple(part.train for part in parts if part.train is not None)
    validation = tuple(part.validation for part in parts if part.validation is not None)
    if not train:
        # The folder must be usable with other settings, so everything of this plan is deleted.
        storage.delete(storage.join(shards_url, shard.name) for shard in validation)
        storage.delete_tree(preparation.parts.url)
        delete_plan(preparation.plan, shards_url)
        expected = f"no text to train on ({counts.documents} documents, {counts.empty} empty, {counts.bad} bad)"
        remedy = f"check that data.text_field ({recipe.text_field!r}) names the field with the text"
        raise UserError("data.source", recipe.source, expected, remedy)
    contents = [tokenizer.fingerprint, *(shard.sha256 for shard in train), "", *(shard.sha256 for shard in validation)]
    manifest = Manifest(
        fingerprint=hashlib.sha256("\n".join(contents).encode()).hexdigest(),
        plan=preparation.plan.digest,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer=TOKENIZER_FOLDER,
        vocab_size=tokenizer.vocab_size,
        dtype=token_type(tokenizer),
        eod_id=tokenizer.eod_id,
        seed=recipe.seed,
        validation_fraction=recipe.validation_fraction,
        split_rule=SPLIT_RULE,
        train=train,
        validation=validation,
        statistics=asdict(counts),
    )
    ensure_plan(preparation.plan, shards_url)
    replace_tokenizer(tokenizer, storage.join(shards_url, TOKENIZER_FOLDER))
    storage.create_bytes(storage.join(shards_url, MANIFEST_NAME), manifest_bytes(manifest))
    return load_manifest(shards_url)


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the numbers of a data set as rows of name and value."""
    statistics, shards = manifest.statistics, manifest.train + manifest.validation
    tokens = sum(shard.tokens for shard in shards)
    utf8_bytes = sum(shard.utf8_bytes for shard in shards)
    characters = sum(shard.characters for shard in shards)
    train, validation = (sum(shard.documents for shard in split) for split in (manifest.train, manifest.validation))
    text_tokens = max(1, tokens - train - validation)
    rows = [
        ("documents", f"{statistics['documents']:,}"),
        ("  empty, left out", f"{statistics['empty']:,}"),
        ("  bad, left out", f"{statistics['bad']:,}"),
        ("  train / validation", f"{train:,} / {validation:,}"),
        ("UTF-8 bytes of text", f"{utf8_bytes:,}"),
        ("characters", f"{characters:,}"),
        ("tokens", f"{tokens:,}"),
        ("tokens per character", f"{text_tokens / max(1, characters):.3f}"),
        ("bytes per token", f"{utf8_bytes / text_tokens:.3f}"),
        ("shards", f"{len(manifest.train)} + {len(manifest.validation)}"),
        ("tokens dropped", f"{statistics['encoded_tokens'] - tokens:,}"),
    ]
    if statistics["normalized"]:
        rows.append(("documents changed by the tokenizer's normalizer", f"{statistics['normalized']:,}"))
    return rows
