"""A trained model read back: from a run's prefix, from a checkpoint, or from a Hugging Face folder."""

import json
import logging
import math
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from job import storage
from job.config import Model
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.errors import UserError, one_line
from job.invocation import command
from job.model.architecture import build_model, load_weights
from job.model.counts import parameter_counts
from job.model.spec import ModelSpec
from job.record import parse_record
from job.training.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    DamagedCheckpoint,
    download_checkpoint,
    good_checkpoints,
    open_checkpoint,
)
from job.training.identity import TOKENIZER_FOLDER

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
    names = {entry.url.removeprefix(url).strip("/") for entry in storage.list_files(url)} if _is_folder(url) else set()
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
    if "config.json" in names:
        return _from_folder(url, setting, cache_dir)
    expected = "expected a run, a checkpoint or a model folder, found none there"
    raise UserError(setting, url, expected, f"train one with `{command('train')}`")


def _is_folder(url: str) -> bool:
    return storage.is_remote(url) or Path(url).expanduser().is_dir()


def _pass_by(error: UserError) -> None:
    logger.warning("passed by %s: %s", error.value, error.expected)


def _from_checkpoint(checkpoint: Checkpoint, output: str, setting: str, cache_dir: Path) -> TrainedModel:
    try:
        identity = parse_record(json.dumps(checkpoint.state.identity).encode(), _Identity)
        spec = ModelSpec(**Model(**identity.model).model_dump())
    except (ValueError, UserError) as error:
        expected = f"state.json is damaged: {one_line(str(error))}"
        raise DamagedCheckpoint("train.resume", checkpoint.url, expected, "name an older checkpoint") from None
    tokenizer = load_tokenizer(storage.join(output, TOKENIZER_FOLDER), cache_dir)
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
    tokenizer = load_tokenizer(url, cache_dir)
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(url).expanduser()
        if storage.is_remote(url):
            folder = Path(scratch)
            for entry in storage.list_files(url):
                storage.download_file(entry.url, folder / entry.url.rpartition("/")[2], size=entry.size)
        try:
            _check_size(folder)
            loaded: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
            model, found = loaded
            context_length = int(model.config.max_position_embeddings)
            # Left to itself, transformers makes up what is missing at random, and warns.
            if wrong := [*found["missing_keys"], *found["mismatched_keys"]]:
                raise ValueError(f"its weights are not those of config.json: {wrong[0]} is missing or of another shape")
        except Exception as error:  # whatever a damaged folder makes transformers raise
            raise UserError(setting, url, f"not a model: {one_line(str(error))[:200]}") from None
    return TrainedModel(model, tokenizer, context_length, url)


def _check_size(folder: Path) -> None:
    """Raises a ValueError where config.json describes a larger model than the files hold: it would be built first."""
    config = Qwen2Config.from_pretrained(folder)
    sizes = {one.name: getattr(config, one.name) for one in fields(ModelSpec) if one.name != "rope_theta"}
    spec = ModelSpec(**Model(**sizes).model_dump())
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if stored and (described := parameter_counts(spec, config.vocab_size).total) > stored:
        raise ValueError(f"config.json describes {described:,} parameters, and the files hold {stored:,}")
