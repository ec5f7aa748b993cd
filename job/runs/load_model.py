"""A trained model read back: from a run's prefix, from a checkpoint, or from a Hugging Face folder."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from transformers import Qwen2ForCausalLM

from job import storage
from job.config import Model
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.errors import UserError, one_line
from job.invocation import command
from job.json_record import parse_record
from job.model.architecture import build_model, load_weights
from job.model.flops import parameter_counts
from job.model.load_folder import INDEX, NotAModel, StoredModel, files_of_index, files_of_model, read_model
from job.model.save_folder import CONFIG, WEIGHTS
from job.model.spec import ModelSpec
from job.runs.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    DamagedCheckpoint,
    download_checkpoint,
    good_checkpoints,
    open_checkpoint,
)
from job.runs.compatibility import TOKENIZER_FOLDER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for evaluation or generation, in fp32 on the CPU."""

    model: Qwen2ForCausalLM
    tokenizer: TextTokenizer
    context_length: int
    source: str
    """Where it was found: a checkpoint or a folder."""


@dataclass(frozen=True)
class _Identity:
    """The part of `TrainingState.identity` that describes the model."""

    model: dict[str, Any]
    tokenizer: str
    context_length: Annotated[int, Field(ge=2, lt=2**31)]


def load_trained(url: str, setting: str, cache_dir: Path) -> TrainedModel:
    """The model at `url`.

    Args:
        url: a run's prefix (its newest whole checkpoint is taken, else its final model), a checkpoint, or a model
            folder.
        setting: the setting that named it, for errors.
        cache_dir: local folder for tokenizers.

    Raises:
        UserError: nothing of the kind is there.
    """
    names = _names(url)
    if "run.json" in names:
        for checkpoint in good_checkpoints(url, _pass_by):
            try:
                return _from_checkpoint(checkpoint, url, setting, cache_dir)
            except DamagedCheckpoint as error:
                _pass_by(error)
        if "final/config.json" in names:
            return _from_folder(storage.join(url, "final"), setting, cache_dir)
        raise UserError(setting, url, "the run has no whole checkpoint yet", f"train it first: `{command('train')}`")
    if "state.json" in names:
        output = url.rstrip("/").rpartition("/checkpoints/")[0]
        try:
            return _from_checkpoint(open_checkpoint(url), output, setting, cache_dir)
        except DamagedCheckpoint as error:
            raise UserError(setting, url, error.expected, error.remedy) from None
    if names & {CONFIG, WEIGHTS, INDEX}:
        return _from_folder(url, setting, cache_dir)
    expected = "expected a run, a checkpoint or a model folder, found none there"
    raise UserError(setting, url, expected, f"train one with `{command('train')}`")


def _names(url: str) -> set[str]:
    """The files below a folder; none where there is no folder."""
    if not storage.is_remote(url):
        folder = storage.path_of(url)
        return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("final/*"))}
    return {entry.url.removeprefix(f"{url.rstrip('/')}/") for entry in storage.list_files(url)}


def _pass_by(error: UserError) -> None:
    logger.warning("passed by %s: %s", error.value, error.expected)


def _from_checkpoint(checkpoint: Checkpoint, output: str, setting: str, cache_dir: Path) -> TrainedModel:
    try:
        identity = parse_record(json.dumps(checkpoint.state.identity).encode(), _Identity)
        spec = ModelSpec(**Model(**identity.model).model_dump())
    except (ValueError, UserError) as error:
        expected = f"state.json is damaged: {one_line(str(error))}"
        raise DamagedCheckpoint("train.resume", checkpoint.url, expected, "name an older checkpoint") from None
    tokenizer = _tokenizer(storage.join(output, TOKENIZER_FOLDER), setting, cache_dir)
    if tokenizer.fingerprint != identity.tokenizer:
        expected = f"the tokenizer in {output}/{TOKENIZER_FOLDER} is not the one it was trained with"
        raise UserError(setting, output, expected, "put the right one back")
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        download_checkpoint(checkpoint, Path(scratch), only=["param"])
        files = CheckpointFiles(Path(scratch), only=["param"])
        weights = {name: files[name]["param"] for name in files}
        try:
            # Asked before the model is built: a damaged description may be that of a far larger one.
            numbers, parameters = sum(map(Tensor.numel, weights.values())), parameter_counts(spec, tokenizer.vocab_size)
            if numbers != parameters.total:
                raise RuntimeError(f"{numbers:,} numbers instead of {parameters.total:,}")
            model = build_model(
                spec,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                context_length=identity.context_length,
                seed=0,
            )
            load_weights(model, weights)
        except RuntimeError as error:
            reason = f"its weights are not those of the model that it describes: {one_line(str(error))[:200]}"
            raise DamagedCheckpoint("train.resume", checkpoint.url, reason, "name an older checkpoint") from None
    return TrainedModel(model, tokenizer, identity.context_length, checkpoint.url)


def _from_folder(url: str, setting: str, cache_dir: Path) -> TrainedModel:
    try:
        stored = _read_folder(url)
    except NotAModel as error:
        remedy = "name a run, a checkpoint, or the final/ of a run"
        raise UserError(setting, url, f"not a model of this program: {error}", remedy) from None
    tokenizer = _tokenizer(url, setting, cache_dir)
    if tokenizer.vocab_size > stored.vocab_size:
        expected = f"its tokenizer has {tokenizer.vocab_size:,} entries, its model {stored.vocab_size:,}"
        raise UserError(setting, url, expected, "put the right tokenizer back")
    model = build_model(
        stored.spec,
        vocab_size=stored.vocab_size,
        eod_id=tokenizer.eod_id,
        context_length=stored.context_length,
        seed=0,
    )
    load_weights(model, stored.weights)
    return TrainedModel(model, tokenizer, stored.context_length, url)


def _read_folder(url: str) -> StoredModel:
    """The model in a folder, of which no more than the files of a model are fetched, each by its exact name."""
    if not storage.is_remote(url):
        return read_model(storage.path_of(url))
    sizes = {entry.url.removeprefix(f"{url.rstrip('/')}/"): entry.size for entry in storage.list_files(url)}
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(scratch)

        def fetch(name: str) -> None:
            if name in sizes:  # what is missing is told by `read_model`
                storage.download_file(storage.join(url, name), folder / name, size=sizes[name])

        for name in files_of_model(sizes):
            fetch(name)
        if (folder / INDEX).exists():
            for name in files_of_index((folder / INDEX).read_bytes()):
                fetch(name)
        return read_model(folder)


def _tokenizer(url: str, setting: str, cache_dir: Path) -> TextTokenizer:
    """The tokenizer at `url`; errors name the setting that led there."""
    try:
        return load_tokenizer(url, cache_dir)
    except UserError as error:
        if error.setting != "tokenizer.source":
            raise
        raise UserError(setting, url, f"its tokenizer: {error.expected}", "put the right tokenizer back") from None
