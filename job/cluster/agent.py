"""torchrun, without its closing report: what a worker died of is told by the process that started this one."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except (ChildFailedError, SignalException):
        sys.exit(1)
