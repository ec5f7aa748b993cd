"""The commands: `python -m job --help` lists them."""

import sys

from job.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
