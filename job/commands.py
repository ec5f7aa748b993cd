"""The commands: each function takes the settings it needs, calls the other parts of `job`, and prints the result."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from job import amounts, storage
from job.config import Config
from job.data.corpus import BadRecord
from job.data.dataset_files import Choice
from job.data.fingerprint import CorpusIdentity
from job.data.listing import Listing, shorten_names
from job.data.manifest import MANIFEST_NAME, load_manifest
from job.data.prepare import describe
from job.data.prepare_processes import prepare_in_processes
from job.data.recipe import Recipe
from job.data.text_sample import TextSample, sample_corpus
from job.data.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    refuse_hub_id,
    refuse_surrounding_tokens,
    store_new_tokenizer,
)
from job.data.tokenizer_download import has_no_tokenizer_yet
from job.data.tokenizer_training import BYTES_PER_BYTE, train_in_process
from job.errors import EXIT_DONE, EXIT_STOPPED, UserError
from job.invocation import command
from job.launcher.environment import detect_environment, part_of_array
from job.launcher.signals import Stopped, StopRequests, raise_on_stop
from job.local_dirs import cache_folder
from job.log_setup import silence_libraries
from job.report import Report

_MOST_BAD_RECORDS_SHOWN = 10
_MOST_EQUAL_SHOWN = 3
_MEASURED_BYTES = 4 * 2**20
"""Largest amount of validation text on which a new tokenizer is measured. Encoding it takes about a second."""


def recipe_of(config: Config) -> Recipe:
    """Return the settings that decide the content of the data set."""
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
    """Make token shards from raw documents. Returns the exit code."""
    report = Report()
    try:
        with raise_on_stop():
            return _prepare(config, report)
    except Stopped:
        report.say("stopped; run `prepare` again to continue with the slices that are not done")
        return EXIT_STOPPED


def _prepare(config: Config, report: Report) -> int:
    if has_no_tokenizer_yet(config.tokenizer.source):
        _train_missing_tokenizer(config, report)
    tokenizer = load_tokenizer(config.tokenizer.source, cache_folder(config.data.cache_dir))
    refuse_surrounding_tokens(tokenizer, "tokenizer.source", config.tokenizer.source)
    started, documents, text_bytes = time.monotonic(), 0, 0

    def on_progress(more_documents: int, more_bytes: int) -> None:
        nonlocal documents, text_bytes
        documents, text_bytes = documents + more_documents, text_bytes + more_bytes
        rate = amounts.size(text_bytes / (time.monotonic() - started))
        report.advance(documents, f"{amounts.size(text_bytes)} of text, {rate}/s")

    def on_identified(corpus: CorpusIdentity) -> None:
        report.say(f"corpus: {corpus}")
        for names in corpus.duplicates[:_MOST_EQUAL_SHOWN]:
            report.say(
                f"warning: these files are equal, so each document counts {len(names)} times: {shorten_names(names)}"
            )
        if (more := len(corpus.duplicates) - _MOST_EQUAL_SHOWN) > 0:
            report.say(f"warning: {more:,} more groups of equal files")

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
            _bad_record_notice(report),
            report.say,
            config.tokenizer.engine,
            on_identified,
            lambda listing: _say_listed(report, listing),
        )
    finally:
        report.end_bar()
    seconds = time.monotonic() - started
    if manifest is None:
        report.say(
            f"this worker has done its slices in {seconds:.0f} s; other workers are still at work, and the last one "
            "writes the manifest"
        )
        return EXIT_DONE
    report.table(f"{config.data.shards}", describe(manifest))
    report.say(
        f"prepared {amounts.size(text_bytes)} of text in {seconds:.1f} s ({amounts.size(text_bytes / seconds)}/s)"
    )
    if not manifest.validation:
        fraction = config.data.validation_fraction
        report.say(f"no document is in the validation split (data.validation_fraction {fraction:g}): no evaluation")
    return EXIT_DONE


def _train_missing_tokenizer(config: Config, report: Report) -> None:
    """Train the tokenizer that `tokenizer.source` does not have yet, as the command `tokenizer` does.

    Raises:
        UserError: several workers prepare this corpus, and each would train a tokenizer.
    """
    source, (_, workers) = config.tokenizer.source, _worker(config.data.worker)
    if workers > 1:
        expected = f"no tokenizer there, and each of {workers} `prepare` workers would train one"
        raise UserError("tokenizer.source", source, expected, f"run `{command('tokenizer')}` once, with these settings")
    storage.exists(storage.join(config.data.shards, MANIFEST_NAME))  # Try the address before the minutes of training.
    first = (
        f"no tokenizer in {source} yet: training one with up to {config.tokenizer.vocab_size:,} tokens on the corpus"
    )
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        _train_tokenizer(config, report, Path(scratch), first)


def tokenizer(config: Config, words: Sequence[str] = ()) -> int:
    """Train a tokenizer on a sample of the corpus and store it. Returns the exit code."""
    report = Report()
    refuse_hub_id(config.tokenizer.source)
    try:
        with raise_on_stop(), tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
            _train_tokenizer(config, report, Path(scratch))
            return EXIT_DONE
    except Stopped:
        report.say("stopped; no tokenizer was written")
        return EXIT_STOPPED


def _train_tokenizer(config: Config, report: Report, scratch: Path, first: str = "") -> None:
    """Train and store a tokenizer; `first` is a line that is printed once the corpus is found."""
    started, settings = time.monotonic(), config.tokenizer
    # This also tries the address and the credentials before the minutes that training takes.
    if storage.exists(storage.join(settings.source, "tokenizer.json")):
        report.say(f"{settings.source} has a tokenizer already; if the new one differs, it is refused at the end")

    def say_listed(listing: Listing) -> None:
        if first:
            report.say(first)
        _say_listed(report, listing)

    report.start_bar("reading", total=None)
    try:
        train, validation = sample_corpus(
            recipe_of(config),
            int(settings.train_bytes),
            _MEASURED_BYTES,
            lambda documents, utf8_bytes: report.advance(documents, f"{amounts.size(utf8_bytes)} of text"),
            _bad_record_notice(report),
            say_listed,
        )
    finally:
        report.end_bar()
    if not train.size:
        expected = f"its training split has no text, with data.validation_fraction {config.data.validation_fraction:g}"
        raise UserError("data.source", config.data.source, expected, "name another corpus, or lower the fraction")
    report.say(
        f"sample: {len(train):,} of {train.documents:,} training documents, {amounts.size(train.size)} of "
        f"{amounts.size(train.utf8_bytes)} of text ({train.size / train.utf8_bytes:.1%})"
    )
    _warn_of_memory(report, train)
    report.start_bar("training", total=None)
    try:
        trained = train_in_process(train.texts(), settings.vocab_size, scratch, int(settings.train_bytes))
    finally:
        report.end_bar()
    worth = _worth_of(trained, validation)
    store_new_tokenizer(trained, settings.source)
    seconds = time.monotonic() - started
    report.say(f"tokenizer with {trained.vocab_size:,} tokens in {settings.source} ({seconds:.1f} s)")
    if trained.vocab_size < settings.vocab_size:
        wanted = f"tokenizer.vocab_size is {settings.vocab_size:,}"
        report.say(f"  {wanted}, but the text has no more pairs of tokens that occur twice")
    report.say(f"  {worth}")


def generate(config: Config, words: Sequence[str] = ()) -> int:
    """Print the continuations of prompts by a trained model. Returns the exit code."""
    silence_libraries()
    from job.trying.continuations import try_model

    return try_model(config, words)


def init(
    config: Config, config_path: str | None = None, overrides: Sequence[tuple[str, str]] = (), **options: Any
) -> int:
    """Write a settings file that fits the text in ./data and this machine. Returns the exit code."""
    from job.init.settings_file import write_settings_file

    return write_settings_file(config, [name for name, _ in overrides], **options)


def train(config: Config, words: Sequence[str] = ()) -> int:
    """Train a model on shards. Returns the exit code."""
    requests = StopRequests()
    from job.data.batching import cut_batch
    from job.launcher.supervisor import find_device, launch, world_size
    from job.tracking import make_trackers
    from job.training.rules import check_model_and_schedule

    # The workers check these settings too, but they take seconds to start.
    check_model_and_schedule(config.model, config.train)
    make_trackers(config.tracking)
    environment = detect_environment()
    device = find_device(config, environment)
    # The workers choose the micro-batch. Here only the number of processes is checked: it must divide the batch.
    cut_batch(config.train.global_batch_size, 1, world_size(config, environment, device))
    load_manifest(config.data.shards)
    return launch("train", config, environment, device, requests)


def evaluate(config: Config, words: Sequence[str] = ()) -> int:
    """Measure the validation loss of a trained model. Returns the exit code."""
    requests = StopRequests()
    from job.launcher.supervisor import find_device, launch

    environment = detect_environment()
    return launch("evaluate", config, environment, find_device(config, environment), requests)


def check(
    config: Config, config_path: str | None = None, overrides: Sequence[tuple[str, str]] = (), **options: Any
) -> int:
    """Print what is wrong with the settings, the data or the machine, and the plan. Returns the exit code."""
    from job.preflight.check import check

    return check(config, config_path=config_path, overrides=overrides, **options)


def report(
    config: Config,
    config_path: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    words: Sequence[str] = (),
    to: str | None = None,
) -> int:
    """Write the report on the runs in `words`, or on `run.output`, to the folder `to`. Returns the exit code."""
    from job.run_report.write_report import check_targets, make_report

    runs = words or [config.run.output]
    written = make_report(runs)
    folder = to or (storage.join(runs[0], "logs") if len(runs) == 1 else ".")
    check_targets(folder)
    try:
        files = written.store(folder)
    except storage.StoreError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError("--to", folder, f"cannot be written: {reason}", "name another folder with --to") from None
    except UserError as error:
        raise UserError("--to", folder, f"cannot be written: {error.expected}", error.remedy) from None
    for sentence in written.missing:
        sys.stderr.write(f"! {sentence}\n")
    for file in files:
        Report().say(file)
    return EXIT_DONE


def demo(config: Config, words: Sequence[str] = ()) -> int:
    """Run everything from raw documents to a trained model on this machine. Returns the exit code."""
    from job.demo.walk import walk

    return walk(config)


def _say_listed(report: Report, listing: Listing) -> None:
    report.rows(f"corpus {listing.source}", listing.rows())


def _worker(setting: str | None) -> tuple[int, int]:
    if setting is None:
        return part_of_array()
    index, workers = map(int, setting.split("/"))
    if index >= workers:
        raise UserError(
            "data.worker", setting, "expected i/n with 0 <= i < n", f"the last worker is {workers - 1}/{workers}"
        )
    return index, workers


def _bad_record_notice(report: Report) -> Callable[[BadRecord], None]:
    """Return a function that prints the first bad records that are left out."""
    bad = 0

    def notice(record: BadRecord) -> None:
        nonlocal bad
        bad += 1
        if bad <= _MOST_BAD_RECORDS_SHOWN:
            report.say(f"skipped a bad record: {record.url}: {record.position}: {record.reason}")

    return notice


def _warn_of_memory(report: Report, train: TextSample) -> None:
    from job.preflight.machine import memory_bytes

    needed_bytes, free_bytes = BYTES_PER_BYTE * train.size, memory_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        report.say(
            f"warning: training on this sample takes about {needed_bytes / 2**30:,.1f} GiB of memory, but only "
            f"{free_bytes / 2**30:,.1f} GiB are free; if it is killed, lower tokenizer.train_bytes"
        )


def _worth_of(tokenizer: TextTokenizer, validation: TextSample) -> str:
    """Return a line with the tokenizer's bytes per token on text that it was not trained on."""
    texts = list(validation.texts())
    if not texts:
        return "there are no validation documents, so its bytes per token are not measured"
    tokens = sum(map(len, tokenizer.encode(texts)))
    return (
        f"{validation.size / tokens:.3f} bytes per token on {amounts.size(validation.size)} of validation text, "
        "which it was not trained on"
    )
