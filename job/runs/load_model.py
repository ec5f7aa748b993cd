"""Loading a trained model from a run, from a checkpoint, or from a Hugging Face folder."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from job import storage
from job.config import Model
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.errors import UserError, one_line
from job.invocation import command
from job.json_record import parse_record
from job.model.flops import parameter_counts
from job.model.language_model import build_model, load_weights
from job.model.load_folder import INDEX, NotAModel, StoredModel, files_of_index, files_of_model, read_model
from job.model.save_folder import CONFIG, WEIGHTS
from job.model.spec import ModelSpec
from job.runs.checkpoint import (
    STATE,
    Checkpoint,
    CheckpointFiles,
    DamagedCheckpoint,
    damaged,
    download_checkpoint,
    open_checkpoint,
)
from job.runs.checkpoint_list import good_checkpoints
from job.runs.run import FINAL_MODEL, RUN_RECORD
from job.runs.run_tokenizer import check_tokenizer, run_tokenizer_url

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for evaluation or generation, in fp32 on the CPU."""

    model: PreTrainedModel
    tokenizer: TextTokenizer
    context_length: int
    source: str
    """Path or URL of the checkpoint or folder that it was loaded from."""


@dataclass(frozen=True)
class _CompatibilityKey:
    """The part of the compatibility key (`TrainingState.identity`) that describes the model."""

    model: dict[str, Any]
    tokenizer: str
    context_length: Annotated[int, Field(ge=2, lt=2**31)]


def load_model(url: str, setting: str, cache_dir: Path) -> LoadedModel:
    """Load the model at `url` in fp32 on the CPU.

    Args:
        url: folder or URL of a run, a checkpoint or a Hugging Face model. Of a run, the newest usable checkpoint is
            loaded, or its final model if there is none.
        setting: the setting that `url` comes from, for error messages.
        cache_dir: local folder for downloaded tokenizers.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    names = _names(url)
    if RUN_RECORD in names:
        for checkpoint in good_checkpoints(url, _warn_skipped):
            try:
                return _from_checkpoint(checkpoint, url, setting, cache_dir)
            except DamagedCheckpoint as error:
                _warn_skipped(error)
        if f"{FINAL_MODEL}/{CONFIG}" in names:
            return _from_folder(storage.join(url, FINAL_MODEL), setting, cache_dir)
        remedy = f"train it first: `{command('train')}`"
        raise UserError(setting, url, "the run has no final model and no checkpoint that can be used", remedy)
    if STATE in names:
        output = url.rstrip("/").rpartition("/checkpoints/")[0]
        try:
            return _from_checkpoint(open_checkpoint(url), output, setting, cache_dir)
        except DamagedCheckpoint as error:
            raise UserError(setting, url, error.expected, error.remedy) from None
    if names & {CONFIG, WEIGHTS, INDEX}:
        return _from_folder(url, setting, cache_dir)
    expected = "expected a run, a checkpoint or a model folder, found none of them"
    raise UserError(setting, url, expected, f"correct {setting}, or train a model with `{command('train')}`")


def _names(url: str) -> set[str]:
    """Return the paths of the files in a folder and in its final/, relative to it; empty if there is no folder."""
    if not storage.is_remote(url):
        folder = storage.path_of(url)
        return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob(f"{FINAL_MODEL}/*"))}
    return {entry.url.removeprefix(f"{url.rstrip('/')}/") for entry in storage.list_files(url)}


def _warn_skipped(error: UserError) -> None:
    logger.warning("skipped checkpoint %s: %s", error.value, error.expected)


def _from_checkpoint(checkpoint: Checkpoint, output: str, setting: str, cache_dir: Path) -> LoadedModel:
    try:
        key = parse_record(json.dumps(checkpoint.state.identity).encode(), _CompatibilityKey)
        spec = ModelSpec(**Model(**key.model).model_dump())
    except (ValueError, UserError) as error:
        raise damaged(checkpoint.url, f"{STATE} is damaged: {one_line(str(error))}") from None
    tokenizer_url = run_tokenizer_url(output)
    tokenizer = _load_tokenizer(tokenizer_url, setting, cache_dir)
    check_tokenizer(
        tokenizer,
        key.tokenizer,
        found_in=tokenizer_url,
        product=f"the checkpoint {checkpoint.url}",
        setting=setting,
        value=output,
        remedy="put the tokenizer of the training data back",
    )
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        download_checkpoint(checkpoint, Path(scratch), only=["param"])
        files = CheckpointFiles(Path(scratch))
        weights = {name: files[name]["param"] for name in files}
        try:
            # Compare before the model is built: a damaged state.json may describe a model that needs far more memory.
            found = sum(map(Tensor.numel, weights.values()))
            expected = parameter_counts(spec, tokenizer.vocab_size).total
            if found != expected:
                raise RuntimeError(f"{found:,} parameters instead of {expected:,}")
            model = build_model(
                spec,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                context_length=key.context_length,
                seed=0,
            )
            load_weights(model, weights)
        except RuntimeError as error:
            reason = f"its weights do not fit the model in its {STATE}: {one_line(str(error))[:200]}"
            raise damaged(checkpoint.url, reason) from None
    return LoadedModel(model, tokenizer, key.context_length, checkpoint.url)


def _from_folder(url: str, setting: str, cache_dir: Path) -> LoadedModel:
    try:
        stored = _read_folder(url)
    except NotAModel as error:
        remedy = f"set {setting} to a run, a checkpoint, or the final/ folder of a run"
        raise UserError(setting, url, f"not a model of this program: {error}", remedy) from None
    tokenizer = _load_tokenizer(url, setting, cache_dir)
    if tokenizer.vocab_size > stored.vocab_size:
        expected = f"its tokenizer has {tokenizer.vocab_size:,} entries, but its model only {stored.vocab_size:,}"
        raise UserError(setting, url, expected, "put the model's tokenizer back")
    model = build_model(
        stored.spec,
        vocab_size=stored.vocab_size,
        eod_id=tokenizer.eod_id,
        context_length=stored.context_length,
        seed=0,
    )
    load_weights(model, stored.weights)
    return LoadedModel(model, tokenizer, stored.context_length, url)


def _read_folder(url: str) -> StoredModel:
    """Read the Hugging Face model in a folder or at a URL; from a URL, download only the files of a model."""
    if not storage.is_remote(url):
        return read_model(storage.path_of(url))
    sizes = {entry.url.removeprefix(f"{url.rstrip('/')}/"): entry.size for entry in storage.list_files(url)}
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(scratch)

        def fetch(name: str) -> None:
            if name in sizes:  # `read_model` reports missing files
                storage.download_file(storage.join(url, name), folder / name, size=sizes[name])

        for name in files_of_model(sizes):
            fetch(name)
        if (folder / INDEX).exists():
            for name in files_of_index((folder / INDEX).read_bytes()):
                fetch(name)
        return read_model(folder)


def _load_tokenizer(url: str, setting: str, cache_dir: Path) -> TextTokenizer:
    """Load the tokenizer at `url`; errors name `setting` instead of ``tokenizer.source``."""
    try:
        return load_tokenizer(url, cache_dir)
    except UserError as error:
        if error.setting != "tokenizer.source":
            raise
        raise UserError(setting, url, f"its tokenizer: {error.expected}", "put the model's tokenizer back") from None
