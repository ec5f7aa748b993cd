"""Entry point of a SwanLab task: train with the job.yaml beside this file. It takes no arguments."""

import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CREDENTIALS = FOLDER / "credentials.json"
"""Variables to set, as one JSON object. The file exists only if the task was sent with `--with-credentials`."""

if __name__ == "__main__":
    os.chdir(FOLDER)  # The worker processes also import the code from the working directory.
    if CREDENTIALS.exists():
        os.environ |= json.loads(CREDENTIALS.read_text(encoding="utf-8"))
    from job import console

    console.install()  # After the credentials are set, because it removes their values from everything printed.
    from job.cli import main

    sys.exit(main(["train", "--config", "job.yaml"]))
