"""The object store: who asks, whether its clock agrees, and whether the run may write where it is to."""

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
from job.config import Config
from job.data.manifest import MANIFEST_NAME
from job.preflight.findings import Findings

_REFUSED_SKEW_SECONDS = 900
"""Beyond it S3 answers RequestTimeTooSkewed (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html)."""
_LARGE_SKEW_SECONDS = 60
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_PATIENCE_SECONDS = 15
"""A run would wait longer for a store that is away; whoever checks sits before the screen."""
_ADDRESSING = {
    "auto": "as AWS wants it, by the name of the bucket",
    "virtual": "virtual: bucket.host/key",
    "path": "path: host/bucket/key",
}
_LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")


def check_store(findings: Findings, config: Config, is_here: bool) -> bool:
    """Credentials, address and clock of the store, where there is one; whether it is worth asking it for more.

    Args:
        findings: takes the rows.
        config: all settings.
        is_here: whether this machine is where the run will be; elsewhere, addresses of this machine lead nowhere.
    """
    urls = {"run.output": config.run.output, "data.shards": config.data.shards}
    on_s3 = [name for name, url in urls.items() if url.startswith("s3://")]
    if not on_s3:
        return True
    has_credentials = _check_credentials(findings, is_here, config.store.anonymous)
    setting, address = endpoint(config)
    host = urlsplit(address).hostname or ""
    if not is_here and host.startswith(_LOOPBACK):
        remedy = "give the store's address as it is seen from the nodes"
        findings.wrong("endpoint", f"{setting}: {address} is this machine's own, and the run is elsewhere", remedy)
    else:
        findings.right("endpoint", f"{address} ({setting})")
    _check_clock(findings, address)
    if has_credentials:
        with findings.guard("store"), storage.limits(_PATIENCE_SECONDS):
            for name in on_s3:
                storage.exists(storage.join(urls[name], MANIFEST_NAME))
            findings.right("store", f"answers, and has the bucket of {' and '.join(on_s3)}")
            findings.right("addressing", _ADDRESSING[storage.addressing()])  # as it was found out by then
            return True
    return False


def endpoint(config: Config) -> tuple[str, str]:
    """What sets the address of the S3 service, and the address."""
    for name, address in (
        ("store.endpoint_url", config.store.endpoint_url),
        *((name, os.environ.get(name)) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")),
    ):
        if address:
            return name, address
    region = config.store.region or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return "the cloud's own", f"https://s3.{region}.amazonaws.com"


def _check_credentials(findings: Findings, is_here: bool, is_anonymous: bool) -> bool:
    if is_anonymous:
        findings.unsure("credentials", "none are sent (store.anonymous): enough to read what is public, not to write")
        return True
    remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN if temporary), or AWS_PROFILE"
    try:
        found = botocore.session.Session().get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        findings.wrong("credentials", str(error), remedy)
        return False
    if found is None and is_here:
        findings.wrong("credentials", "there are none for the object store", remedy)
    elif found is None:
        findings.unsure("credentials", "none on this machine: the store cannot be looked into from here", remedy)
    else:
        names = ", ".join(name for name in _CREDENTIALS if os.environ.get(name))
        findings.right("credentials", names if found.method == "env" else f"from {found.method}")
    return found is not None


def _check_clock(findings: Findings, address: str) -> None:
    try:
        began = time.time()
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:  # refused, as one without credentials is, but dated
            headers = error.headers
        theirs = parsedate_to_datetime(headers["Date"]).timestamp()
    except (OSError, TypeError, ValueError) as error:
        findings.unsure("clock", f"the store does not tell its time: {error}", "keep this machine's clock by NTP")
        return
    skew = (began + time.time()) / 2 - theirs
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the store's"
    if abs(skew) >= _REFUSED_SKEW_SECONDS:
        findings.wrong("clock", f"{found}: it refuses what is more than 15 minutes off", "set this machine's clock")
    elif abs(skew) >= _LARGE_SKEW_SECONDS:
        findings.unsure("clock", found, "set this machine's clock")
    else:
        findings.right("clock", "agrees with the store's to the second" if abs(skew) < 2 else found)


def check_output(findings: Findings, output: str, is_single_writer: bool) -> None:
    """Check that files can be created where the run will live, and how the store is asked not to overwrite.

    Args:
        findings: takes the row.
        output: the run's place.
        is_single_writer: whether the settings say that nobody else writes there.
    """
    made = [] if storage.is_remote(output) else _missing_folders(output)
    with findings.guard("output writable"):
        way = storage.creation_way(storage.join(output, "run.json"))
        if way is not None:
            found = f"{output}: a file was created there, not a second time ({way}), and removed"
            findings.right("output writable", found)
        else:
            found = f"{output}: files can be written there, but nothing forbids to create one a second time"
            remedy = "use a store or folder that does, or set store.single_writer: true if nobody else writes there"
            if is_single_writer:
                findings.unsure("output writable", f"{found}; store.single_writer is trusted", "start one at a time")
            else:
                findings.wrong("output writable", f"{found}, so that two starts could both win", remedy)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _missing_folders(output: str) -> list[Path]:
    """Folders that are not there yet, the deepest first."""
    path = Path(output.removeprefix("file://")).expanduser().absolute()
    return [folder for folder in (path, *path.parents) if not folder.exists()]
