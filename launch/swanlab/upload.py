"""A data set: a file or a folder in SwanLab's store, which a task finds below /data/ by the data set's name."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from job.errors import UserError
from launch.swanlab.cos import CodeStore, UploadFailed
from launch.swanlab.leaks import secret_name
from launch.swanlab.service import Service

_NAME = re.compile(r"[\w.-]{1,100}")


def upload(
    service: Service,
    store: CodeStore,
    source: Path,
    name: str,
    description: str | None,
    resumed: str | None,
    say: Callable[[str], None],
) -> str:
    """Uploads a data set; returns its id.

    Args:
        service: that keeps the list of data sets.
        store: where the files go.
        source: a file or a folder.
        name: of the data set, and of its folder below /data/.
        description: for people.
        resumed: id of a data set whose upload was cut off: what is there in its full size is not sent again.
        say: takes a line about what was done.

    Raises:
        UserError: there is nothing to upload, a file has the name of a secret, or the data set is not there.
        UploadFailed: a file could not be uploaded; the service knows that it failed.
    """
    if not _NAME.fullmatch(name):
        raise UserError("--name", name, "expected letters, digits and ._-", "it is the name of a folder in the task")
    files = dict(_files(source))
    if not files:
        raise UserError("upload", str(source), "there is no such file, nor a folder with files in it")
    if resumed is not None and (known := service.data_sets()).get(resumed) != name:
        yours = ", ".join(f"{one} ({called})" for one, called in known.items()) or "none"
        raise UserError("--resume", resumed, f"is no data set called {name}", f"yours are: {yours}")
    cuid = resumed or service.create_data_set(name, description)
    folder = f"datasets/{cuid}/{name}"
    say(f"data set {cuid}: {len(files)} files, {sum(path.stat().st_size for path in files.values()):,} bytes")
    try:
        there = store.sizes(folder) if resumed else {}
        for number, (relative, path) in enumerate(files.items(), 1):
            size, place = path.stat().st_size, f"{folder}/{relative}"
            if there.get(place) == size:
                say(f"{number}/{len(files)} {relative}: is there")
                continue
            store.upload(path, place)
            say(f"{number}/{len(files)} {relative}: {size:,} bytes")
    except BaseException as error:
        with suppress(OSError, UserError):
            service.close_data_set(cuid, is_whole=False)
        if isinstance(error, UploadFailed):
            raise UploadFailed(f"{error}; go on with --resume {cuid}") from None
        raise
    service.close_data_set(cuid, is_whole=True)
    return cuid


def _files(source: Path) -> Iterator[tuple[str, Path]]:
    """The files by their path in the data set."""
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    for path in found:
        if secret_name(path.name):
            raise UserError("upload", str(path), "has the name of a file that holds secrets", "move it away")
        yield path.name if path == source else path.relative_to(source).as_posix(), path
