"""A trained model read back: from a run's prefix, from a checkpoint, or from a Hugging Face folder."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2ForCausalLM

from job import storage
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.errors import UserError, one_line
from job.model.architecture import ModelSpec, build_model
from job.training.checkpoint import CheckpointFiles, download_checkpoint, list_checkpoints, open_checkpoint

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for evaluation or generation, in fp32 on the CPU."""

    model: Qwen2ForCausalLM
    tokenizer: TextTokenizer
    context_length: int
    source: str
    """Where it was found: a checkpoint or a folder."""


def load_trained(url: str, setting: str, cache_dir: Path) -> TrainedModel:
    """The model at `url`.

    Args:
        url: a run's prefix (its newest checkpoint is taken, else its final model), a checkpoint, or a model folder.
        setting: the setting that named it, for errors.
        cache_dir: local folder for tokenizers.

    Raises:
        UserError: nothing of the kind is there.
    """
    names = {entry.url.removeprefix(url).strip("/") for entry in storage.list_files(url)} if _is_folder(url) else set()
    if "run.json" in names:
        checkpoints = list_checkpoints(url)
        if checkpoints:
            return _from_checkpoint(checkpoints[-1], url, cache_dir)
        if "final/config.json" in names:
            return _from_folder(storage.join(url, "final"), cache_dir)
        raise UserError(setting, url, "the run has no checkpoint yet", "train it first: `python -m job train`")
    if "state.json" in names:
        return _from_checkpoint(url, url.rstrip("/").rpartition("/checkpoints/")[0], cache_dir)
    if "config.json" in names:
        return _from_folder(url, cache_dir)
    expected = "expected a run, a checkpoint or a model folder, found none there"
    raise UserError(setting, url, expected, "train one with `python -m job train`")


def _is_folder(url: str) -> bool:
    return storage.is_remote(url) or Path(url).expanduser().is_dir()


def _from_checkpoint(url: str, output: str, cache_dir: Path) -> TrainedModel:
    checkpoint = open_checkpoint(url)
    identity = checkpoint.state.identity
    tokenizer = load_tokenizer(storage.join(output, TOKENIZER_FOLDER), cache_dir)
    if tokenizer.fingerprint != identity["tokenizer"]:
        expected = f"the tokenizer in {output}/{TOKENIZER_FOLDER} is not the one it was trained with"
        raise UserError("run.output", url, expected, "put the right one back")
    model = build_model(
        ModelSpec(**identity["model"]),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        context_length=identity["context_length"],
        seed=0,
    )
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        download_checkpoint(checkpoint, Path(scratch), only=["param"])
        weights = CheckpointFiles(Path(scratch), only=["param"])
        model.load_state_dict({name: weights[name]["param"] for name in weights}, strict=False)
        model.tie_weights()
    return TrainedModel(model, tokenizer, identity["context_length"], url)


def _from_folder(url: str, cache_dir: Path) -> TrainedModel:
    tokenizer = load_tokenizer(url, cache_dir)
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(url).expanduser()
        if storage.is_remote(url):
            folder = Path(scratch)
            for entry in storage.list_files(url):
                storage.download_file(entry.url, folder / entry.url.rpartition("/")[2], size=entry.size)
        try:
            model = Qwen2ForCausalLM.from_pretrained(folder, dtype="float32")
        except (OSError, ValueError) as error:
            raise UserError("generate.model", url, f"not a model: {one_line(str(error))[:200]}") from None
    return TrainedModel(model, tokenizer, model.config.max_position_embeddings, url)
