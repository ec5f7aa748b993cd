"""What looks like a secret, in the name of a file, in a text, or because this machine's environment calls it one."""

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
    "an access key of Amazon": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "an access key of Tencent Cloud": r"\bAKID[0-9A-Za-z]{32}\b",
    "an access key of Alibaba Cloud": r"\bLTAI[0-9A-Za-z]{12,30}\b",
    "a token of Hugging Face": r"\bhf_[0-9A-Za-z]{30,}\b",
    "a token of GitHub": r"\bgh[pousr]_[0-9A-Za-z]{36}\b|\bgithub_pat_\w{40,}",
    "a password or key": (
        r"(?i)(secret|passw(or)?d|api_?key|access_?key|(auth|session|access)_?token)\w*['\"]?\s*[:=]\s*['\"]?"
        r"(?=[\w/+.~-]*\d)[\w/+.~-]{16,}(?![\w(\[])"
    ),
}
_PARAMETER = re.compile(r"[?&]([\w.-]+)=[\w%/+.~-]{16,}")
"""Of a URL, with a value as long as that of a signature."""
_LEAST_CHARACTERS = 16
"""Of a variable's value: a shorter one may stand in a file by chance."""


def secret_name(name: str) -> bool:
    """Whether a file of this name, without its folder, is one that holds secrets."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _NAMES)


def secret_in(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, str] | None:
    """The first line of `text` that looks like a secret, counted from 1, and like what; never the secret itself."""
    values = {
        value: f"the value of {name}"
        for value, name in secrets_of(environment).items()
        if len(value) >= _LEAST_CHARACTERS
    }
    for number, line in enumerate(text.splitlines(), 1):
        for value, what in values.items():
            if value in line:
                return number, what
        if secret_parameters(_PARAMETER.findall(line)):
            return number, "a signed URL"
        for what, pattern in _PATTERNS.items():
            if re.search(pattern, line):
                return number, what
    return None
