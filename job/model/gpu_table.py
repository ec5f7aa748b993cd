"""NVIDIA's GPUs: the names that CUDA gives them, their memory, and their peak FLOP/s in each precision.

All rates are dense (half of "with sparsity") and accumulate in fp32, as cuBLAS does for torch. GeForce GPUs do that at
half the rate that they have with fp16 accumulation, which is the rate that advertisements name.
"""

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp16", "tf32", "fp32"]

_MIB, _T, _G = 2**20, 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """A GPU, from NVIDIA's documents."""

    name: str
    """Name that the plan shows."""
    pattern: str
    """Regular expression for the whole name that CUDA gives it, without ``NVIDIA`` or ``Tesla`` before it."""
    memory_bytes: tuple[int, ...]
    """Memory of each size in which it is sold, the smallest first.

    It is what nvidia-smi shows, which is less than the nominal size where ECC or the driver keeps a part.
    """
    capability: tuple[int, int]
    """CUDA compute capability; from (8, 0) on the tensor cores have bf16 and TF32."""
    bf16_flops: float | None
    """Peak FLOP/s of bf16 products; None without bf16."""
    fp16_flops: float
    """Peak FLOP/s of fp16 products that accumulate in fp32."""
    fp32_flops: float
    """Peak FLOP/s of fp32, without tensor cores."""
    memory_bandwidth: float
    """Bytes per second."""
    source: str
    """Document of the peaks and the bandwidth; ``assumed`` if they are computed, not printed in a document."""
    is_in_plan: bool = True
    """False for a variant that is only recognized by its name."""

    def peak_flops(self, precision: str) -> float | None:
        """Return the peak FLOP/s; None if the GPU does not have this precision.

        The rate of TF32 is half of bf16's in the documents of all GPUs of the table.
        """
        if precision == "tf32":
            return None if self.bf16_flops is None else self.bf16_flops / 2
        return {"bf16": self.bf16_flops, "fp16": self.fp16_flops, "fp32": self.fp32_flops}[precision]

    def used_precision(self, setting: str) -> tuple[Precision, float]:
        """Return the precision for which a plan is made, and its peak FLOP/s.

        Args:
            setting: `train.precision`. Without bf16 and TF32 in the tensor cores, the plan is for fp16 in place of
                bf16, and for fp32 in place of tf32.
        """
        if setting == "fp32" or (setting == "tf32" and self.bf16_flops is None):
            return "fp32", self.fp32_flops
        if setting == "fp16" or self.bf16_flops is None:
            return "fp16", self.fp16_flops
        return ("tf32", self.bf16_flops / 2) if setting == "tf32" else ("bf16", self.bf16_flops)


def _mib(*sizes: int) -> tuple[int, ...]:
    return tuple(size * _MIB for size in sizes)


def _geforce(name: str, mib: tuple[int, ...], bf16: float, fp32: float, bandwidth: float, source: str, cc: int) -> Gpu:
    """Return a GeForce RTX GPU with bf16; its fp16 rate is the same. `bf16`, `fp32` in TFLOP/s, `bandwidth` in GB/s."""
    return Gpu(name, f"GeForce {name}", _mib(*mib), (cc // 10, cc % 10), bf16 * _T, bf16 * _T, fp32 * _T,
               bandwidth * _G, source)  # fmt: skip


def _data_centre(
    name: str,
    pattern: str,
    mib: tuple[int, ...],
    cc: int,
    rates: tuple[float, float],
    bandwidth: float,
    source: str,
    is_in_plan: bool = True,
) -> Gpu:
    """Return a data-centre GPU; `rates` are those of the tensor cores and of fp32 in TFLOP/s, `bandwidth` in GB/s."""
    tensor, fp32 = rates[0] * _T, rates[1] * _T
    bf16 = tensor if cc >= 80 else None
    capability = (cc // 10, cc % 10)
    return Gpu(name, pattern, _mib(*mib), capability, bf16, tensor, fp32, bandwidth * _G, source, is_in_plan)


_A100, _H100, _H200 = "NVIDIA A100 data sheet", "NVIDIA H100 data sheet", "NVIDIA H200 data sheet"
_V100 = "NVIDIA V100 data sheet"
_ADA, _BLACKWELL = "NVIDIA Ada GPU Architecture, appendix A", "NVIDIA RTX Blackwell GPU Architecture, appendix A"
_COMPUTED = "assumed: SMs x 512 FLOP a clock x boost clock, the rate of"

GPUS = (
    _data_centre("T4", "T4", (15360,), 75, (65, 8.1), 320, "NVIDIA T4 data sheet"),
    _data_centre("V100", r"V100-SXM2-(?:16|32)GB", (16384, 32768), 70, (125, 15.7), 900, _V100),
    _data_centre("V100 PCIe", r"V100-PCIE-(?:16|32)GB", (16384, 32768), 70, (112, 14), 900, _V100, False),
    Gpu("RTX 2080 Ti", "GeForce RTX 2080 Ti", _mib(11264), (7, 5), None, 53.8 * _T, 13.4 * _T, 616 * _G,
        "NVIDIA Turing GPU Architecture, table 1, reference clock"),
    _geforce("RTX 3060", (12288,), 25.5, 12.7, 360, f"{_COMPUTED} GA102: 28 SMs, 1.777 GHz", 86),
    _geforce("RTX 3090", (24576,), 71, 35.6, 936, "NVIDIA Ampere GA102 GPU Architecture, appendix A", 86),
    _geforce("RTX 4060 Ti", (8188, 16380), 44.1, 22.1, 288, f"{_COMPUTED} AD102: 34 SMs, 2.535 GHz", 89),
    _geforce("RTX 4090", (24564,), 165.2, 82.6, 1008, _ADA, 89),
    _geforce("RTX 4090 D", (24564,), 147.1, 73.5, 1008, f"{_COMPUTED} AD102: 114 SMs, 2.52 GHz", 89),
    _geforce("RTX 5090", (32607,), 209.5, 104.8, 1792, _BLACKWELL, 120),
    _data_centre("L4", "L4", (23034,), 89, (121, 30.3), 300, "NVIDIA L4 data sheet"),
    _data_centre("A10", "A10", (23028,), 86, (125, 31.2), 600, "NVIDIA A10 data sheet"),
    _data_centre("L40S", "L40S", (46068,), 89, (362, 91.6), 864, "NVIDIA L40S data sheet"),
    _data_centre("A100", r"A[18]00\b.*(?:SXM|PCI|40GB|80GB).*", (40960, 81920), 80, (312, 19.5), 2039,
                 f"{_A100}; the bandwidth is that of 80 GB SXM, 40 GB has 1,555 GB/s"),
    _data_centre("H20", "H20", (97871,), 90, (148, 44), 4000, "assumed: no data sheet is public, trade press agrees"),
    _data_centre("H100", r"H100\b.*(?:SXM|HBM3).*|H800", (81559,), 90, (989.4, 66.9), 3350, _H100),
    _data_centre("H100 PCIe", "H[18]00 PCIe", (81559,), 90, (756, 51.2), 2000, _H100, False),
    _data_centre("H100 NVL", "H100 NVL", (95830,), 90, (835.5, 60.3), 3938, _H100, False),
    _data_centre("H200", "H200", (143771,), 90, (989.4, 66.9), 4800, _H200),
    _data_centre("H200 NVL", "H200 NVL", (143771,), 90, (835.5, 60.3), 4800, _H200, False),
    _data_centre("B200", "B200", (183359,), 100, (2250, 75), 8000, "NVIDIA HGX B200 specification, an eighth of it"),
)  # fmt: skip
"""All GPUs whose peak is known.

Memory is what nvidia-smi shows for these GPUs in public logs.
"""


def find_gpu(device_name: str) -> Gpu | None:
    """Return the GPU that CUDA gives this name, such as ``NVIDIA H100 80GB HBM3`` or ``Tesla T4``.

    Return None for a GPU that is not in the table, and for a part of one: a MIG slice or a virtual GPU.
    """
    if "MIG" in device_name:
        return None
    return next((gpu for gpu in GPUS if matches(gpu, device_name)), None)


def matches(gpu: Gpu, device_name: str) -> bool:
    """Return True if CUDA gives this name to this GPU."""
    return re.fullmatch(rf"(?:NVIDIA |Tesla |NVIDIA Tesla )?(?:{gpu.pattern})", device_name) is not None


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU, by the name that CUDA gives it.

    Returns:
        None if it is not known, if the GPU does not have the precision, and for a part of a GPU (MIG).
    """
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_flops(precision)
