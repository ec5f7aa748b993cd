"""The folder that is sent, as one zip file: the same bytes for the same tree, and nothing but the code that trains."""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import config as settings
from job.config import Config
from job.errors import UserError
from job.invocation import command
from launch.swanlab.leaks import secret_in, secret_name
from launch.swanlab.requirements import requirements
from launch.swanlab.spec import Spec

REPOSITORY = Path(__file__).parent.parent.parent
CREDENTIALS = "credentials.json"
"""Where the entry looks for variables to set."""
_CODE = "job"
_SUFFIX = ".py"
_LARGEST_BYTES = 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip file can hold."""


@dataclass(frozen=True)
class Bundle:
    """What is sent, and what is not."""

    files: dict[str, bytes]
    """By path, sorted."""
    excluded: dict[str, str]
    """Files and folders that stay here, and why."""

    def zip(self) -> bytes:
        """All files as a zip file, in which nothing depends on when, where and by whom it is made."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path, content in self.files.items():
                entry = zipfile.ZipInfo(path, _EPOCH)
                entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o100644 << 16
                archive.writestr(entry, content, compresslevel=9)
        return buffer.getvalue()


def make_bundle(
    config: Config,
    spec_path: Path,
    spec: Spec,
    credentials: Mapping[str, str],
    repository: Path = REPOSITORY,
    environment: Mapping[str, str] = os.environ,
) -> Bundle:
    """What a task needs to train by `config`, and nothing else.

    Args:
        config: from `settle`.
        spec_path: of the spec, beside its entry.
        spec: what is in it.
        credentials: variables that the task is to have in its environment, secrets among them.
        repository: where the code is.
        environment: of this machine: a value that it calls a secret is not let out.

    Raises:
        UserError: a file looks like a secret or like data, or the entry is a link to somewhere else.
    """
    files: dict[str, bytes] = {}
    excluded: dict[str, str] = {}
    for path, reason in _walk(repository / _CODE, repository, spec.spec.exclude):
        if reason:
            excluded[path] = reason
        else:
            files[path] = _content(repository / path, path)
    entry = spec.spec.entry
    if not (spec_path.parent / entry).resolve().is_relative_to(spec_path.parent.resolve()):
        raise UserError("spec.entry", entry, "is a link that leads out of the folder of the spec", "put the file there")
    files |= {
        "swanlab.yaml": _content(spec_path, "swanlab.yaml"),
        entry: _content(spec_path.parent / entry, entry),
        "job.yaml": settings.to_yaml(config).encode(),
        "requirements.txt": requirements(repository).encode(),
    }
    for path, content in files.items():
        _refuse_secrets(path, content, environment)
    if credentials:
        files[CREDENTIALS] = (json.dumps(credentials, sort_keys=True, indent=1) + "\n").encode()
    return Bundle(dict(sorted(files.items())), dict(sorted(excluded.items())))


def _walk(folder: Path, root: Path, exclude: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each file below `folder`, or a folder that is left out as a whole, and why it is; "" for what is sent."""
    left_out = {path for pattern in exclude for path in folder.glob(pattern)}
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path in left_out:
            yield name, "spec.exclude"
        elif path.is_symlink():
            yield name, "a link"
        elif path.name == "__pycache__" or (path.is_dir() and path.name.startswith(".")):
            yield name, "made by tools"
        elif path.is_dir():
            yield from _walk(path, root, exclude)
        elif path.suffix != _SUFFIX:
            yield name, f"no {_SUFFIX} file"
        elif secret_name(path.name):
            raise UserError(name, None, "has the name of a file that holds secrets", _REMEDY)
        else:
            yield name, ""


_REMEDY = "move it away, or name it in spec.exclude"


def _content(path: Path, name: str) -> bytes:
    content = path.read_bytes()
    if len(content) > _LARGEST_BYTES:
        remedy = f"upload it with `{command('upload', module='launch.swanlab')}`; {_REMEDY}"
        raise UserError(name, None, f"is data, not code: {len(content):,} bytes", remedy)
    return content


def _refuse_secrets(path: str, content: bytes, environment: Mapping[str, str]) -> None:
    found = secret_in(content.decode("utf-8", errors="replace"), environment)
    if found is not None:
        line, what = found
        raise UserError(f"{path}:{line}", None, f"looks like {what}", "take it out: what is uploaded may be seen")
