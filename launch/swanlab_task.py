"""What a SwanLab task runs, with no argument and no environment of ours: trains by the job.yaml beside it."""

import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CREDENTIALS = FOLDER / "credentials.json"
"""There only if `submit --with-credentials` was told to put it there."""

if __name__ == "__main__":
    os.chdir(FOLDER)  # the workers find the code there too
    if CREDENTIALS.exists():
        os.environ |= json.loads(CREDENTIALS.read_text(encoding="utf-8"))
    from job import console

    console.install()  # with the credentials in the environment, which it lets nobody print
    from job.cli import main

    sys.exit(main(["train", "--config", "job.yaml"]))
