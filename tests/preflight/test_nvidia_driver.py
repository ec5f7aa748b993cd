"""Whether driver, GPU and torch's CUDA version work together, on described machines."""

import shutil
import subprocess
from pathlib import Path

import pytest

from job.preflight.findings import RIGHT, UNSURE, WRONG, Finding, Findings
from job.preflight.nvidia_driver import Cuda, compat_folder, driver_cuda, judge_driver

CUDA_13, CUDA_12 = Cuda(13, 0), Cuda(12, 6)
COMPAT = Path("/usr/local/cuda-13.0/compat")


def rows_of(
    driver: str,
    name: str = "NVIDIA A100-SXM4-80GB",
    capability: float | None = 8.0,
    cuda: Cuda = CUDA_13,
    loaded: Cuda | None = None,
    compat: Path | None = None,
) -> list[Finding]:
    findings = Findings()
    judge_driver(findings, driver, {name: capability}, cuda, loaded, compat)
    return findings.rows


@pytest.mark.parametrize(
    ("driver", "cuda", "mark"),
    [
        *(("580.65.06", CUDA_13, RIGHT), ("615.71", CUDA_13, RIGHT), ("535.183.01", CUDA_13, WRONG)),
        *(("525.60.13", CUDA_12, RIGHT), ("580.65.06", CUDA_12, RIGHT), ("470.256.02", CUDA_12, WRONG)),
        *(("700.1", Cuda(14, 0), UNSURE), ("[N/A]", CUDA_13, UNSURE)),
    ],
)
def test_driver_of_the_same_cuda_version_or_later_is_right(driver: str, cuda: Cuda, mark: str) -> None:
    [row] = rows_of(driver, cuda=cuda)
    assert (row.name, row.mark) == ("driver", mark)
    assert driver in row.found and str(cuda) in row.found


@pytest.mark.parametrize("driver", ["535.183.01", "550.54.15", "565.57.01", "570.124.06", "575.57.08"])
@pytest.mark.parametrize(
    "name", ["Tesla T4", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA A10"]
)
def test_older_driver_is_right_if_cuda_compat_is_in_use(driver: str, name: str) -> None:
    [row] = rows_of(driver, name, loaded=CUDA_13, compat=COMPAT)
    assert row.mark == RIGHT and "cuda-compat (CUDA 13.0)" in row.found


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("535.183.01", "NVIDIA RTX A6000"),
        ("560.35.03", "NVIDIA A100-SXM4-80GB"),
        ("525.60.13", "NVIDIA A100-SXM4-80GB"),
    ],
)
def test_combination_that_nvidia_does_not_list_is_unsure(driver: str, name: str) -> None:
    [row] = rows_of(driver, name, loaded=CUDA_13, compat=COMPAT)
    assert row.mark == UNSURE and "535, 550, 565, 570, 575" in row.remedy


def test_cuda_compat_that_is_installed_but_not_in_use_is_named() -> None:
    [row] = rows_of("550.54.15", loaded=Cuda(12, 4), compat=COMPAT)
    assert row.mark == WRONG and "is not in use" in row.found
    assert row.remedy.startswith(f"export LD_LIBRARY_PATH={COMPAT}:")


def test_package_of_missing_cuda_compat_is_named() -> None:
    [row] = rows_of("550.54.15", loaded=Cuda(12, 4))
    assert row.mark == WRONG and "cuda-compat-13-0" in row.remedy and "580 or later" in row.remedy


def test_driver_that_cuda_compat_does_not_support_needs_an_update() -> None:
    [row] = rows_of("525.60.13", compat=COMPAT)
    assert row.mark == WRONG and "for drivers 535, 550" in row.found
    assert row.remedy.startswith("update the driver to 580 or later")


@pytest.mark.parametrize("loaded", [CUDA_13, None])
def test_geforce_has_no_forward_compatibility(loaded: Cuda | None) -> None:
    [row] = rows_of("550.54.15", "NVIDIA GeForce RTX 4090", 8.9, loaded=loaded, compat=COMPAT)
    assert row.mark == WRONG and "not for NVIDIA GeForce RTX 4090" in row.found
    assert "LD_LIBRARY_PATH" not in row.remedy


@pytest.mark.parametrize("driver", ["535.183.01", "580.65.06"])
@pytest.mark.parametrize(("name", "capability"), [("Tesla V100-SXM2-32GB", 7.0), ("Tesla P100-PCIE-16GB", 6.0)])
def test_cuda_13_supports_no_v100_with_any_driver(driver: str, name: str, capability: float) -> None:
    rows = rows_of(driver, name, capability, loaded=CUDA_13, compat=COMPAT)
    assert [(row.name, row.mark) for row in rows] == [("compute capability", WRONG), ("driver", RIGHT)]
    assert f"{name} has {capability}" in rows[0].found and "CUDA 12.6" in rows[0].remedy
    assert [row.mark for row in rows_of(driver, name, capability, cuda=CUDA_12)] == [RIGHT]
    assert [row.mark for row in rows_of(driver, name, capability, cuda=Cuda(12, 8))] == [WRONG, RIGHT]


def test_unknown_compute_capability_adds_no_row() -> None:
    assert [row.mark for row in rows_of("580.65.06", capability=None)] == [RIGHT]
    assert [row.mark for row in rows_of("580.65.06", "Tesla T4", 7.5)] == [RIGHT]


# ---- What this machine has ----


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_driver_cuda_asks_the_library_that_is_loaded(tmp_path: Path) -> None:
    def library(source: str) -> str:
        path = tmp_path / f"lib{abs(hash(source))}.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source.encode(), check=True)
        return str(path)

    assert driver_cuda(library("int cuDriverGetVersion(int *v) { *v = 13000; return 0; }")) == Cuda(13, 0)
    assert driver_cuda(library("int cuDriverGetVersion(int *v) { *v = 12080; return 0; }")) == Cuda(12, 8)
    assert driver_cuda(library("int cuDriverGetVersion(int *v) { *v = 13000; return 803; }")) is None
    assert driver_cuda(library("int another;")) is None
    assert driver_cuda(str(tmp_path / "none.so")) is None


def test_compat_folder_is_found_if_it_is_new_enough(tmp_path: Path) -> None:
    for version, driver in (("12.8", "570.124.06"), ("13.0", "580.82.07")):
        folder = tmp_path / f"cuda-{version}" / "compat"
        folder.mkdir(parents=True)
        (folder / f"libcuda.so.{driver}").touch()
        (folder / "libcuda.so.1").symlink_to(f"libcuda.so.{driver}")
    assert compat_folder(580, tmp_path) == tmp_path / "cuda-13.0/compat"
    assert compat_folder(590, tmp_path) is None
