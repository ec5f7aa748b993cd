"""SwanLab Launch's commands: `python -m launch.swanlab --help` lists them."""

import sys

from launch.swanlab.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
