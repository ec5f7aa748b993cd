"""Checks of the object store: credentials, address, clock, and whether the run may write to `run.output`."""

import os
import time
import urllib.error
import urllib.request
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import botocore.exceptions
import botocore.session

from job import storage
from job.config_data import Store
from job.data.manifest import MANIFEST_NAME
from job.preflight.findings import Findings
from job.storage import connection

_REFUSED_SKEW_SECONDS = 900
"""Difference of the clocks above which S3 refuses requests with RequestTimeTooSkewed
(docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html)."""
_LARGE_SKEW_SECONDS = 60
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_DEADLINE_SECONDS = 15
"""Shorter than a run's `store.deadline_seconds`: a person is waiting for the answer."""
_ADDRESSING = {
    "auto": "auto: AWS's client chooses by the name of the bucket",
    "virtual": "virtual: bucket.host/key",
    "path": "path: host/bucket/key",
}
_LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")


def check_store(findings: Findings, output: str, shards_url: str, settings: Store, is_here: bool) -> bool:
    """Check the credentials, address and clock of the store; return True if it can be asked for more.

    Return True without any row if neither `run.output` nor `data.shards` is on S3.

    Args:
        findings: takes the rows.
        output: where the run is stored, `run.output`.
        shards_url: where the data set is, `data.shards`.
        settings: how the store is reached.
        is_here: True if the run will be on this machine; other machines cannot reach the addresses of this one.
    """
    urls = {"run.output": output, "data.shards": shards_url}
    on_s3 = [name for name, url in urls.items() if url.startswith("s3://")]
    if not on_s3:
        return True
    has_credentials = _check_credentials(findings, is_here, settings.anonymous)
    setting, address = _endpoint(settings.region)
    host = urlsplit(address).hostname or ""
    if not is_here and host.startswith(_LOOPBACK):
        found = f"{setting}: {address} is an address of this machine, but the run will be elsewhere"
        findings.wrong("endpoint", found, f"set {setting} to the address at which the store is reached from the nodes")
    else:
        findings.right("endpoint", f"{address} ({setting})")
    _check_clock(findings, address)
    if has_credentials:
        with findings.guard("store"), storage.limits(_DEADLINE_SECONDS):
            for name in on_s3:
                storage.exists(storage.join(urls[name], MANIFEST_NAME))
            findings.right("store", f"reachable, with the bucket of {' and '.join(on_s3)}")
            # The requests above have found out which addressing this store accepts.
            findings.right("addressing", _ADDRESSING[storage.addressing()])
            return True
    return False


def _endpoint(region: str | None) -> tuple[str, str]:
    """Return what sets the address of the S3 service, and the address."""
    setting, address = connection.endpoint()
    if address:
        return setting, address
    region = region or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return "the default", f"https://s3.{region}.amazonaws.com"


def _check_credentials(findings: Findings, is_here: bool, is_anonymous: bool) -> bool:
    """Return True if requests can be sent, with credentials or without."""
    if is_anonymous:
        found = "none are sent (store.anonymous is true): public data can be read, nothing can be written"
        findings.unsure("credentials", found)
        return True
    remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN if temporary), or AWS_PROFILE"
    try:
        credentials = botocore.session.Session().get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        findings.wrong("credentials", str(error), remedy)
        return False
    if credentials is None and is_here:
        findings.wrong("credentials", "none found for the object store", remedy)
    elif credentials is None:
        findings.unsure("credentials", "none found on this machine: the store cannot be checked from here", remedy)
    else:
        names = ", ".join(name for name in _CREDENTIALS if os.environ.get(name))
        findings.right("credentials", names if credentials.method == "env" else f"from {credentials.method}")
    return credentials is not None


def _check_clock(findings: Findings, address: str) -> None:
    """Compare this machine's clock with the Date header of the store's answer."""
    try:
        asked_at = time.time()
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:
            # A request without credentials is refused, but the refusal has a date.
            headers = error.headers
        store_time = parsedate_to_datetime(headers["Date"]).timestamp()
    except (OSError, TypeError, ValueError) as error:
        findings.unsure("clock", f"the store's time is unknown: {error}", "keep this machine's clock correct with NTP")
        return
    skew = (asked_at + time.time()) / 2 - store_time
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the store's clock"
    if abs(skew) >= _REFUSED_SKEW_SECONDS:
        found += ": the store refuses requests that are more than 15 minutes off"
        findings.wrong("clock", found, "set this machine's clock")
    elif abs(skew) >= _LARGE_SKEW_SECONDS:
        findings.unsure("clock", found, "set this machine's clock")
    else:
        findings.right("clock", "same time as the store's clock" if abs(skew) < 2 else found)


def check_output(findings: Findings, output: str, is_single_writer: bool) -> None:
    """Check that files can be created at `run.output`, and that the store keeps two writers from the same file.

    Args:
        findings: takes the row.
        output: where the run is stored, `run.output`.
        is_single_writer: `store.single_writer`, which says that nobody else writes there.
    """
    new_folders = [] if storage.is_remote(output) else _missing_folders(output)
    with findings.guard("output writable"):
        way = storage.creation_method(storage.join(output, "run.json"))
        if way is not None:
            found = f"{output}: can be written, and two runs cannot overwrite each other there ({way})"
            findings.right("output writable", found)
        else:
            found = f"{output}: files can be written there, but two writers can create the same file"
            if is_single_writer:
                remedy = "run only one attempt at a time"
                findings.unsure("output writable", f"{found}; store.single_writer is trusted", remedy)
            else:
                remedy = (
                    "use a store or folder with conditional writes, "
                    "or set store.single_writer: true if nobody else writes there"
                )
                findings.wrong("output writable", f"{found}, so two attempts could both own the run", remedy)
    for folder in new_folders:
        with suppress(OSError):
            folder.rmdir()


def _missing_folders(output: str) -> list[Path]:
    """Return the folders of a path that do not exist yet, the deepest first."""
    path = storage.path_of(output).absolute()
    return [folder for folder in (path, *path.parents) if not folder.exists()]
