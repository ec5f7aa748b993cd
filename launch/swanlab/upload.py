"""A data set: a file or a folder in SwanLab's store, which a task finds below /data/ by the data set's name."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from job.errors import UserError
from launch.swanlab.cos import CodeStore, UploadFailed
from launch.swanlab.selection import select
from launch.swanlab.service import Service

_SHOWN_LEFT_OUT = 20
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
        source: a file or a folder; see `select` for what of it is sent.
        name: of the data set, and of its folder below /data/.
        description: for people.
        resumed: id of a data set whose upload was cut off: what is there in its full size is not sent again.
        say: takes a line about what was done.

    Raises:
        UserError: there is nothing to upload, a data set is not whole, or there is none to go on with.
        UploadFailed: a file could not be uploaded; the service knows that it failed.
    """
    if not _NAME.fullmatch(name):
        raise UserError("--name", name, "expected letters, digits and ._-", "it is the name of a folder in the task")
    selection = select(source)
    files, left_out = selection.files, selection.left_out
    for relative, reason in list(left_out.items())[:_SHOWN_LEFT_OUT]:
        say(f"not sent: {relative} ({reason})")
    if len(left_out) > _SHOWN_LEFT_OUT:
        reasons = Counter(list(left_out.values())[_SHOWN_LEFT_OUT:])
        say(f"not sent: {'; '.join(f'{number:,} more ({reason})' for reason, number in reasons.most_common())}")
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
