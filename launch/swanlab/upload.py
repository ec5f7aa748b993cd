"""Upload a file or folder as a data set. A task finds it in /data/NAME, where NAME is the data set's name."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from job.errors import UserError
from launch.swanlab.cos import CodeStore, UploadFailed
from launch.swanlab.selection import select
from launch.swanlab.service import Service

_MAX_LISTED_EXCLUDED = 20
"""Excluded files that are printed one by one. The others are only counted by reason."""
_DATA_SET_NAME = re.compile(r"[\w.-]{1,100}")
"""Names that also work as a folder name in the task."""


def upload_data_set(
    service: Service,
    store: CodeStore,
    source: Path,
    name: str,
    description: str | None,
    resumed: str | None,
    write_line: Callable[[str], None],
) -> str:
    """Upload a data set and return its id.

    Args:
        service: keeps the list of data sets.
        store: receives the files.
        source: file or folder to upload. `select` says which files of a folder are sent.
        name: name of the data set, and of its folder below /data/.
        description: text shown to people.
        resumed: id of a data set whose upload was interrupted. Files that the store has in full size are not sent
            again.
        write_line: receives one line for each file that is sent or left out.

    Raises:
        UserError: there is nothing to upload, a file of a prepared data set is missing, or `resumed` is unknown.
        UploadFailed: a file could not be uploaded. The service is told that the upload failed.
    """
    if not _DATA_SET_NAME.fullmatch(name):
        expected = "expected 1 to 100 letters, digits, `.`, `_` or `-`"
        raise UserError("--name", name, expected, "it is the name of a folder in the task")
    selection = select(source)
    files, excluded = selection.files, selection.excluded
    for relative, reason in list(excluded.items())[:_MAX_LISTED_EXCLUDED]:
        write_line(f"not sent: {relative} ({reason})")
    if len(excluded) > _MAX_LISTED_EXCLUDED:
        reasons = Counter(list(excluded.values())[_MAX_LISTED_EXCLUDED:])
        write_line(f"not sent: {'; '.join(f'{count:,} more ({reason})' for reason, count in reasons.most_common())}")
    if resumed is not None and (known := service.data_sets()).get(resumed) != name:
        listed = ", ".join(f"{cuid} ({its_name})" for cuid, its_name in known.items()) or "none"
        raise UserError(
            "--resume",
            resumed,
            f"you have no data set with this id and the name {name}",
            f"use the id of one with this name, or leave out --resume to make a new one; yours: {listed}",
        )
    cuid = resumed or service.create_data_set(name, description)
    folder = f"datasets/{cuid}/{name}"
    write_line(f"data set {cuid}: {len(files)} files, {sum(path.stat().st_size for path in files.values()):,} bytes")
    try:
        stored_bytes = store.sizes(folder) if resumed else {}
        for number, (relative, path) in enumerate(files.items(), 1):
            size_bytes, destination = path.stat().st_size, f"{folder}/{relative}"
            if stored_bytes.get(destination) == size_bytes:
                write_line(f"{number}/{len(files)} {relative}: already uploaded")
                continue
            store.upload(path, destination)
            write_line(f"{number}/{len(files)} {relative}: {size_bytes:,} bytes")
    except BaseException as error:
        with suppress(OSError, UserError):
            service.close_data_set(cuid, is_complete=False)
        if isinstance(error, UploadFailed):
            raise UploadFailed(f"{error}; to continue the upload, add --resume {cuid}") from None
        raise
    service.close_data_set(cuid, is_complete=True)
    return cuid
