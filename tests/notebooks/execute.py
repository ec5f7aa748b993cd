"""Execute a notebook with nbclient and print what its cells print; runs in the environment of `make test-notebooks`.

    execute.py NOTEBOOK FOLDER [TEXT]     exit code 1 if a cell failed; what Jupyter shows of the error is printed

With TEXT, the notebook is interrupted once, when a cell prints this text.
"""

import asyncio
import sys
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_SECONDS = 1200


class Client(NotebookClient):
    text = ""
    task: "asyncio.Future[Any] | None" = None

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        content = msg["content"]
        shown = content.get("text") or "\n".join(content.get("traceback", ()))
        if msg["msg_type"] in ("stream", "error"):
            print(shown, end="" if msg["msg_type"] == "stream" else "\n", flush=True)
        if self.text and self.text in shown and self.task is None:
            self.task = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)


def main() -> int:
    path, folder, *text = sys.argv[1:]
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = Client(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": folder}})
    client.text = "".join(text)
    try:
        client.execute()
    except CellExecutionError:
        return 1
    return 0


sys.exit(main())
