"""The commands: `python -m job --help` lists them."""

import sys

if __name__ == "__main__":
    from job import installed

    problem = installed.problem()
    if problem:
        sys.stderr.write(f"{problem}\n")
        sys.exit(78)  # EXIT_REFUSED, which is not imported before an old interpreter is refused

    from job import console

    console.install()
    from job.cli import main

    sys.exit(main(sys.argv[1:]))
