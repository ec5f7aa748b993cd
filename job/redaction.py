"""Removes passwords, signatures and tokens from text: whatever the program prints or records passes `redacted`.

A secret is known by its place or by its value:

    by place   user and password in a URL, before the @; parameters of its query that sign or authorize a request
    by value   environment variables whose names say that they hold a secret; what the URLs of the settings hold

The callers are the doors through which text leaves: the standard streams (`job.console`), lines and tables before they
are laid out (`job.report`), errors and whatever is cut to a length (`job.errors`), records (`job.json_record`), and the
settings as they are recorded (`job.config`). A process reads the real values in its own settings and environment.

A signature is no part of what a URL names, so all parameters that belong to it become one mark. The same URL, signed
anew, is the same text, and the same source (`source_name`).
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
"""What stands in the place of a secret."""
_LEAST_CHARACTERS = 8
"""Length of an environment variable's value; a shorter one may stand in a text by chance."""
_LEAST_CHARACTERS_IN_URL = 6
"""The same for a password or signature in a URL, which says that it is one."""
_LEAST_CHARACTERS_OF_USER = 16
"""The same for a user without a password: a name is none, and a token is longer."""

# ---- By place ----

_USERINFO = re.compile(
    r"(?<=://)(?:"
    r"(?P<user>[^\s/?#'\"<>]*)@"
    # A password with a /, ? or # in it, which should have been percent-encoded. A port is no password.
    r"|(?P<malformed>[^\s/?#@:'\"<>\[]*:(?!\d+(?:[/?#\s]|$))[^\s'\"<>@]*)@"
    r")"
)
_QUERY = re.compile(r"[?&#][^\s'\"`<>=]*=[^\s'\"`<>]*")
_SEPARATOR = re.compile(r"&amp;|\\u0026|[&?#]")
_END_OF_SENTENCE = re.compile(r"[.,:;!)\]}]*$")

_NAMES = frozenset(
    (
        # Amazon's older signature, Alibaba OSS, Huawei OBS, Google and CloudFront
        *("signature", "expires", "awsaccesskeyid", "ossaccesskeyid", "accesskeyid", "googleaccessid"),
        *("key-pair-id", "policy"),
        # Azure; Tencent COS and CDN; Alibaba's and Wangsu's CDN
        *("sig", "q-ak", "q-key-time", "q-header-list", "q-url-param-list", "txsecret", "txtime", "auth_key"),
        *("wssecret", "wstime"),
        # anybody's
        *("sign", "key", "auth", "authorization", "apikey", "jwt", "pwd", "pass", "passphrase", "session"),
    )
)
"""Parameters, in lower case, that are a signature or a part of one, or grant access."""
_PREFIXES = ("x-amz-", "x-oss-", "x-goog-", "x-tos-", "x-obs-", "x-cos-", "q-sign")
_ENDS = ("token", "secret", "password", "passwd", "signature", "credential", "credentials")
_SECRET_BY_VALUE = (*_ENDS, "sig", "sign", "auth_key", "apikey", "jwt")
"""The other parameters say who signed, how and until when, in short words that stand in other texts as well."""
_KEY = re.compile(r"(?:^|[-_.])(?:api|access|secret|private|auth|subscription)[-_]?key(?:[-_]?id)?$")
_COMPANIONS: dict[str, frozenset[str]] = {
    # Azure's shared access signatures: https://learn.microsoft.com/rest/api/storageservices/create-service-sas
    "sig": frozenset(
        [
            *("sv", "ss", "srt", "sp", "st", "se", "sip", "spr", "sr", "si", "ses", "sdd", "scid"),
            *("skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid"),
        ]
    ),
    "sign": frozenset(("t", "ts", "timestamp", "nonce")),
    "token": frozenset(("e",)),  # Qiniu's deadline
}
"""Parameters that belong to a signature only beside the one that holds it; elsewhere they may mean anything."""


def secret_parameters(names: Collection[str]) -> set[str]:
    """Return which of the parameters of one query sign or authorize the request."""
    found = {name for name in names if _is_secret_parameter(unquote(name).lower())}
    for name in tuple(found):
        companions = _COMPANIONS.get(name.lower(), frozenset())
        found |= {other for other in names if other.lower() in companions}
    return found


def _is_secret_parameter(name: str) -> bool:
    return name in _NAMES or name.startswith(_PREFIXES) or name.endswith(_ENDS) or _KEY.search(name) is not None


def redacted_urls(text: str) -> str:
    """Return `text` without what is secret by its place in a URL: the same on every machine."""
    if "@" in text and "://" in text:
        text = _USERINFO.sub(f"{MARK}@", text)
    if "=" in text and ("?" in text or "&" in text or "#" in text):
        text = _QUERY.sub(_redacted_query, text)
    return text


def source_name(url: str) -> str:
    """Return what a URL names within its host: its path, and its query without what signs or authorizes the request."""
    found = urlsplit(url)
    parts = [part for part in _SEPARATOR.split(found.query) if part]
    secret = secret_parameters([part.partition("=")[0] for part in parts])
    kept = "&".join(part for part in parts if part.partition("=")[0] not in secret)
    return f"{found.path}?{kept}" if kept else found.path


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
        self.told: dict[str, None] = {}
        self.values: tuple[str, ...] | None = None
        """All of them in every spelling, the longest first; None: the environment has not been read."""

    def sort(self) -> None:
        self.values = tuple(sorted({**self.of_environment, **self.told}, key=len, reverse=True))


_known = _Known()


def is_secret_variable(name: str) -> bool:
    """Return whether the name of an environment variable says that it holds a secret."""
    return _VARIABLE.search(name) is not None


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the values of an environment that its names call secrets, and the name of each.

    A value that is the path of a file is where a secret lies, and none itself.
    """
    return {
        value: name
        for name, value in environment.items()
        if len(value) >= _LEAST_CHARACTERS and is_secret_variable(name) and not _is_path(value)
    }


def learn_environment(environment: Mapping[str, str] | None = None) -> None:
    """Take the secrets of the environment for known from now on, in place of those it had before."""
    environment = os.environ if environment is None else environment
    found = [spelling for value in secrets_of(environment) for spelling in _spellings(value, _LEAST_CHARACTERS)]
    found += [spelling for value in environment.values() for spelling in _in_urls(value)]
    _known.of_environment = dict.fromkeys(found)
    _known.sort()


def learn_urls(*texts: str) -> None:
    """Take passwords and signatures of the URLs in `texts` for known, wherever they stand and however they are cut."""
    _learn([spelling for text in texts for spelling in _in_urls(text)])


def learn_value(secret: str) -> None:
    """Take a secret for known that was read from elsewhere, such as a key that a login has saved."""
    _learn(list(_spellings(secret, _LEAST_CHARACTERS)))


def _learn(found: list[str]) -> None:
    if found:
        if _known.values is None:
            learn_environment()
        _known.told |= dict.fromkeys(found)
        _known.sort()


def _in_urls(text: str) -> Iterator[str]:
    """Every spelling of what is secret by its place in the URLs of `text`."""
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
    """A secret as URLs, JSON and Python write it; of one with several lines, each line."""
    for line in {value, unquote(value), *value.splitlines()}:
        spelled = {line, quote(line, safe=""), quote(line), quote_plus(line), repr(line)[1:-1]}
        spelled |= {json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1]}
        yield from (one for one in spelled if len(one.strip()) >= least_characters)


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
    """Return nested dictionaries and lists with every text in them redacted; all else as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted_tree(one, redact) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(one, redact) for one in value]
    return value
