"""Removes passwords, signatures and tokens from all text that the program prints or records (`redacted`).

A secret is recognized by its position or by its value:

    by position   user and password of a URL, before the @; query parameters that sign or authorize a request
    by value      environment variables whose names say that they hold a secret; secrets in the URLs of settings

All text leaves the program through a few modules, and each of them calls `redacted`: the standard streams
(`job.console`), lines and tables before lines are broken (`job.report`), errors and texts that are cut to a length
(`job.errors`), records (`job.json_record`), and the recorded settings (`job.config`). Inside a process, settings and
environment keep their real values.

All query parameters of a signature are replaced by one mark, because a signature does not change what a URL names. The
same URL with a new signature gives the same text, and the same source (`source_name`).
"""

import base64
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

MARK = "***"
"""Text that replaces a secret."""
_LEAST_CHARACTERS = 8
"""Shortest value of an environment variable that is a secret; a shorter one may occur in other text by chance."""
_LEAST_CHARACTERS_IN_URL = 6
"""Shortest password or signature in a URL. It can be shorter, because its position shows that it is a secret."""
_LEAST_CHARACTERS_OF_USER = 16
"""Shortest user of a URL without a password that is a secret: tokens are long, and names are no secrets."""

# ---- By position ----

_USERINFO = re.compile(
    r"(?<=://)(?:"
    r"(?P<user>[^\s/?#'\"<>]*)@"
    # A password may contain a /, ? or # that should have been percent-encoded. A port is not a password.
    r"|(?P<malformed>[^\s/?#@:'\"<>\[]*:(?!\d+(?:[/?#\s]|$))[^\s'\"<>@]*)@"
    r")"
)
_QUERY = re.compile(r"[?&#][^\s'\"`<>=]*=[^\s'\"`<>]*")
_SEPARATOR = re.compile(r"&amp;|\\u0026|[&?#]")
_END_OF_SENTENCE = re.compile(r"[.,:;!)\]}]*$")

_NAMES = frozenset(
    (
        # The older signature of Amazon; Alibaba OSS, Huawei OBS, Google and CloudFront.
        *("signature", "expires", "awsaccesskeyid", "ossaccesskeyid", "accesskeyid", "googleaccessid"),
        *("key-pair-id", "policy"),
        # Azure; Tencent COS and CDN; the CDNs of Alibaba and Wangsu.
        *("sig", "q-ak", "q-key-time", "q-header-list", "q-url-param-list", "txsecret", "txtime", "auth_key"),
        *("wssecret", "wstime"),
        # Names that any service may use.
        *("sign", "key", "auth", "authorization", "apikey", "jwt", "pwd", "pass", "passphrase", "session"),
    )
)
"""Query parameters, in lower case, that are a signature, belong to one, or grant access."""
_PREFIXES = ("x-amz-", "x-oss-", "x-goog-", "x-tos-", "x-obs-", "x-cos-", "q-sign")
_ENDS = ("token", "secret", "password", "passwd", "signature", "credential", "credentials")
_SECRET_BY_VALUE = (*_ENDS, "sig", "sign", "auth_key", "apikey", "jwt")
"""Ends of the parameters whose values are secrets. The other parameters say who signed, how and until when, in short
words that occur in other text too."""
_KEY = re.compile(r"(?:^|[-_.])(?:api|access|secret|private|auth|subscription)[-_]?key(?:[-_]?id)?$")
_COMPANIONS: dict[str, frozenset[str]] = {
    # Shared access signatures of Azure: https://learn.microsoft.com/rest/api/storageservices/create-service-sas
    "sig": frozenset(
        [
            *("sv", "ss", "srt", "sp", "st", "se", "sip", "spr", "sr", "si", "ses", "sdd", "scid"),
            *("skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid"),
        ]
    ),
    "sign": frozenset(("t", "ts", "timestamp", "nonce")),
    "token": frozenset(("e",)),  # The deadline of a Qiniu URL.
}
"""Parameters that belong to a signature only if the parameter with the signature (the key) is in the same query."""


def secret_parameters(names: Collection[str]) -> set[str]:
    """Return those parameters of a query that sign or authorize the request."""
    secret = {name for name in names if _is_secret_parameter(unquote(name).lower())}
    for name in tuple(secret):
        companions = _COMPANIONS.get(name.lower(), frozenset())
        secret |= {other for other in names if other.lower() in companions}
    return secret


def _is_secret_parameter(name: str) -> bool:
    return name in _NAMES or name.startswith(_PREFIXES) or name.endswith(_ENDS) or _KEY.search(name) is not None


def redacted_urls(text: str) -> str:
    """Return `text` without the secrets that are recognized by their position in a URL.

    The result is the same on every machine, because it does not depend on environment variables.
    """
    if "@" in text and "://" in text:
        text = _USERINFO.sub(f"{MARK}@", text)
    if "=" in text and ("?" in text or "&" in text or "#" in text):
        text = _QUERY.sub(_redacted_query, text)
    return text


def source_name(url: str) -> str:
    """Return the path and query of a URL, without the parameters that sign or authorize the request."""
    split = urlsplit(url)
    parts = [part for part in _SEPARATOR.split(split.query) if part]
    secret = secret_parameters([part.partition("=")[0] for part in parts])
    kept = "&".join(part for part in parts if part.partition("=")[0] not in secret)
    return f"{split.path}?{kept}" if kept else split.path


def _redacted_query(match: re.Match[str]) -> str:
    query = match[0][1:]
    end = _END_OF_SENTENCE.search(query)
    query = query[: end.start()] if end else query
    parts = _SEPARATOR.split(query)
    secret = secret_parameters([part.partition("=")[0] for part in parts])
    if not secret:
        return match[0]
    kept = [part for part in parts if part not in ("", MARK) and part.partition("=")[0] not in secret]
    return f"{match[0][0]}{'&'.join([*kept, MARK])}{end[0] if end else ''}"


# ---- By value ----

_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|SECRET_?KEY|SECRET_?ID|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|AUTH|COOKIES?|API_?KEY)$"
    r"|_(?:PWD|KEY|KEY_ID|AK|SK)$",
    re.IGNORECASE,
)
"""Names of environment variables that hold secrets."""


class _Known:
    """The secrets that this process knows by value."""

    def __init__(self) -> None:
        self.of_environment: dict[str, None] = {}
        """Secrets of the environment, in every spelling; the order of a dict is kept."""
        self.learned: dict[str, None] = {}
        """Secrets of URLs, and secrets given to `learn_value`, in every spelling."""
        self.values: tuple[str, ...] | None = None
        """All secrets, the longest first; None: the environment has not been read yet."""

    def sort(self) -> None:
        self.values = tuple(sorted({**self.of_environment, **self.learned}, key=len, reverse=True))


_known = _Known()


def is_secret_variable(name: str) -> bool:
    """Return True if the name of an environment variable says that it holds a secret."""
    return _VARIABLE.search(name) is not None


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secret values of an environment, with the name of the variable that holds each.

    The path of an existing file is not a secret: the secret is in the file.
    """
    return {
        value: name
        for name, value in environment.items()
        if len(value) >= _LEAST_CHARACTERS and is_secret_variable(name) and not _is_path(value)
    }


def learn_environment(environment: Mapping[str, str] | None = None) -> None:
    """Redact the secrets of this environment from now on, instead of those of the environment learned before."""
    environment = os.environ if environment is None else environment
    spellings = [spelling for value in secrets_of(environment) for spelling in _spellings(value, _LEAST_CHARACTERS)]
    spellings += [spelling for value in environment.values() for spelling in _secrets_in_urls(value)]
    _known.of_environment = dict.fromkeys(spellings)
    _known.sort()


def learn_urls(*texts: str) -> None:
    """Redact the passwords and signatures of the URLs in `texts` from now on, also outside of a URL."""
    _learn([spelling for text in texts for spelling in _secrets_in_urls(text)])


def learn_value(secret: str) -> None:
    """Redact this secret from now on, such as a key that was read from a file."""
    _learn(list(_spellings(secret, _LEAST_CHARACTERS)))


def _learn(spellings: list[str]) -> None:
    if spellings:
        if _known.values is None:
            learn_environment()
        _known.learned |= dict.fromkeys(spellings)
        _known.sort()


def _secrets_in_urls(text: str) -> Iterator[str]:
    """Yield every spelling of the secrets that are recognized by their position in the URLs of `text`."""
    if "://" not in text:
        return
    for match in _USERINFO.finditer(text):
        user, colon, password = (match["user"] or match["malformed"] or "").partition(":")
        if not colon:
            yield from _spellings(user, _LEAST_CHARACTERS_OF_USER)
        else:
            yield from _spellings(password, _LEAST_CHARACTERS_IN_URL)
            yield base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    for match in _QUERY.finditer(text):
        parts = [part.partition("=") for part in _SEPARATOR.split(match[0][1:])]
        secret = secret_parameters([name for name, _, _ in parts])
        for name, _, value in parts:
            if name in secret and (name.lower().endswith(_SECRET_BY_VALUE) or _KEY.search(name.lower())):
                yield from _spellings(value, _LEAST_CHARACTERS_IN_URL)


def _spellings(value: str, least_characters: int) -> Iterator[str]:
    """Yield a secret, and each line of it, as URLs, JSON and Python write it."""
    for line in {value, unquote(value), *value.splitlines()}:
        spellings = {line, quote(line, safe=""), quote(line), quote_plus(line), repr(line)[1:-1]}
        spellings |= {json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1]}
        yield from (spelling for spelling in spellings if len(spelling.strip()) >= least_characters)


def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", "./")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


# ---- Both ----


def redacted(text: str) -> str:
    """Return `text` with every secret in it replaced by `MARK`."""
    if _known.values is None:
        learn_environment()
    for value in _known.values or ():
        if value in text:
            text = text.replace(value, MARK)
    return redacted_urls(text)


def redacted_tree(value: Any, redact: Callable[[str], str] = redacted) -> Any:
    """Return nested dictionaries and lists with every text redacted, keys too. Other values are unchanged."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted_tree(key, redact): redacted_tree(child, redact) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(child, redact) for child in value]
    return value
