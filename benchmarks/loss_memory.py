"""Measure the memory of the plain loss and of the chunked loss, forward and backward.

    python -m benchmarks.loss_memory

Each case runs in its own process. Its memory is the peak resident memory of that process minus the peak before the loss
(interpreter, torch and the inputs of the loss), so it counts temporary tensors and gradients. The plain loss takes
about 8 GB.
"""

import argparse
import datetime
import subprocess
import sys

import torch
from torch.nn import functional as F

from benchmarks.machine import cpu_name, peak_bytes
from job.model.loss import default_chunk_tokens, linear_cross_entropy

VOCAB_SIZE, HIDDEN_SIZE = 151_936, 512
CASES = [("plain", 4_096), ("chunked", 4_096), ("chunked", 16_384)]


def measure(loss_name: str, tokens: int) -> None:
    """Run one case in this process and print the bytes of memory that it added to the peak."""
    hidden = torch.randn(tokens, HIDDEN_SIZE, requires_grad=True)
    # Multiply in place: a temporary tensor here would raise the peak and so hide memory of the loss.
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE).mul_(0.02).requires_grad_()
    labels = torch.randint(VOCAB_SIZE, (tokens,))
    baseline_bytes = peak_bytes()
    if loss_name == "plain":
        F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum").backward()
    else:
        linear_cross_entropy(hidden, weight, labels).backward()
    print(peak_bytes() - baseline_bytes)


def report() -> None:
    """Measure all cases and print the table."""
    print(
        f"torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads, {datetime.date.today()}: "
        f"vocabulary {VOCAB_SIZE:,}, hidden size {HIDDEN_SIZE}, fp32, forward and backward; chunks of "
        f"{default_chunk_tokens(VOCAB_SIZE, torch.device('cpu'))} tokens\n"
    )
    print("| loss | tokens | peak memory in addition to its inputs |\n|---|---|---|")
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
