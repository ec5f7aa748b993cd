"""Tests of the table of GPUs: each is found by the names that CUDA gives it, with the peaks of NVIDIA's documents."""

import pytest

from job.model.gpu_table import GPUS, Precision, find_gpu, matches, peak_flops

GIB = 2**30


@pytest.mark.parametrize(
    ("device_name", "name", "gib", "capability", "tensor_teraflops"),
    [
        ("Tesla T4", "T4", [15], (7, 5), 65),
        ("Tesla V100-SXM2-16GB", "V100", [16, 32], (7, 0), 125),
        ("Tesla V100-SXM2-32GB", "V100", [16, 32], (7, 0), 125),
        ("Tesla V100-PCIE-32GB", "V100 PCIe", [16, 32], (7, 0), 112),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti", [11], (7, 5), 53.8),
        ("NVIDIA GeForce RTX 3060", "RTX 3060", [12], (8, 6), 25.5),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", [24], (8, 6), 71),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti", [8, 16], (8, 9), 44.1),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", [24], (8, 9), 165.2),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D", [24], (8, 9), 147.1),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", [32], (12, 0), 209.5),
        ("NVIDIA L4", "L4", [22], (8, 9), 121),
        ("NVIDIA A10", "A10", [22], (8, 6), 125),
        ("NVIDIA L40S", "L40S", [45], (8, 9), 362),
        ("NVIDIA A100-SXM4-80GB", "A100", [40, 80], (8, 0), 312),
        ("NVIDIA A100-PCIE-40GB", "A100", [40, 80], (8, 0), 312),
        ("NVIDIA A100 80GB PCIe", "A100", [40, 80], (8, 0), 312),
        ("NVIDIA A800-SXM4-80GB", "A100", [40, 80], (8, 0), 312),
        ("NVIDIA H20", "H20", [96], (9, 0), 148),
        ("NVIDIA H100 80GB HBM3", "H100", [80], (9, 0), 989.4),
        ("NVIDIA H800", "H100", [80], (9, 0), 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", [80], (9, 0), 756),
        ("NVIDIA H100 NVL", "H100 NVL", [94], (9, 0), 835.5),
        ("NVIDIA H200", "H200", [140], (9, 0), 989.4),
        ("NVIDIA H200 NVL", "H200 NVL", [140], (9, 0), 835.5),
        ("NVIDIA B200", "B200", [179], (10, 0), 2250),
    ],
)
def test_gpu_is_found_by_its_cuda_name_and_by_no_other_entry(device_name, name, gib, capability, tensor_teraflops):
    (gpu,) = [gpu for gpu in GPUS if matches(gpu, device_name)]
    assert gpu is find_gpu(device_name)
    assert (gpu.name, [round(size / GIB) for size in gpu.memory_bytes]) == (name, gib)
    assert gpu.capability == capability
    assert gpu.fp16_flops == pytest.approx(tensor_teraflops * 1e12)
    assert gpu.bf16_flops == (gpu.fp16_flops if capability >= (8, 0) else None)


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 3060 Ti",
        "NVIDIA GeForce RTX 4060",
        "NVIDIA GeForce RTX 2080 SUPER",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA A10G",
        "NVIDIA T4G",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA A100-10C",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD EPYC",
        "",
    ],
)
def test_peak_of_an_unknown_gpu_or_a_part_of_one_is_not_guessed(device_name):
    assert find_gpu(device_name) is None
    assert peak_flops(device_name, "bf16") is None


@pytest.mark.parametrize(
    ("device_name", "precision", "teraflops"),
    [
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "fp32", 8.1),
        ("Tesla T4", "bf16", None),
        ("Tesla T4", "tf32", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
    ],
)
def test_peak_is_that_of_the_precision(device_name: str, precision: Precision, teraflops: float | None):
    assert peak_flops(device_name, precision) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(
    ("setting", "on_t4", "on_l4"),
    [
        ("auto", ("fp16", 65e12), ("bf16", 121e12)),
        ("bf16", ("fp16", 65e12), ("bf16", 121e12)),
        ("fp16", ("fp16", 65e12), ("fp16", 121e12)),
        ("tf32", ("fp32", 8.1e12), ("tf32", 60.5e12)),
        ("fp32", ("fp32", 8.1e12), ("fp32", 30.3e12)),
    ],
)
def test_plan_uses_fp16_where_the_gpu_has_no_bf16(setting, on_t4, on_l4):
    t4, l4 = find_gpu("Tesla T4"), find_gpu("NVIDIA L4")
    assert t4 is not None and l4 is not None
    assert t4.used_precision(setting) == on_t4
    assert l4.used_precision(setting) == on_l4


def test_every_gpu_names_the_source_of_its_figures():
    assert [gpu.name for gpu in GPUS if not gpu.source.startswith(("NVIDIA ", "assumed: "))] == []
    assumed = {gpu.name for gpu in GPUS if gpu.source.startswith("assumed")}
    assert assumed == {"RTX 3060", "RTX 4060 Ti", "RTX 4090 D", "H20"}
