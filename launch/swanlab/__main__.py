"""Entry point of `python -m launch.swanlab`; `--help` lists the commands."""

import sys

from job import console

if __name__ == "__main__":
    console.install()
    from launch.swanlab.cli import main

    sys.exit(main(sys.argv[1:]))
