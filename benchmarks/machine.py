"""What is measured on, and how much of its memory a process takes; needs nothing but Linux."""

from pathlib import Path


def cpu_name() -> str:
    """The processor's, as it calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "a CPU")


def memory_bytes(line: str, pid: int | str = "self") -> int:
    """What the kernel says of a process' memory: ``VmRSS``, resident now, or ``VmHWM``, the most it ever had resident.

    ``ru_maxrss`` starts at the parent's peak, and does not do.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return next(1024 * int(one.split()[1]) for one in status.splitlines() if one.startswith(f"{line}:"))


def peak_bytes(pid: int | str = "self") -> int:
    """The most memory that a process ever had resident."""
    return memory_bytes("VmHWM", pid)
