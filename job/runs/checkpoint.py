"""Checkpoints: plain safetensors and JSON in the run's prefix, whole or not there at all.

    checkpoints/step-00000500-a2/model.safetensors          weights, fp32, named as in `Qwen2ForCausalLM`
                                 exp_avg.safetensors        AdamW's first moment
                                 exp_avg_sq.safetensors     AdamW's second moment
                                 state.json                 step, windows consumed, and what has to stay the same
                                 metrics.jsonl              the run's log up to this step
                                 manifest.json              sizes and sha256 of the others, written last

No manifest, no checkpoint. Nothing in it depends on the number of processes or on the strategy that wrote it. The
second number is the attempt that wrote it, so that two which write at one time never write one file.
"""

import bisect
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import orjson
from pydantic import Field
from safetensors import SafetensorError, safe_open

from job import storage
from job.errors import UserError, one_line
from job.json_record import Versioned, parse_record, record_bytes
from job.model.optimizer_state import MOMENTS
from job.runs.attempts import Attempts
from job.runs.compatibility import differences
from job.runs.metrics_file import parse_rows

if TYPE_CHECKING:
    from torch import Tensor  # seconds of import, which looking for checkpoints can do without

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_METRICS = "metrics.jsonl"
_TENSORS = {"param": "model.safetensors"} | {key: f"{key}.safetensors" for key in MOMENTS}
Count = Annotated[int, Field(ge=0, lt=2**63)]
_Interval = dict[Literal["nats", "targets", "steps", "seconds", "waited_seconds", "stalled_seconds"], float]
"""The measurements from which a line of the log is made."""
_NAME = re.compile(r"step-(\d{8,})-a(\d+)")


@dataclass(frozen=True)
class TrainingState:
    """Where a run is, and what must not change when it goes on.

    Nothing in training draws random numbers but the initial weights and the order of the data, and both are functions
    of seeds: there is no generator whose state would have to be kept.
    """

    run_id: str
    attempt: int
    """The one that wrote it."""
    step: Count
    """Optimizer steps done, skipped ones among them."""
    windows_consumed: Count
    """The whole state of the data."""
    tokens_seen: Count
    identity: dict[str, Any]
    """What the run is made of: model, data set, tokenizer, context length, global batch."""
    config: dict[str, Any]
    """All settings, as they were, from `config.to_dict`: without secrets."""
    guard: dict[str, Any] = field(default_factory=dict)
    """`Engine.guard_state`: what was skipped, and what counts as a spike."""
    interval: dict[str, float] = field(default_factory=dict)
    """What was measured since the last line of the log."""


class DamagedCheckpoint(UserError):
    """A checkpoint is not what it was when it was written."""


class Name(NamedTuple):
    """What a checkpoint's folder says of it; of two, the greater is the newer."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{self.step:08d}-a{self.attempt}"

    def url(self, output: str) -> str:
        """Its folder."""
        return storage.join(checkpoints_url(output), str(self))


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, as its manifest describes it."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete in the store."""

    url: str
    files: dict[str, File]
    state: TrainingState
    save_seconds: float
    """What it took to upload it."""

    def metrics(self) -> bytes:
        """The run's log up to this step.

        Raises:
            DamagedCheckpoint: it is missing, is not what the manifest says, or is not a log.
        """
        content = _read(self.url, _METRICS, self.files)
        try:
            parse_rows(content)
        except ValueError as error:
            raise _damaged(self.url, f"{_METRICS} is damaged: {error}") from None
        return content


@dataclass(frozen=True)
class _GuardState:
    """`Guard.state`."""

    norms: list[float]
    skipped_steps: Count
    skipped_in_a_row: Count


@dataclass(frozen=True)
class _Manifest(Versioned):
    """The content of a checkpoint's manifest.json."""

    files: dict[str, File]
    save_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def checkpoints_url(output: str) -> str:
    """Where the checkpoints of the run at `output` are."""
    return storage.join(output, "checkpoints")


# ---- Writing one ----


class _SafetensorsFile:
    """A safetensors file that lies in memory in pieces, which are its tensors: nothing is copied to build it.

    The format is an 8-byte length, a JSON header with each tensor's type, shape and place, and the tensors' bytes:
    https://huggingface.co/docs/safetensors#format
    """

    def __init__(self, tensors: Mapping[str, "Tensor"]) -> None:
        ends = list(accumulate(tensor.nbytes for tensor in tensors.values()))
        header = {"__metadata__": {"format": "pt"}} | {
            name: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
            for (name, tensor), end in zip(tensors.items(), ends, strict=True)
        }
        text = orjson.dumps(header)
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self._pieces = [
            memoryview(head),
            *(tensor.numpy().reshape(-1).view(np.uint8).data for tensor in tensors.values()),
        ]
        self._starts = [0, *(len(head) + end for end in (0, *ends))]
        self.size = self._starts.pop()

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`."""
        found = bytearray()
        index = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            piece = self._pieces[index][start - self._starts[index] : end - self._starts[index]]
            found += piece
            start, index = start + len(piece), index + 1
        return bytes(found)

    def sha256(self) -> str:
        """Hexadecimal checksum of the whole."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(piece)
        return digest.hexdigest()


def save_checkpoint(
    output: str,
    state: TrainingState,
    snapshot: Mapping[str, Mapping[str, "Tensor"]],
    metrics: bytes,
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Checkpoint:
    """Uploads a checkpoint from memory, and last its manifest, when every file is confirmed to be there.

    Args:
        output: the run's prefix.
        state: where the run is.
        snapshot: weight and moments by parameter, fp32 on the CPU; not to be changed meanwhile.
        metrics: the run's log up to this step.
        check: called before the manifest is written; raises if this process does not have the run any more.
        clock: seconds since the save began.
    """
    url = Name(state.step, state.attempt).url(output)
    files: dict[str, File] = {}
    # An earlier try of this attempt may have left some of it; without its manifest it never was a checkpoint.
    storage.delete([storage.join(url, _MANIFEST)])
    for key, name in _TENSORS.items():
        file = _SafetensorsFile({parameter: tensors[key] for parameter, tensors in snapshot.items()})
        files[name] = File(file.size, file.sha256())
        storage.write_from(storage.join(url, name), file.size, file.read)
    described = record_bytes({"format_version": FORMAT_VERSION, **asdict(state)})
    for name, content in ((_STATE, described), (_METRICS, metrics)):
        files[name] = File(len(content), hashlib.sha256(content).hexdigest())
        storage.write_bytes(storage.join(url, name), content)
    for name, expected in files.items():
        if (found := storage.size(storage.join(url, name))) != expected.size:
            raise storage.StoreError(f"{url}/{name} has {found} bytes in the store, {expected.size} were sent")
    check()
    checkpoint = Checkpoint(url, files, state, clock())
    storage.write_json(storage.join(url, _MANIFEST), asdict(_Manifest(FORMAT_VERSION, files, checkpoint.save_seconds)))
    return checkpoint


# ---- Which ones there are ----


def list_checkpoints(output: str) -> list[Name]:
    """The run's complete checkpoints, the oldest first; whether they are good shows when they are opened."""
    return sorted(name for name, is_complete in _folders(output).items() if is_complete)


def lineage(attempts: Attempts, names: Iterable[Name]) -> list[Name]:
    """Those of the checkpoints that the run, as it is now, has come by or could go on from, the oldest first.

    Not those of steps beyond which a later attempt went back: after `train.resume` named an older one or was ``never``,
    after a damaged one was refused, or when one still wrote that had lost the run.
    """
    limits = {number: attempts.limit(number) for number in {name.attempt for name in names}}
    return sorted(name for name in names if limits[name.attempt](name.step))


def good_checkpoints(
    output: str, refused: Callable[[UserError], None], since_attempt: int = 0, run_id: str | None = None
) -> Iterator[Checkpoint]:
    """The run's checkpoints, the newest first; those that cannot be used are passed by.

    Args:
        output: the run's prefix.
        refused: called with the reason, and the name, of each that is passed by.
        since_attempt: the first attempt whose checkpoints count.
        run_id: of the run whose checkpoints count; None: of any.
    """
    for name in reversed(lineage(Attempts(output), list_checkpoints(output))):
        if name.attempt < since_attempt:
            continue
        try:
            checkpoint = open_checkpoint(name.url(output))
            if run_id not in (None, checkpoint.state.run_id):
                raise _damaged(checkpoint.url, f"it is of another run, {checkpoint.state.run_id}")
        except UserError as error:
            refused(error)
        else:
            yield checkpoint


def kept_checkpoints(names: list[Name], keep: int, keep_every: int | None) -> set[Name]:
    """Which to keep: the `keep` newest, and of every `keep_every` steps the first for ever.

    Args:
        names: of the run, the oldest first.
        keep: how many.
        keep_every: steps; the first checkpoint at or after each multiple is kept.
    """
    milestones: dict[int, Name] = {}
    if keep_every is not None:
        for name in names:
            milestones.setdefault(name.step // keep_every, name)
    return {*names[-keep:], *(name for multiple, name in milestones.items() if multiple > 0)}


def delete_old_checkpoints(output: str, keep: int, keep_every: int | None, newest: Name) -> list[Name]:
    """Deletes what the checkpoint `newest`, just written, makes old, and what uploads that broke off have left.

    A checkpoint's manifest goes first, so that no half of one is ever taken for a whole. What later attempts write is
    none of the business of one that may not know yet that they have taken over.

    Returns:
        Those that are left.
    """
    folders = {name: is_whole for name, is_whole in _folders(output).items() if name.attempt <= newest.attempt}
    names = [name for name, is_complete in folders.items() if is_complete]
    kept = kept_checkpoints([name for name in lineage(Attempts(output), names) if name <= newest], keep, keep_every)
    for name in folders.keys() - kept:
        discard_checkpoint(output, name)

    def is_abandoned(file_url: str) -> bool:
        name = _name(file_url)
        return name is not None and name.attempt <= newest.attempt

    storage.abort_uploads(checkpoints_url(output), is_abandoned)
    return sorted(kept)


def discard_checkpoint(output: str, name: Name) -> None:
    """Deletes all that there is of a checkpoint, its manifest first."""
    storage.delete([storage.join(name.url(output), _MANIFEST)])
    storage.delete_tree(name.url(output))


def _folders(output: str) -> dict[Name, bool]:
    """The checkpoints' folders, and whether each has its manifest."""
    found: dict[Name, bool] = {}
    for entry in storage.list_files(checkpoints_url(output)):
        if (name := _name(entry.url)) is not None:
            found[name] = found.get(name, False) or entry.url.endswith(f"/{_MANIFEST}")
    return found


def _name(file_url: str) -> Name | None:
    """The checkpoint that a file belongs to."""
    parts = _NAME.fullmatch(file_url.split("/")[-2])
    return None if parts is None else Name(int(parts[1]), int(parts[2]))


# ---- Reading one ----


def open_checkpoint(url: str) -> Checkpoint:
    """The checkpoint at `url`; its tensors are not read yet.

    Raises:
        UserError: there is none, it is damaged, or a newer version wrote it.
    """
    try:
        content = storage.read_bytes(storage.join(url, _MANIFEST))
        _check_version(parse_record(content, Versioned), url)
        manifest = parse_record(content, _Manifest)
        if missing := [name for name in (*_TENSORS.values(), _STATE, _METRICS) if name not in manifest.files]:
            raise ValueError(f"it does not list {missing[0]}")
    except FileNotFoundError:
        raise UserError("train.resume", url, f"no complete checkpoint there (it has no {_MANIFEST})") from None
    except (ValueError, storage.IntegrityError) as error:
        raise _damaged(url, f"{_MANIFEST} is damaged: {error}") from None
    try:
        content = _read(url, _STATE, manifest.files)
        _check_version(parse_record(content, Versioned), url)
        state = parse_record(content, TrainingState)
        if state.guard:
            parse_record(json.dumps(state.guard).encode(), _GuardState)
        parse_record(json.dumps(state.interval).encode(), _Interval)
    except ValueError as error:
        raise _damaged(url, f"{_STATE} is damaged: {error}") from None
    return Checkpoint(url, manifest.files, state, manifest.save_seconds)


def _check_version(found: Versioned, url: str) -> None:
    if found.format_version != FORMAT_VERSION:
        expected = f"has format version {found.format_version}, this program reads {FORMAT_VERSION}"
        raise UserError("train.resume", url, expected, "use the version of the program that wrote it")


def download_checkpoint(checkpoint: Checkpoint, folder: Path, only: Iterable[str] = tuple(_TENSORS)) -> None:
    """Brings a checkpoint's tensors to a local folder, sizes and sha256 checked.

    Args:
        checkpoint: which.
        folder: where to.
        only: ``param`` and the moments, by default all.

    Raises:
        UserError: a file is missing, is not what the manifest says, or holds other tensors than the rest; it is named.
    """
    only = tuple(only)
    for name in (_TENSORS[key] for key in only):
        expected = checkpoint.files[name]
        try:
            storage.download_file(
                storage.join(checkpoint.url, name), folder / name, size=expected.size, sha256=expected.sha256
            )
        except (FileNotFoundError, storage.IntegrityError) as error:
            found = "is missing" if isinstance(error, FileNotFoundError) else "is not what its manifest says"
            raise _damaged(checkpoint.url, f"{name} {found}") from None
    shapes = [_shapes(checkpoint.url, folder / _TENSORS[key]) for key in only]
    if any(other != shapes[0] for other in shapes):
        raise _damaged(checkpoint.url, "its files do not hold the same tensors")


def _shapes(url: str, path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of each tensor in a downloaded file of the checkpoint at `url`."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}
    except SafetensorError as error:
        raise _damaged(url, f"{path.name} is damaged: {one_line(str(error))}") from None


class CheckpointFiles(Mapping[str, Mapping[str, "Tensor"]]):
    """The tensors of a downloaded checkpoint by parameter, read one at a time: what `Engine.load_state` takes."""

    def __init__(self, folder: Path, only: Iterable[str] = tuple(_TENSORS)) -> None:
        self._files = {key: safe_open(folder / _TENSORS[key], framework="pt") for key in only}

    def __getitem__(self, name: str) -> dict[str, "Tensor"]:
        return {key: file.get_tensor(name) for key, file in self._files.items() if name in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Any:
        return iter(self._files["param"].keys())

    def __len__(self) -> int:
        return len(self._files["param"].keys())


def check_identity(state: TrainingState, identity: Mapping[str, Any], url: str) -> None:
    """Raises a UserError if the run cannot go on from a checkpoint because it is made of something else now."""
    if different := list(differences(state.identity, identity)):
        remedy = "set it back, choose another run.output, or start over with --train.resume never"
        raise UserError("train.resume", url, f"the checkpoint is of another run: {', '.join(different)}", remedy)


def _read(url: str, name: str, files: Mapping[str, File]) -> bytes:
    """A small file of the checkpoint at `url`, its sha256 checked."""
    try:
        content = storage.read_bytes(storage.join(url, name))
    except FileNotFoundError:
        raise _damaged(url, f"{name} is missing") from None
    except storage.IntegrityError:
        content = b""
    if hashlib.sha256(content).hexdigest() != files[name].sha256:
        raise _damaged(url, f"{name} is not what its manifest says")
    return content


def _damaged(url: str, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint("train.resume", url, what, "name an older checkpoint")
