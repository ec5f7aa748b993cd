"""Make reading a batch slower than a step; Python imports this file if its folder is in PYTHONPATH."""

import os
import time

if "RANK" in os.environ:
    from job.data.sequence_reader import SequenceReader

    read = SequenceReader.read

    def read_slowly(*arguments: object) -> None:
        time.sleep(0.1)
        read(*arguments)  # type: ignore[arg-type]

    SequenceReader.read = read_slowly  # type: ignore[method-assign,assignment]
