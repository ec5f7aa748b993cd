"""What each command does: takes the settings apart, calls the wings, and says what came out."""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from job import storage
from job.config import Config
from job.data.corpus import BadRecord, Document, list_corpus, read_slices
from job.data.dataset_files import Choice
from job.data.fingerprint import Identified
from job.data.listing import Listing, some
from job.data.manifest import load_manifest
from job.data.prepare import Recipe, describe
from job.data.prepare_processes import prepare_in_processes
from job.data.split import is_held_out
from job.data.tokenizer import (
    load_tokenizer,
    refuse_hub_id,
    refuse_surrounding_tokens,
    store_tokenizer,
    train_tokenizer,
)
from job.errors import EXIT_DONE, EXIT_STOPPED, UserError
from job.launcher.environment import find_place, part_of_array
from job.launcher.signals import Requests, Stopped, raised
from job.local_dirs import cache_folder
from job.log_setup import silence_libraries
from job.report import Report

_MOST_BAD_RECORDS_SHOWN = 10
_MOST_EQUAL_SHOWN = 3


def recipe_of(config: Config) -> Recipe:
    """What decides the content of the data set."""
    data = config.data
    return Recipe(
        source=data.source,
        text_field=data.text_field,
        id_field=data.id_field,
        on_bad_record=data.on_bad_record,
        slice_bytes=int(data.slice_bytes),
        validation_fraction=data.validation_fraction,
        seed=data.seed,
        choice=Choice(data.subset, data.source_split, data.text_documents),
    )


def prepare(config: Config, words: Sequence[str] = ()) -> int:
    """Raw documents → token shards."""
    report = Report()
    try:
        with raised():
            return _prepare(config, report)
    except Stopped:
        report.say("stopped; started again, it goes on after the slices that are done")
        return EXIT_STOPPED


def _prepare(config: Config, report: Report) -> int:
    tokenizer = load_tokenizer(config.tokenizer.source, cache_folder(config.data.cache_dir))
    refuse_surrounding_tokens(tokenizer, "tokenizer.source", config.tokenizer.source)
    started, documents, text_bytes, bad = time.monotonic(), 0, 0, 0

    def on_progress(more_documents: int, more_bytes: int) -> None:
        nonlocal documents, text_bytes
        documents, text_bytes = documents + more_documents, text_bytes + more_bytes
        rate = text_bytes / 1e6 / (time.monotonic() - started)
        report.advance(documents, f"{text_bytes / 1e6:,.1f} MB of text, {rate:.1f} MB/s")

    def on_bad_record(record: BadRecord) -> None:
        nonlocal bad
        bad += 1
        if bad <= _MOST_BAD_RECORDS_SHOWN:
            report.say(f"left out: {record.url}: {record.position}: {record.reason}")

    def on_identified(corpus: Identified) -> None:
        report.say(f"corpus: {corpus}")
        for names in corpus.equal[:_MOST_EQUAL_SHOWN]:
            report.say(f"warning: the same content, so that each document counts {len(names)} times: {some(names)}")
        if (more := len(corpus.equal) - _MOST_EQUAL_SHOWN) > 0:
            report.say(f"warning: the same content in {more:,} more groups of files")

    report.start_bar("preparing", total=None)
    try:
        manifest = prepare_in_processes(
            recipe_of(config),
            tokenizer,
            config.data.shards,
            storage.StoreOptions(**config.store.model_dump()),
            _worker(config.data.worker),
            config.data.processes,
            on_progress,
            on_bad_record,
            report.say,
            config.tokenizer.engine,
            on_identified,
            lambda listing: _say_listed(report, listing),
        )
    finally:
        report.end_bar()
    seconds = time.monotonic() - started
    if manifest is None:
        report.say(f"this worker's slices are done in {seconds:.0f} s; others are still to come, the last one ends it")
        return EXIT_DONE
    report.table(f"{config.data.shards}", describe(manifest))
    report.say(
        f"prepared {text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s ({text_bytes / 1e6 / seconds:.1f} MB/s)"
    )
    return EXIT_DONE


def tokenizer(config: Config, words: Sequence[str] = ()) -> int:
    """Corpus → tokenizer."""
    report = Report()
    refuse_hub_id(config.tokenizer.source)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        trained = train_tokenizer(_training_texts(config, report), config.tokenizer.vocab_size, Path(scratch))
        store_tokenizer(trained, config.tokenizer.source)
        seconds = time.monotonic() - started
        report.say(f"tokenizer with {trained.vocab_size:,} entries in {config.tokenizer.source} ({seconds:.1f} s)")
        if trained.vocab_size < config.tokenizer.vocab_size:
            report.say(f"  {config.tokenizer.vocab_size:,} were asked for; the text has no more pairs that repeat")
    return EXIT_DONE


def generate(config: Config, words: Sequence[str] = ()) -> int:
    """A trained model → text."""
    silence_libraries()
    from job.model.generation import Sampling, continue_text
    from job.runs.load_model import load_trained

    source, setting = (
        config.generate.model or config.run.output,
        "generate.model" if config.generate.model else "run.output",
    )
    trained = load_trained(source, setting, cache_folder(config.data.cache_dir))
    options = config.generate.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    for index, prompt in enumerate(words or config.generate.prompts):
        sys.stdout.write(prompt)
        sampling = Sampling(**options).for_prompt(index)
        continue_text(trained.model, trained.tokenizer, prompt, sampling, trained.context_length, on_text=_write)
        sys.stdout.write("\n\n" if len(words or config.generate.prompts) > 1 else "\n")
    return EXIT_DONE


def train(config: Config, words: Sequence[str] = ()) -> int:
    """Shards → model."""
    requests = Requests()
    from job.data.batching import cut_batch
    from job.launcher.supervisor import find_device, launch, world_size
    from job.model.spec import ModelSpec
    from job.training.rules import check_learning_rates

    # The workers check these as well, but they take seconds to start.
    check_learning_rates(config.train)
    ModelSpec(**config.model.model_dump())
    place = find_place()
    device = find_device(config, place)
    cut_batch(config.train.global_batch_size, config.train.micro_batch_size, world_size(config, place, device))
    load_manifest(config.data.shards)
    return launch("train", config, place, device, requests)


def evaluate(config: Config, words: Sequence[str] = ()) -> int:
    """A trained model → held-out loss."""
    requests = Requests()
    from job.launcher.supervisor import find_device, launch

    place = find_place()
    return launch("evaluate", config, place, find_device(config, place), requests)


def check(
    config: Config, config_path: str | None = None, overrides: Sequence[tuple[str, str]] = (), **options: Any
) -> int:
    """Settings → what is wrong with them, and the plan."""
    from job.preflight.check import check

    return check(config, config_path=config_path, overrides=overrides, **options)


def demo(config: Config, words: Sequence[str] = ()) -> int:
    """Everything, on this machine."""
    from job.demo.walk import walk

    return walk(config)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say_listed(report: Report, listing: Listing) -> None:
    report.rows(f"corpus {listing.source}", listing.rows())


def _worker(setting: str | None) -> tuple[int, int]:
    if setting is None:
        return part_of_array()
    index, workers = map(int, setting.split("/"))
    if index >= workers:
        raise UserError(
            "data.worker", setting, "expected i/n with 0 <= i < n", f"the last one is {workers - 1}/{workers}"
        )
    return index, workers


def _training_texts(config: Config, report: Report) -> Iterator[str]:
    """Texts of the corpus that are not held out, up to tokenizer.train_bytes."""
    recipe, left = recipe_of(config), int(config.tokenizer.train_bytes)
    for file in list_corpus(recipe.source, lambda listing: _say_listed(report, listing), recipe.choice):
        for record in read_slices(file, recipe.slice_bytes, lambda _: True, recipe.text_field, recipe.id_field):
            if isinstance(record, BadRecord):
                recipe.tolerate(record)
            if not isinstance(record, Document):
                continue
            if not is_held_out(record.id, record.text, recipe.seed, recipe.validation_fraction):
                yield record.text
                left -= len(record.text.encode())
            if left <= 0:
                return
