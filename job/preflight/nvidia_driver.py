"""Check that NVIDIA's driver is new enough for the CUDA version with which torch is built.

A CUDA application needs a driver of its own major CUDA version or later. On data-centre cards NVIDIA also supports some
older driver branches if the package cuda-compat replaces some of the driver's libraries; NVIDIA calls this forward
compatibility. The versions are from docs.nvidia.com/deploy/cuda-compatibility, the branches from NVIDIA_REQUIRE_CUDA in
NVIDIA's images.
"""

import ctypes
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from job.preflight.findings import Findings


class Cuda(NamedTuple):
    """A CUDA version."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


_LEAST_DRIVERS = {12: 525, 13: 580}
"""Oldest driver branch, by the major version of CUDA."""
_FORWARD_BRANCHES = {12: (470,), 13: (535, 550, 565, 570, 575)}
"""Older driver branches that NVIDIA supports with cuda-compat, by the major version of CUDA."""
_LEAST_CAPABILITIES = {Cuda(13, 0): 7.5, Cuda(12, 8): 7.5, Cuda(12, 0): 5.0}
"""Least compute capability for which torch's wheels (2.11 and later) have code, from this CUDA version on.

CUDA 13 itself does not support Maxwell, Pascal and Volta (V100: 7.0).
"""
_DATA_CENTER = re.compile(
    r"\b(Tesla|GRID|A2|A10G?|A16|A30|A40|A100|A800|L2|L4|L20|L40S?|T4G?|H20|H100|H200|H800|GH200|B200|B300|GB200|GB300)\b"
)
_CONSUMER = re.compile(r"\b(GeForce|TITAN)\b", re.IGNORECASE)
_GUIDE = "docs/image.md"


def check_driver(findings: Findings, driver: str, capabilities: Mapping[str, float | None]) -> None:
    """Check the driver of this machine.

    Args:
        findings: takes the rows.
        driver: version of the driver as nvidia-smi prints it, which is that of the kernel module.
        capabilities: compute capability of each GPU by its name; None if not known.
    """
    cuda = torch_cuda()
    if cuda is None:
        found = f"version {driver}, but the installed torch is built without CUDA"
        findings.wrong("driver", found, "install torch's CUDA build")
        return
    compat = compat_folder(_LEAST_DRIVERS.get(cuda.major, 0))
    judge_driver(findings, driver, capabilities, cuda, driver_cuda(), compat)


def judge_driver(
    findings: Findings,
    driver: str,
    capabilities: Mapping[str, float | None],
    cuda: Cuda,
    loaded: Cuda | None,
    compat: Path | None,
) -> None:
    """Add the rows for a driver, without asking this machine anything.

    Args:
        findings: takes the rows.
        driver: as in `check_driver`.
        capabilities: as in `check_driver`.
        cuda: CUDA version with which torch is built.
        loaded: CUDA version of the libcuda that a process loads; None if it loads none.
        compat: folder of an installed cuda-compat that is new enough; None if there is none.
    """
    _judge_capabilities(findings, capabilities, cuda)
    least, branch = _LEAST_DRIVERS.get(cuda.major), driver.partition(".")[0]
    versions = f"version {driver}, torch is built with CUDA {cuda}"
    if least is None or not branch.isdecimal():
        findings.unsure("driver", versions, "compare them in NVIDIA's table of CUDA compatibility")
        return
    if int(branch) >= least:
        findings.right("driver", versions)
        return
    branches = _FORWARD_BRANCHES[cuda.major]
    branch_names = ", ".join(map(str, branches))
    needed = f"{versions}, which needs driver {least} or later"
    update = f"update the driver to {least} or later, or install a torch for an older CUDA: {_GUIDE}"
    if consumer := [name for name in capabilities if _CONSUMER.search(name)]:
        findings.wrong("driver", f"{needed}; NVIDIA's forward compatibility is not for {consumer[0]}", update)
    elif loaded is not None and loaded.major >= cuda.major:
        found = f"{versions}; the libraries of cuda-compat (CUDA {loaded}) make them compatible"
        if int(branch) in branches and all(_DATA_CENTER.search(name) for name in capabilities):
            findings.right("driver", found)
        else:
            remedy = f"NVIDIA supports this on data-centre cards with drivers {branch_names}: if it fails, {update}"
            findings.unsure("driver", found, remedy)
    elif int(branch) not in branches:
        findings.wrong("driver", f"{needed}; NVIDIA's forward compatibility is for drivers {branch_names}", update)
    elif compat is not None:
        found = f"{needed}; {compat} would make it compatible, but is not in use"
        remedy = f"export LD_LIBRARY_PATH={compat}:$LD_LIBRARY_PATH (on a data-centre card), or {update}"
        findings.wrong("driver", found, remedy)
    else:
        package = f"cuda-compat-{cuda.major}-{cuda.minor}"
        remedy = f"on a data-centre card install {package}, which the image has; on other cards {update}"
        findings.wrong("driver", needed, remedy)


def _judge_capabilities(findings: Findings, capabilities: Mapping[str, float | None], cuda: Cuda) -> None:
    """Add a row for each GPU that this torch has no code for, whatever the driver is."""
    least = next((_LEAST_CAPABILITIES[version] for version in _LEAST_CAPABILITIES if cuda >= version), 0)
    for name, capability in capabilities.items():
        if capability is not None and capability < least:
            found = f"{name} has {capability}, but a torch for CUDA {cuda} needs {least} or later"
            remedy = f"use a newer GPU, such as a T4 or A100, or install a torch for CUDA 12.6: {_GUIDE}"
            findings.wrong("compute capability", found, remedy)


def torch_cuda() -> Cuda | None:
    """Return the CUDA version with which torch is built; None for torch without CUDA.

    It is read from torch's version file, because importing torch takes seconds.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    text = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*= '(\d+)\.(\d+)'", text, re.MULTILINE)
    return None if match is None else Cuda(int(match[1]), int(match[2]))


def driver_cuda(library: str = "libcuda.so.1") -> Cuda | None:
    """Return the CUDA version of the driver library that a process here loads; None if it loads none.

    cuda-compat replaces this library. The call initializes no GPU.
    """
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return Cuda(version.value // 1000, version.value % 1000 // 10)


def compat_folder(least: int, root: Path = Path("/usr/local")) -> Path | None:
    """Return the folder of an installed cuda-compat made from driver branch `least` or later; None if there is none."""
    for library in sorted(root.glob("cuda*/compat/libcuda.so.1")):
        match = re.fullmatch(r"libcuda\.so\.(\d+)\..*", library.resolve().name)
        if match is not None and int(match[1]) >= least:
            return library.parent
    return None
