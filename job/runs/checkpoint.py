"""Format and reading of checkpoints: safetensors and JSON files that count only if all of them are there.

    checkpoints/step-00000500-a2/model.safetensors          weights, fp32, named as in transformers
                                 exp_avg.safetensors        the optimizer's state, one file for each kind of tensor;
                                 exp_avg_sq.safetensors     for AdamW these two
                                 state.json                 step, sequences consumed, compatibility key, settings
                                 metrics.jsonl              the run's metrics up to this step
                                 manifest.json              size and sha256 of the other files, written last

A folder without manifest.json is not a checkpoint. Nothing in a checkpoint depends on the number of processes or on the
strategy that wrote it. The name holds the step and the attempt, so two attempts never write the same file.

`checkpoint_writer` writes checkpoints, `checkpoint_list` finds those of a run, `retention` deletes old ones.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field
from safetensors import SafetensorError, safe_open

from job import storage
from job.errors import UserError, one_line
from job.json_record import Versioned, parse_record
from job.model.optimizer_state import WEIGHT, OptimizerState, optimizer_state
from job.runs.compatibility import EARLIER_VALUES, differences
from job.runs.metrics_file import parse_rows

if TYPE_CHECKING:
    from torch import Tensor  # importing torch takes seconds, and looking for checkpoints does not need it

FORMAT_VERSIONS = (1, 2)
"""Versions that this program reads. 1: every parameter has every state tensor of the optimizer; 2: the optimizer says
which it has, so programs that know only 1 must not read it."""
MANIFEST = "manifest.json"
STATE = "state.json"
METRICS = "metrics.jsonl"
_WEIGHTS = "model.safetensors"
Count = Annotated[int, Field(ge=0, lt=2**63)]
_Interval = dict[Literal["nats", "targets", "steps", "seconds", "waited_seconds", "stalled_seconds"], float]
"""Measurements since the last line of metrics.jsonl."""
_NAME = re.compile(r"step-(\d{8,})-a(\d+)")


@dataclass(frozen=True)
class TrainingState:
    """The content of state.json: how far training is, and what must stay the same when it continues.

    No state of a random generator is stored. Only the initial weights and the order of the data are random, and both
    are functions of a seed.
    """

    run_id: str
    attempt: int
    """Number of the attempt that wrote the checkpoint."""
    step: Count
    """Optimizer steps done, including skipped steps."""
    windows_consumed: Count
    """Sequences consumed. This number is the whole state of the data order."""
    tokens_seen: Count
    identity: dict[str, Any]
    """The compatibility key (`job.runs.compatibility`)."""
    config: dict[str, Any]
    """All settings of the attempt, without secrets, from `config.to_dict`."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the judge of bad steps (`BadSteps.state`): recent gradient norms and skipped steps."""
    interval: dict[str, float] = field(default_factory=dict)
    """Measurements since the last line of metrics.jsonl, summed over all ranks."""
    decays_after: list[Count] = field(default_factory=list)
    """Steps after which the learning rate began to decay (`train.schedule` wsd); the checkpoint at such a step has none
    of that decay, so its own list does not name its step. More than one if the run was made longer after a decay."""

    @property
    def format_version(self) -> int:
        """The oldest version of the format that can hold this state."""
        return 1 if self.optimizer.is_uniform else 2

    @property
    def optimizer(self) -> OptimizerState:
        """The state tensors that the checkpoint holds beside the weights.

        Raises:
            UserError: this program does not have the optimizer.
        """
        return optimizer_state(str(self.identity.get("optimizer", EARLIER_VALUES["optimizer"])))


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, or is not what was written."""


class CheckpointName(NamedTuple):
    """Step and attempt, as the name of a checkpoint's folder holds them; the greater name is the newer checkpoint."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{self.step:08d}-a{self.attempt}"

    def url(self, output: str) -> str:
        """Return the checkpoint's folder in the run at `output`."""
        return storage.join(checkpoints_url(output), str(self))

    @classmethod
    def of_file(cls, file_url: str) -> "CheckpointName | None":
        """Return the name of the checkpoint that contains the file; None if its folder is not named like one."""
        match = _NAME.fullmatch(file_url.split("/")[-2])
        return None if match is None else cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class File:
    """Size in bytes and sha256 of a file of a checkpoint, as manifest.json lists it."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest(Versioned):
    """The content of a checkpoint's manifest.json."""

    files: dict[str, File]
    save_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a manifest in the store; its tensors have not been read yet."""

    url: str
    files: dict[str, File]
    state: TrainingState
    save_seconds: float
    """Seconds that saving it took."""

    def metrics(self) -> bytes:
        """Read the content of metrics.jsonl up to this step.

        Raises:
            DamagedCheckpoint: the file is missing, does not match the manifest, or has a line that is not a row.
        """
        content = _read(self.url, METRICS, self.files)
        try:
            parse_rows(content)
        except ValueError as error:
            raise damaged(self.url, f"{METRICS} is damaged: {error}") from None
        return content


@dataclass(frozen=True)
class _GuardState:
    """The fields of `TrainingState.guard`, unless it is empty."""

    norms: list[float]
    skipped_steps: Count
    skipped_in_a_row: Count


def checkpoints_url(output: str) -> str:
    """Return the folder of all checkpoints of the run at `output`."""
    return storage.join(output, "checkpoints")


def open_checkpoint(url: str) -> Checkpoint:
    """Read the manifest and the state of the checkpoint at `url`, without its tensors.

    Raises:
        UserError: there is no complete checkpoint, it is damaged, or another version of the format wrote it.
    """
    try:
        content = storage.read_bytes(storage.join(url, MANIFEST))
        _check_version(parse_record(content, Versioned), url)
        manifest = parse_record(content, Manifest)
        _check_listed(manifest, (_WEIGHTS, STATE, METRICS))
    except FileNotFoundError:
        expected = f"there is no complete checkpoint ({MANIFEST} is missing)"
        raise UserError("train.resume", url, expected, "name the folder of a complete checkpoint") from None
    except (ValueError, storage.IntegrityError) as error:
        raise damaged(url, f"{MANIFEST} is damaged: {error}") from None
    try:
        content = _read(url, STATE, manifest.files)
        _check_version(parse_record(content, Versioned), url)
        state = parse_record(content, TrainingState)
        if state.guard:
            parse_record(json.dumps(state.guard).encode(), _GuardState)
        parse_record(json.dumps(state.interval).encode(), _Interval)
    except ValueError as error:
        raise damaged(url, f"{STATE} is damaged: {error}") from None
    try:
        _check_listed(manifest, map(file_of, state.optimizer.tensors))
    except ValueError as error:
        raise damaged(url, f"{MANIFEST} is damaged: {error}") from None
    return Checkpoint(url, manifest.files, state, manifest.save_seconds)


def file_of(key: str) -> str:
    """Return the name of the file with the tensors `key` of all parameters: ``param``, or a state of the optimizer."""
    return _WEIGHTS if key == WEIGHT else f"{key}.safetensors"


def _check_listed(manifest: Manifest, names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in manifest.files]:
        raise ValueError(f"it does not list {missing[0]}")


def _check_version(record: Versioned, url: str) -> None:
    if record.format_version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        expected = f"has format version {record.format_version}, this program reads {known}"
        raise UserError("train.resume", url, expected, "use the version of the program that wrote it")


def download_checkpoint(checkpoint: Checkpoint, folder: Path, only: Iterable[str] | None = None) -> None:
    """Download the tensor files of a checkpoint to a local folder, and verify their sizes and sha256.

    Args:
        checkpoint: the checkpoint to download.
        folder: local folder that receives the files.
        only: ``param`` and names of the optimizer's state tensors; None: all.

    Raises:
        DamagedCheckpoint: a file is missing, does not match the manifest, or holds other tensors than the other files.
    """
    optimizer = checkpoint.state.optimizer
    keys = (WEIGHT, *optimizer.tensors) if only is None else tuple(only)
    for name in map(file_of, keys):
        expected = checkpoint.files[name]
        try:
            storage.download_file(
                storage.join(checkpoint.url, name), folder / name, size=expected.size, sha256=expected.sha256
            )
        except (FileNotFoundError, storage.IntegrityError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            raise (_missing if is_missing else _not_as_listed)(checkpoint.url, name) from None
    shapes = {key: _shapes(checkpoint.url, folder / file_of(key)) for key in keys}
    weights = shapes.pop(WEIGHT, {})
    for key, of_state in shapes.items():
        if weights and of_state != {
            parameter: kind for parameter, kind in weights.items() if optimizer.holds(parameter, tuple(kind[0]), key)
        }:
            raise damaged(checkpoint.url, f"{_WEIGHTS}, {file_of(key)} do not hold the same tensors")


def _shapes(url: str, path: Path) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of each tensor in the downloaded file `path` of the checkpoint at `url`."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tensor.get_shape(), tensor.get_dtype()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise damaged(url, f"{path.name} is damaged: {one_line(str(error))}") from None


class CheckpointFiles(Mapping[str, Mapping[str, "Tensor"]]):
    """The tensors of a downloaded checkpoint, by parameter name; each tensor is read from its file when it is needed.

    `Engine.load` takes this mapping.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {
            WEIGHT if path.name == _WEIGHTS else path.stem: safe_open(path, framework="pt")
            for path in sorted(folder.glob("*.safetensors"))
        }

    def __getitem__(self, name: str) -> dict[str, "Tensor"]:
        return {key: file.get_tensor(name) for key, file in self._files.items() if name in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[WEIGHT].keys())

    def __len__(self) -> int:
        return len(self._files[WEIGHT].keys())


def check_compatibility(state: TrainingState, compatibility_key: Mapping[str, Any], url: str) -> None:
    """Raise a UserError that names each difference if the checkpoint at `url` was written with another key."""
    if different := list(differences(state.identity, compatibility_key)):
        remedy = "set it back, choose another run.output, or start over with --train.resume never"
        raise UserError("train.resume", url, f"the checkpoint is of another run: {', '.join(different)}", remedy)


def _read(url: str, name: str, files: Mapping[str, File]) -> bytes:
    """Return the content of a small file of the checkpoint at `url`, after verifying its sha256."""
    try:
        content = storage.read_bytes(storage.join(url, name))
    except FileNotFoundError:
        raise _missing(url, name) from None
    except storage.IntegrityError:
        raise _not_as_listed(url, name) from None
    if hashlib.sha256(content).hexdigest() != files[name].sha256:
        raise _not_as_listed(url, name)
    return content


def _missing(url: str, name: str) -> DamagedCheckpoint:
    return damaged(url, f"{name} is missing")


def _not_as_listed(url: str, name: str) -> DamagedCheckpoint:
    return damaged(url, f"{name} does not match the size and sha256 in its manifest")


def damaged(url: str, reason: str) -> DamagedCheckpoint:
    """Return the error for a checkpoint that cannot be used because of `reason`."""
    return DamagedCheckpoint("train.resume", url, reason, "use an older checkpoint")
