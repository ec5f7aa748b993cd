"""Find text and file names that look like secrets, by pattern or by the values of this machine's environment."""

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from job.redaction import secret_parameters, secrets_of

_NAMES = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.ppk", "id_rsa*", "id_ed25519*"),
    *("id_ecdsa*", ".netrc", "_netrc", ".npmrc", ".pypirc", ".git-credentials", ".dockercfg", "kubeconfig"),
    *("*.kubeconfig", "credentials", "credentials.*", "*_credentials.*", "secrets.*", "service-account*.json"),
)
_PATTERNS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in a URL": r"://[^/@\s:'\"{}*]+:[^/@\s'\"{}*]+@",
    "an Amazon access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Tencent Cloud access key": r"\bAKID[0-9A-Za-z]{32}\b",
    "an Alibaba Cloud access key": r"\bLTAI[0-9A-Za-z]{12,30}\b",
    "a Hugging Face token": r"\bhf_[0-9A-Za-z]{30,}\b",
    "a GitHub token": r"\bgh[pousr]_[0-9A-Za-z]{36}\b|\bgithub_pat_\w{40,}",
    "a password or key": (
        r"(?i)(secret|passw(or)?d|api_?key|access_?key|(auth|session|access)_?token)\w*['\"]?\s*[:=]\s*['\"]?"
        r"(?=[\w/+.~-]*\d)[\w/+.~-]{16,}(?![\w(\[])"
    ),
}
_PARAMETER = re.compile(r"[?&]([\w.-]+)=[\w%/+.~-]{16,}")
"""A query parameter of a URL whose value is as long as a signature."""
_MIN_VALUE_CHARACTERS = 16
"""Shortest value of a secret variable that is searched for. A shorter one may occur in a file by chance."""


def is_secret_file_name(name: str) -> bool:
    """Return True if files of this name (without the folder) usually hold secrets."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _NAMES)


def find_secret(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, str] | None:
    """Return the number (from 1) of the first line that looks like a secret, and the kind of secret; None if none does.

    The secret itself is never returned.
    """
    values = {
        value: f"the value of {name}"
        for value, name in secrets_of(environment).items()
        if len(value) >= _MIN_VALUE_CHARACTERS
    }
    for number, line in enumerate(text.splitlines(), 1):
        for value, kind in values.items():
            if value in line:
                return number, kind
        if secret_parameters(_PARAMETER.findall(line)):
            return number, "a signed URL"
        for kind, pattern in _PATTERNS.items():
            if re.search(pattern, line):
                return number, kind
    return None
