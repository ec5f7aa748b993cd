"""Writes the settings file of `init`: about thirty of the settings, each with the reason for its value."""

import os
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from job import amounts
from job.config import Config, as_yaml, build
from job.data.batching import cut_batch
from job.data.dataset_files import is_on_hub
from job.data.tokenizer import load_tokenizer
from job.data.tokenizer_download import is_hub_name
from job.demo.walk import SAMPLE
from job.errors import EXIT_DONE, UserError
from job.init.sizes import MIDDLE, SMALL, Choice, choose_sizes
from job.init.surroundings import Corpus, Machine, holds_no_foreign_files, look_at_corpus, look_at_machine
from job.invocation import command
from job.report import Report
from job.suggestions import find_entry
from job.tracking import TRACKERS
from job.training.rules import check_model_and_schedule

_DEFAULT_FILE = "job.yaml"
_DATA_FOLDER = "data"
_TOKENIZER = "data/tokenizer"
_HUB_CORPUS = "fjcanyue/wikipedia-zh-cn"
_PLACES = ("run.output", "data.shards", "tokenizer.source")
"""Settings that name a place in the folder of the data, if the command line does not name another."""
_GIVEN = "as on the command line of `init`"


@dataclass(frozen=True)
class _Line:
    """A setting in the file."""

    name: str
    value: Any
    comment: str


class _Tokenizer(NamedTuple):
    """The tokenizer of the file."""

    line: _Line
    is_trained: bool
    """True if it will be trained on the text."""
    remark: str
    """A line about the tokenizer that is there already; empty if there is none."""


def write_settings_file(config: Config, given: Sequence[str], file: str = _DEFAULT_FILE) -> int:
    """Look at the text and the machine, write the file, and print what was found and what comes next.

    Args:
        config: the defaults, with the settings of the command line.
        given: names of the settings of the command line. They are written to the file as they are.
        file: path of the new file.

    Returns:
        The exit code.

    Raises:
        UserError: the file exists or cannot be written, the text cannot be read, or `train` would refuse a setting.
    """
    report, path = Report(), Path(file)
    if os.path.lexists(path):
        raise _exists(file)
    _check_data_folder(given)
    corpus, assumed = _find_corpus(config, "data.source" in given)
    machine = look_at_machine()
    choice = choose_sizes(
        corpus.text_bytes, config.data.validation_fraction, machine.gpus, machine.memory_bytes, machine.disk_bytes
    )
    sizes = _sizes(choice, given)
    tokenizer = _find_tokenizer(config, "tokenizer.source" in given)
    content = _content(list(_lines(config, given, corpus, tokenizer, machine, choice)), choice, sizes, machine)
    for line in (*_found(corpus, tokenizer, machine), *assumed, *_assumed(corpus, choice, sizes)):
        report.say(line)
    _write(path, file, content)
    report.say(f"wrote {file}: read it, and change what is wrong")
    config_words = [] if file == _DEFAULT_FILE else ["--config", file]
    if (variable := os.environ.get("JOB_CONFIG")) is not None and not config_words:
        report.say(f"! JOB_CONFIG is {variable!r}, so the commands read that instead: unset it, or add --config {file}")
    report.say("next")
    for name in ("prepare", "train", "generate"):
        report.say(f"  {command(name, *config_words)}")
    return EXIT_DONE


def _exists(file: str) -> UserError:
    return UserError("--file", file, "this file exists, and `init` overwrites nothing", "name another with --file")


def _write(path: Path, file: str, content: str) -> None:
    """Write the new file. If that fails or is interrupted, no part of the file is left behind."""
    try:
        path.touch(exist_ok=False)
        try:
            path.write_text(content, encoding="utf-8")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except FileExistsError:
        raise _exists(file) from None
    except OSError as error:
        raise UserError("--file", file, f"cannot be written: {error.strerror}", "name another with --file") from None


# ---- What is refused ----


def _check_data_folder(given: Collection[str]) -> None:
    """Raise UserError if ./data is not a folder, but the text or the outputs are to be there."""
    if not os.path.lexists(_DATA_FOLDER) or Path(_DATA_FOLDER).is_dir():
        return
    if not {"data.source", *_PLACES} <= {*given}:
        kind = "a file" if Path(_DATA_FOLDER).exists() else "a broken link"
        expected = f"is {kind}; `init` looks for the text in a folder of this name, and has the outputs put there"
        places = " and ".join(f"--{name}" for name in _PLACES)
        remedy = f"move it into a folder {_DATA_FOLDER}, or name it with --data.source and other places with {places}"
        raise UserError("data.source", _DATA_FOLDER, expected, remedy)


def _check_settings(config: Config, machine: Machine) -> None:
    """Raise UserError if `train` would refuse these settings, which the user would learn only after `prepare`."""
    check_model_and_schedule(config.model, config.train)
    for name in config.tracking.to:
        find_entry("tracking.to", name, TRACKERS)
    gpus = 0 if config.train.device == "cpu" else machine.gpus
    cut_batch(config.train.global_batch_size, 1, config.train.processes or max(1, gpus))


# ---- What is found and assumed ----


def _find_corpus(config: Config, is_given: bool) -> tuple[Corpus, list[str]]:
    """Return the corpus, and lines about what was assumed: ./data, or the bundled sample if ./data has no text."""
    source = config.data.source if is_given else _DATA_FOLDER
    has_text = is_given or (Path(source).is_dir() and not holds_no_foreign_files(source))
    corpus = look_at_corpus(config, source) if has_text else None
    if corpus is not None:
        return corpus, []
    if is_given:
        raise UserError("data.source", source, "this folder is empty", "put your text there, or name another")
    corpus = look_at_corpus(config, str(SAMPLE))
    assert corpus is not None
    line = f"assumed: the bundled sample as the text, because there is none in ./{_DATA_FOLDER}"
    if Path(source).is_dir() and any(Path(source).iterdir()):
        line += ", only hidden files or what this program has written"
    return corpus, [f"{line} (the tutorial's corpus is {_HUB_CORPUS}, 2 GB)"]


def _found(corpus: Corpus, tokenizer: _Tokenizer, machine: Machine) -> Iterator[str]:
    if is_on_hub(corpus.source):
        yield f"found: text: {corpus.source}, on a hub; only `prepare` reads it"
    else:
        amount = f"{amounts.size(corpus.stored_bytes)} in {amounts.files(corpus.files)}"
        yield f"found: text: {amount} in {corpus.source}, in field {corpus.text_field!r}"
        yield from corpus.remarks
    if tokenizer.remark:
        yield tokenizer.remark
    names = f": {', '.join(dict.fromkeys(machine.gpu_names))}" if machine.gpu_names else ""
    yield f"found: GPUs: {machine.gpus}{names} ({machine.gpu_source})"
    memory = "unknown" if machine.memory_bytes is None else amounts.size(machine.memory_bytes)
    yield f"found: {machine.cores} cores, {memory} of free memory, {amounts.size(machine.disk_bytes)} of free disk"
    yield f"found: place: {machine.place}"
    if machine.store_variables:
        variables = ", ".join(machine.store_variables)
        yield f"found: object store: {variables} set; for a run there, name s3://BUCKET/FOLDER in the file"


def _assumed(corpus: Corpus, choice: Choice, sizes: str) -> Iterator[str]:
    if corpus.text_bytes is not None:
        yield f"assumed: about {amounts.size(corpus.text_bytes)} of it are text, as in the first records"
    yield f"assumed: {sizes}"
    for warning in choice.warnings:
        yield f"! {warning}"


def _sizes(choice: Choice, given: Collection[str]) -> str:
    """Return where the sizes of the model are from, in words."""
    words = f"sizes of {choice.size.name}"
    if changed := _changed(given):
        words += f", but for {', '.join(changed)}, which the command line of `init` sets"
        return f"{words} (they were chosen because {choice.reason})"
    return f"{words}: {choice.reason}"


def _changed(given: Collection[str]) -> list[str]:
    """Return the settings of the command line that change the model that was chosen."""
    return [name for name in given if name.startswith("model.") or name == "tokenizer.vocab_size"]


# ---- The file ----


def _lines(
    config: Config, given: Collection[str], corpus: Corpus, tokenizer: _Tokenizer, machine: Machine, choice: Choice
) -> Iterator[_Line]:
    """Yield the settings of the file, those of the command line with the values that they have there."""
    own = {line.name: line for line in _chosen(given, corpus, tokenizer, machine, choice)}
    for name in (*own, *(name for name in given if name not in own)):
        section, _, key = name.partition(".")
        if name in given:
            yield _Line(name, getattr(getattr(config, section), key), _GIVEN)
        else:
            yield own[name]


def _find_tokenizer(config: Config, is_given: bool) -> _Tokenizer:
    """Return the tokenizer's line: the usual folder, or another one if the usual one holds a tokenizer of no use."""
    name, folder = "tokenizer.source", Path(_TOKENIZER)
    if is_given:
        return _Tokenizer(_Line(name, config.tokenizer.source, _GIVEN), not is_hub_name(config.tokenizer.source), "")
    comment = "folder of the tokenizer, which is trained on your text"
    if not folder.is_dir() or not any(folder.iterdir()):
        return _Tokenizer(_Line(name, _TOKENIZER, comment), True, "")
    try:
        with TemporaryDirectory(prefix="wikillm-") as scratch:
            entries = load_tokenizer(_TOKENIZER, scratch).vocab_size
    except UserError as error:
        other = f"{_TOKENIZER}-own"
        remark = f"! the tokenizer in {_TOKENIZER} cannot be used, so a new one goes to {other}: {error.expected}"
        return _Tokenizer(_Line(name, other, comment), True, remark)
    remark = f"found: a tokenizer with {entries:,} entries in {_TOKENIZER}, which is used as it is"
    return _Tokenizer(_Line(name, _TOKENIZER, f"the tokenizer that is there, with {entries:,} entries"), False, remark)


def _chosen(
    given: Collection[str], corpus: Corpus, tokenizer: _Tokenizer, machine: Machine, choice: Choice
) -> Iterator[_Line]:
    size, is_small = choice.size, choice.size is SMALL
    is_as_chosen = not _changed(given)
    not_used = f"not used: the tokenizer is {tokenizer.line.value}"
    store = ", or s3://BUCKET/FOLDER" if machine.store_variables else ""
    yield _Line("run.output", "data/run", f"checkpoints, logs and the final model: a folder{store}")
    yield _Line("data.source", corpus.source, "your text: a file, a folder, a URL or a data set on a hub")
    yield _Line("data.text_field", corpus.text_field, "field of a record that holds the text, as in the first record")
    yield _Line("data.shards", "data/shards", f"where `prepare` puts the tokens: a folder{store}")
    yield tokenizer.line
    yield _Line(
        "tokenizer.vocab_size",
        size.vocab_size,
        f"as in {size.name}; a large one needs a large model" if tokenizer.is_trained else not_used,
    )
    yield _Line(
        "tokenizer.train_bytes",
        f"{choice.tokenizer_bytes // 2**20}MiB",
        "text it is trained on, which takes 60 times as much memory" if tokenizer.is_trained else not_used,
    )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        yield _Line(f"model.{name}", getattr(size, name), "")
    yield _Line("model.init", "zero_projections", "goes with optimizer muon")
    yield _Line("train.context_length", size.context_length, "tokens that the model sees at once")
    batch = (
        f"sequences of one step; a multiple of the {machine.gpus} GPUs" if machine.gpus > 1 else "sequences of a step"
    )
    yield _Line("train.global_batch_size", choice.global_batch_size, batch)
    yield _Line(
        "train.epochs", choice.epochs, "passes over the text" + (", if max_steps allows it" if is_small else "")
    )
    if choice.max_steps is not None:
        minutes = "a few minutes on a CPU; " if is_as_chosen else ""
        yield _Line("train.max_steps", choice.max_steps, f"{minutes}more make the model better, null: all")
    yield _Line("train.optimizer", "muon", "needs fewer steps than adamw")
    yield _Line(
        "train.learning_rate", 0.016, "rate of embedding and norms, the best one tried (benchmarks/leaderboard.md)"
    )
    yield _Line("train.muon_learning_rate", 0.01, "rate of the matrices, likewise")
    yield _Line("train.beta2", 0.95, "as in the presets with muon")
    yield _Line("train.schedule", "linear", "the rates fall to 0 at the end of the run")
    yield _Line("train.warmup_steps", choice.warmup_steps, "steps until the rates are reached")
    if not machine.gpus:
        yield _Line("train.precision", "fp32", "CPUs are slow in bf16")
    yield _Line("checkpoint.every", choice.every, "steps; a stopped run goes on from the last checkpoint")
    yield _Line(
        "checkpoint.keep",
        choice.keep,
        f"of {amounts.size(size.checkpoint_bytes)} each" if is_as_chosen else "newest checkpoints",
    )
    yield _Line("evaluate.every", choice.every, "steps")
    yield _Line("evaluate.max_windows", 256 if is_small else 2048, "sequences; the last validation takes all of them")
    if is_small:
        yield _Line("generate.max_new_tokens", 100, "tokens of a continuation")
    yield _Line(
        "tracking.to",
        ["swanlab"],
        "without an API key: its dashboard here if installed, else files for `swanlab sync`; []: no tracker",
    )


def _content(lines: list[_Line], choice: Choice, sizes: str, machine: Machine) -> str:
    """Return the file. Checks that it gives the settings that it is meant to give, and that `train` takes them."""
    tree: dict[str, dict[str, Any]] = {}
    header = (
        f"Settings for this folder's text and machine, made by `job init`; `job train --print-config` "
        f"shows all others. "
        f"The model has the {sizes}."
    )
    if choice.size in (SMALL, MIDDLE):
        header += " With more text or a GPU, copy the sizes of configs/wiki-54m.yaml."
    text = [f"# {row}" for row in textwrap.wrap(header, 116)]
    for line in sorted(lines, key=lambda line: list(Config.model_fields).index(line.name.partition(".")[0])):
        section, _, key = line.name.partition(".")
        if section not in tree:
            text += ["", f"{section}:"]
        tree.setdefault(section, {})[key] = line.value
        text.append(f"  {key}: {as_yaml(line.value)}" + (f"  # {line.comment}" if line.comment else ""))
    _check_settings(build(tree), machine)
    return "\n".join(text) + "\n"
