"""Push the kernel in a folder with the code of the `kaggle` package, up to the request that it would send.

    push.py FOLDER < JSON list of commands, each a list of words

It prints one JSON object: `request` (the request as the service gets it) or `error`, what the package printed about the
metadata, and which function each command calls with which options. Nothing is sent: the client that would do that is
replaced. Runs in the environment of `make test-notebooks`.
"""

import contextlib
import io
import json
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {"KAGGLE_USERNAME": "nobody", "KAGGLE_KEY": "0" * 32}

import kaggle.cli
from kaggle.api.kaggle_api_extended import KaggleApi


def push(folder: str) -> dict[str, Any]:
    sent: list[Any] = []
    service = SimpleNamespace(save_kernel=lambda request: sent.append(request) or SimpleNamespace())
    client = SimpleNamespace(kernels=SimpleNamespace(kernels_api_client=service))
    printed = io.StringIO()
    api = KaggleApi()
    with (
        mock.patch.object(KaggleApi, "build_kaggle_client", lambda self: contextlib.nullcontext(client)),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            api.kernels_push(folder)
        except ValueError as error:
            return {"error": str(error), "printed": printed.getvalue()}
    return {"request": sent[0].to_dict(sent[0]), "printed": printed.getvalue()}


def called(words: list[str]) -> dict[str, Any]:
    """Return the function of the package that a command line calls, and its options, without calling it."""
    calls: list[dict[str, Any]] = []

    def record(name: str) -> Any:
        return lambda self, *positional, **options: calls.append({"function": name, "options": options})

    names = [name for name in dir(KaggleApi) if name.startswith("kernels_") and name.endswith("_cli")]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(KaggleApi, name, record(name)))
        stack.enter_context(mock.patch.object(kaggle.api, "authenticate", lambda: None))
        stack.enter_context(mock.patch.object(sys, "argv", words))
        try:
            kaggle.cli.main()
        except SystemExit as ended:
            return {"exit": ended.code, "calls": calls}
    return calls[0]


print(json.dumps({"push": push(sys.argv[1]), "commands": [called(words) for words in json.load(sys.stdin)]}))
