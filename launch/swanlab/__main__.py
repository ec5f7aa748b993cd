"""SwanLab Launch's commands: `python -m launch.swanlab --help` lists them."""

import sys

from job import console

if __name__ == "__main__":
    console.install()
    from launch.swanlab.cli import main

    sys.exit(main(sys.argv[1:]))
