"""Entry point of `python -m job`; `python -m job --help` lists the commands."""

import sys


def _run():  # type: ignore[no-untyped-def]  # An old Python refuses the annotation.
    from job import installed

    problem = installed.problem()
    if problem:
        sys.stderr.write(f"{problem}\n")
        return 78  # EXIT_REFUSED. Importing job.errors here would fail under an old interpreter.

    from job import console

    console.install()
    from job.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    try:
        code = _run()
    except KeyboardInterrupt:  # Ctrl-C during the imports; `main` handles it later.
        code = 130  # EXIT_INTERRUPTED
    sys.exit(code)
