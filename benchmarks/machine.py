"""Read the name of this machine's CPU and the memory of a process from Linux's /proc."""

from pathlib import Path


def cpu_name() -> str:
    """Return the model name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "a CPU")


def memory_bytes(line: str, pid: int | str = "self") -> int:
    """Return the memory of a process in bytes: ``VmRSS`` is its resident memory now, ``VmHWM`` the peak.

    ``ru_maxrss`` cannot replace it, because in a child process it starts at the peak of the parent.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return next(1024 * int(row.split()[1]) for row in status.splitlines() if row.startswith(f"{line}:"))


def peak_bytes(pid: int | str = "self") -> int:
    """Return the peak resident memory of a process in bytes."""
    return memory_bytes("VmHWM", pid)
