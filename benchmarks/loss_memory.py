"""How much memory the loss takes, forward and backward: the plain loss, and the chunked one.

    python -m benchmarks.loss_memory

Each case runs in a process of its own; its memory is the high-water mark of that process's resident set, less the mark
before the loss (interpreter, torch and the loss's inputs): what remains are temporaries and gradients. The plain case
takes about 8 GB.
"""

import argparse
import datetime
import resource
import subprocess
import sys

import torch
from torch.nn import functional as F

from benchmarks.machine import cpu_name
from job.model.loss import default_chunk_tokens, linear_cross_entropy

VOCAB_SIZE, HIDDEN_SIZE = 151_936, 512
CASES = [("plain", 4_096), ("chunked", 4_096), ("chunked", 16_384)]


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(loss_name: str, tokens: int) -> None:
    """One case, in this process: prints the bytes above the baseline."""
    hidden = torch.randn(tokens, HIDDEN_SIZE, requires_grad=True)
    # In place: a temporary here would raise the mark, and hide as much of what the loss takes.
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE).mul_(0.02).requires_grad_()
    labels = torch.randint(VOCAB_SIZE, (tokens,))
    baseline_bytes = peak_bytes()
    if loss_name == "plain":
        F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum").backward()
    else:
        linear_cross_entropy(hidden, weight, labels).backward()
    print(peak_bytes() - baseline_bytes)


def report() -> None:
    """The table of all cases."""
    print(
        f"torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads, {datetime.date.today()}: "
        f"vocabulary {VOCAB_SIZE:,}, hidden size {HIDDEN_SIZE}, fp32, forward and backward; chunks of "
        f"{default_chunk_tokens(VOCAB_SIZE, torch.device('cpu'))} tokens\n"
    )
    print("| loss | tokens | peak memory beyond its inputs |\n|---|---|---|")
    for loss_name, tokens in CASES:
        command = [sys.executable, "-m", "benchmarks.loss_memory", "--case", loss_name, str(tokens)]
        taken_bytes = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"| {loss_name} | {tokens:,} | {taken_bytes / 2**30:.2f} GiB |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, metavar=("LOSS", "TOKENS"), help="measure one case in this process")
    case = parser.parse_args().case
    if case:
        measure(case[0], int(case[1]))
    else:
        report()
