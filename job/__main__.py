"""The commands: `python -m job --help` lists them."""

import sys

from job import console

if __name__ == "__main__":
    console.install()
    from job.cli import main

    sys.exit(main(sys.argv[1:]))
