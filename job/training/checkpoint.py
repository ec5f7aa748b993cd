"""Checkpoints: plain safetensors and JSON in the run's prefix, whole or not there at all.

    checkpoints/step-00000500/model.safetensors          weights, fp32, named as in `Qwen2ForCausalLM`
                              exp_avg.safetensors        AdamW's first moment
                              exp_avg_sq.safetensors     AdamW's second moment
                              state.json                 step, windows consumed, and what has to stay the same
                              manifest.json              sizes and sha256 of the others, written last

No manifest, no checkpoint. Nothing in it depends on the number of processes or on the strategy that wrote it.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from job import storage
from job.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, as torch names them."""

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_FILES = {"param": "model.safetensors"} | {key: f"{key}.safetensors" for key in MOMENTS}
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class TrainingState:
    """Where a run is, and what must not change when it goes on.

    Nothing in training draws random numbers but the initial weights and the order of the data, and both are functions
    of seeds: there is no generator whose state would have to be kept.
    """

    run_id: str
    step: int
    """Optimizer steps done."""
    windows_consumed: int
    """The whole state of the data."""
    tokens_seen: int
    identity: dict[str, Any]
    """What the run is made of: model, data set, tokenizer, context length, global batch."""
    config: dict[str, Any]
    """All settings, as they were; no secret among them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete in the store."""

    url: str
    files: dict[str, dict[str, Any]]
    state: TrainingState


def checkpoints_url(output: str) -> str:
    """Where the checkpoints of the run at `output` are."""
    return storage.join(output, "checkpoints")


def save_checkpoint(
    output: str, state: TrainingState, full_state: Iterable[tuple[str, Mapping[str, Tensor]]], scratch_dir: Path
) -> Checkpoint:
    """Writes a checkpoint to a local folder, uploads it, and last its manifest.

    Args:
        output: the run's prefix.
        state: where the run is.
        full_state: `Engine.full_state()`; other ranks go through theirs meanwhile.
        scratch_dir: local folder, there already, for the files until they are uploaded.
    """
    tensors: dict[str, dict[str, Tensor]] = {key: {} for key in _FILES}
    for name, of_parameter in full_state:
        for key, tensor in of_parameter.items():
            tensors[key][name] = tensor.contiguous()
    url = storage.join(checkpoints_url(output), f"step-{state.step:08d}")
    with tempfile.TemporaryDirectory(dir=scratch_dir, prefix="checkpoint-") as folder:
        for key, file in _FILES.items():
            save_file(tensors[key], Path(folder) / file, metadata={"format": "pt"})
        storage.write_json(f"{folder}/{_STATE}", {"format_version": FORMAT_VERSION, **asdict(state)})
        files = {
            path.name: {"size": path.stat().st_size, "sha256": storage.sha256_file(path)}
            for path in sorted(Path(folder).iterdir())
        }
        # A crashed attempt at this step may have left some of it; without its manifest it never was a checkpoint.
        storage.delete([storage.join(url, _MANIFEST)])
        for name in files:
            storage.upload_file(f"{folder}/{name}", storage.join(url, name))
    for name, expected in files.items():
        if (found := storage.size(storage.join(url, name))) != expected["size"]:
            raise storage.StoreError(f"{url}/{name} has {found} bytes in the store, {expected['size']} were sent")
    storage.write_json(storage.join(url, _MANIFEST), {"format_version": FORMAT_VERSION, "files": files})
    return Checkpoint(url, files, state)


def list_checkpoints(output: str) -> list[str]:
    """URLs of the run's complete checkpoints, the oldest first."""
    found = (entry.url for entry in storage.list_files(checkpoints_url(output)))
    folders = {url.rpartition("/")[0] for url in found if url.endswith(f"/{_MANIFEST}")}
    return sorted((url for url in folders if _STEP.fullmatch(url.rpartition("/")[2])), key=_step_of)


def delete_old_checkpoints(output: str, keep: int, newest: TrainingState) -> None:
    """Deletes what the checkpoint of the state `newest` makes old: all but the `keep` last ones of the run up to it.

    Those of an earlier run that was started over go too, and those of later steps: the run has gone back to an
    earlier one since. A checkpoint's manifest goes first, so that no half of one is ever taken for a whole.
    """
    urls = list_checkpoints(output)
    states = [open_checkpoint(url).state for url in urls]
    kept = [
        url
        for url, state in zip(urls, states, strict=True)
        if state.run_id == newest.run_id and state.step <= newest.step
    ]
    for url in set(urls) - set(kept[-keep:]):
        storage.delete([storage.join(url, _MANIFEST)])
        storage.delete_tree(url)


def newest_checkpoint(output: str, run_id: str) -> Checkpoint | None:
    """The checkpoint to go on from; those of an earlier run in the same place, started over, are passed by.

    Raises:
        UserError: it is damaged, or was written by a newer version.
    """
    found = (open_checkpoint(url) for url in reversed(list_checkpoints(output)))
    return next((one for one in found if one.state.run_id == run_id), None)


def open_checkpoint(url: str) -> Checkpoint:
    """The checkpoint at `url`; its tensors are not read yet.

    Raises:
        UserError: there is none, it is damaged, or a newer version wrote it.
    """
    damaged = UserError("train.resume", url, f"its {_MANIFEST} or {_STATE} is damaged", "name an older one")
    try:
        files = storage.read_json(storage.join(url, _MANIFEST))["files"]
        state = storage.read_json(storage.join(url, _STATE))
        version = state.pop("format_version")
        is_whole = all({"size", "sha256"} <= files[name].keys() for name in _FILES.values())
    except FileNotFoundError:
        raise UserError("train.resume", url, f"no complete checkpoint there (it has no {_MANIFEST})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if version != FORMAT_VERSION:
        expected = f"has format version {version!r}, this program reads {FORMAT_VERSION}"
        raise UserError("train.resume", url, expected, "use the version of the program that wrote it")
    if not is_whole or set(state) != {field.name for field in fields(TrainingState)}:
        raise damaged
    return Checkpoint(url, files, TrainingState(**state))


def download_checkpoint(checkpoint: Checkpoint, folder: Path, only: Iterable[str] = tuple(_FILES)) -> None:
    """Brings a checkpoint's tensors to a local folder, sizes and sha256 checked.

    Args:
        checkpoint: which.
        folder: where to.
        only: ``param`` and the moments, by default all.

    Raises:
        UserError: a file is missing or is not what the manifest says; it is named.
    """
    for name in (_FILES[key] for key in only):
        expected = checkpoint.files[name]
        try:
            storage.download_file(
                storage.join(checkpoint.url, name), folder / name, size=expected["size"], sha256=expected["sha256"]
            )
        except (FileNotFoundError, storage.IntegrityError) as error:
            found = "is missing" if isinstance(error, FileNotFoundError) else "is not what its manifest says"
            raise UserError("train.resume", checkpoint.url, f"{name} {found}", "name an older checkpoint") from None


class CheckpointFiles(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of a downloaded checkpoint by parameter, read one at a time: what `Engine.load_state` takes."""

    def __init__(self, folder: Path, only: Iterable[str] = tuple(_FILES)) -> None:
        self._files = {key: safe_open(folder / _FILES[key], framework="pt") for key in only}

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return {key: file.get_tensor(name) for key, file in self._files.items() if name in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Any:
        return iter(self._files["param"].keys())

    def __len__(self) -> int:
        return len(self._files["param"].keys())


def check_identity(state: TrainingState, identity: Mapping[str, Any], url: str) -> None:
    """Raises a UserError if the run cannot go on from a checkpoint because it is made of something else now."""
    different = [key for key, value in identity.items() if state.identity.get(key) != value]
    if different:
        said = ", ".join(f"{key} was {state.identity.get(key)!r}, is {identity[key]!r}" for key in different)
        remedy = "set it back, choose another run.output, or start over with --train.resume never"
        raise UserError("train.resume", url, f"the checkpoint is of another run: {said}", remedy)


def _step_of(url: str) -> int:
    found = _STEP.fullmatch(url.rpartition("/")[2])
    assert found is not None
    return int(found[1])
