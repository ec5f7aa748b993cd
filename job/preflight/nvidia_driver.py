"""NVIDIA's driver against the CUDA that torch is built with: new enough, made compatible by cuda-compat, or neither.

A CUDA application needs a driver of its own major version or later. On data-centre cards NVIDIA also supports some
older driver branches, if the libraries of the package cuda-compat stand in for the driver's own, which is called
forward compatibility. The numbers are those of docs.nvidia.com/deploy/cuda-compatibility, and the branches those of
NVIDIA_REQUIRE_CUDA in its images.
"""

import ctypes
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from job.preflight.findings import Findings


class Cuda(NamedTuple):
    """A version of CUDA."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


_LEAST_DRIVERS = {12: 525, 13: 580}
"""By CUDA's major version."""
_FORWARD_BRANCHES = {12: (470,), 13: (535, 550, 565, 570, 575)}
"""Older driver branches, by CUDA's major version, with which NVIDIA supports its cuda-compat."""
_LEAST_CAPABILITIES = {Cuda(13, 0): 7.5, Cuda(12, 8): 7.5, Cuda(12, 0): 5.0}
"""The least compute capability that torch's wheels (2.11 and later) have code for, from this CUDA on. CUDA 13 itself
has none for Maxwell, Pascal and Volta (V100: 7.0)."""
_DATA_CENTER = re.compile(
    r"\b(Tesla|GRID|A2|A10G?|A16|A30|A40|A100|A800|L2|L4|L20|L40S?|T4G?|H20|H100|H200|H800|GH200|B200|B300|GB200|GB300)\b"
)
_CONSUMER = re.compile(r"\b(GeForce|TITAN)\b", re.IGNORECASE)
_GUIDE = "docs/image.md"


def check_driver(findings: Findings, driver: str, cards: Mapping[str, float | None]) -> None:
    """Judge the driver of this machine.

    Args:
        findings: takes the rows.
        driver: its version, as nvidia-smi has it: that of the kernel's module.
        cards: names of the cards and their compute capabilities, where they are known.
    """
    cuda = torch_cuda()
    if cuda is None:
        findings.wrong("driver", f"{driver}, but this torch is built without CUDA", "install torch's CUDA build")
        return
    judge_driver(findings, driver, cards, cuda, driver_cuda(), compat_folder(_LEAST_DRIVERS.get(cuda.major, 0)))


def judge_driver(
    findings: Findings,
    driver: str,
    cards: Mapping[str, float | None],
    cuda: Cuda,
    loaded: Cuda | None,
    compat: Path | None,
) -> None:
    """Judge a driver by what is known of its machine.

    Args:
        findings: takes the rows.
        driver: as in `check_driver`.
        cards: as in `check_driver`.
        cuda: that of torch.
        loaded: that of the libcuda which a process loads; None if it loads none.
        compat: the folder of a cuda-compat that is new enough; None if none is installed.
    """
    _judge_cards(findings, cards, cuda)
    least, branch = _LEAST_DRIVERS.get(cuda.major), driver.partition(".")[0]
    version = f"{driver}, torch has CUDA {cuda}"
    if least is None or not branch.isdecimal():
        findings.unsure("driver", version, "see NVIDIA's table of CUDA compatibility")
        return
    if int(branch) >= least:
        findings.right("driver", version)
        return
    branches = _FORWARD_BRANCHES[cuda.major]
    needed = f"{version}, which needs {least}"
    update = f"update the driver to {least} or later, or take a torch for an older CUDA: {_GUIDE}"
    named = ", ".join(map(str, branches))
    if consumer := [name for name in cards if _CONSUMER.search(name)]:
        findings.wrong("driver", f"{needed}; forward compatibility is not for {consumer[0]}", update)
    elif loaded is not None and loaded.major >= cuda.major:
        found = f"{version}; it is made compatible by the libraries of cuda-compat (CUDA {loaded})"
        if int(branch) in branches and all(_DATA_CENTER.search(name) for name in cards):
            findings.right("driver", found)
        else:
            remedy = f"NVIDIA supports that on data-centre cards with drivers {named}: if it does not start, {update}"
            findings.unsure("driver", found, remedy)
    elif int(branch) not in branches:
        findings.wrong("driver", f"{needed}; forward compatibility is for drivers {named}", update)
    elif compat is not None:
        remedy = f"export LD_LIBRARY_PATH={compat}:$LD_LIBRARY_PATH (data-centre cards), or {update}"
        findings.wrong("driver", f"{needed}; {compat} would make it compatible, but is not in use", remedy)
    else:
        package = f"cuda-compat-{cuda.major}-{cuda.minor}"
        findings.wrong("driver", needed, f"on a data-centre card install {package}, which the image has; else {update}")


def _judge_cards(findings: Findings, cards: Mapping[str, float | None], cuda: Cuda) -> None:
    """Cards for which this torch has no code, whatever the driver is."""
    least = next((_LEAST_CAPABILITIES[known] for known in _LEAST_CAPABILITIES if cuda >= known), 0)
    for name, capability in cards.items():
        if capability is not None and capability < least:
            found = f"{name} has {capability}; a torch for CUDA {cuda} has code from {least} on"
            remedy = f"take a newer card, as a T4 or A100, or a torch for CUDA 12.6: {_GUIDE}"
            findings.wrong("compute capability", found, remedy)


def torch_cuda() -> Cuda | None:
    """The CUDA that torch is built with, from its version file: importing it takes seconds. None if it has none."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    text = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*= '(\d+)\.(\d+)'", text, re.MULTILINE)
    return None if match is None else Cuda(int(match[1]), int(match[2]))


def driver_cuda(library: str = "libcuda.so.1") -> Cuda | None:
    """The CUDA of the driver's library that a process here loads, which cuda-compat replaces; None if there is none.

    Asking for it initializes no GPU.
    """
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return Cuda(version.value // 1000, version.value % 1000 // 10)


def compat_folder(least: int, root: Path = Path("/usr/local")) -> Path | None:
    """The folder of a cuda-compat that was made from driver `least` or a later one, if it is installed."""
    for library in sorted(root.glob("cuda*/compat/libcuda.so.1")):
        match = re.fullmatch(r"libcuda\.so\.(\d+)\..*", library.resolve().name)
        if match is not None and int(match[1]) >= least:
            return library.parent
    return None
