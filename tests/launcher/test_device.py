"""Tests of the choice between CPU and GPU: one decision per node; a promised GPU that cannot be used is an error."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import REPOSITORY

from job.config import DeviceSetting, load
from job.demo.walk import on_usable_device
from job.errors import EXIT_REFUSED, UserError
from job.launcher import device
from job.launcher.device import GpuProbe, choose_device, driver_version
from job.launcher.environment import detect_environment
from job.launcher.gpus import Gpus

NONE = Gpus(0, "no NVIDIA device was found")
TWO = Gpus(2, "CUDA_VISIBLE_DEVICES", is_by_name=True)
EIGHT_FILES = Gpus(8, "/dev")
WSL = Gpus(0, "WSL's /dev/dxg", may_be=True)
BUILD = "torch 2.13.0+cu130, built for CUDA 13.0"
OLD_DRIVER = GpuProbe((), "The NVIDIA driver on your system is too old (found version 12020).", BUILD)


def usable(*names: str, error: str = "") -> GpuProbe:
    return GpuProbe(names, error, BUILD)


def never() -> GpuProbe:
    raise AssertionError("torch was tried although no GPU is promised; importing it takes seconds")


def test_without_expected_gpus_cpu_is_chosen_without_trying_torch() -> None:
    chosen = choose_device("auto", NONE, never)
    assert (chosen.kind, chosen.gpus) == ("cpu", ())
    assert chosen.reason == "there is no GPU: no NVIDIA device was found"


def test_device_cpu_ignores_gpus_and_hides_them_from_workers() -> None:
    chosen = choose_device("cpu", TWO, never)
    assert chosen.kind == "cpu"
    assert chosen.environment() == {"CUDA_VISIBLE_DEVICES": ""}


def test_usable_gpus_are_chosen_and_stay_visible() -> None:
    chosen = choose_device("auto", TWO, lambda: usable("H100", "H100"))
    assert (chosen.kind, chosen.gpus, chosen.environment()) == ("cuda", ("H100", "H100"), {})


def test_device_files_promise_at_least_one_usable_gpu() -> None:
    assert choose_device("auto", EIGHT_FILES, lambda: usable("H100")).gpus == ("H100",)
    with pytest.raises(UserError):
        choose_device("auto", EIGHT_FILES, lambda: OLD_DRIVER)


@pytest.mark.parametrize("setting", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("probe", "usable_gpus"),
    [
        (OLD_DRIVER, "torch cannot use any: The NVIDIA driver on your system is too old"),
        (usable("H100"), "torch can use 1 (driver"),
        (usable("H100", error="CUDA error: uncorrectable ECC error"), "torch can use 1: CUDA error"),
    ],
)
def test_unusable_gpu_is_refused_with_reason_driver_and_build(
    setting: DeviceSetting, probe: GpuProbe, usable_gpus: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_device(setting, TWO, lambda: probe)
    assert (caught.value.setting, caught.value.value) == ("train.device", setting)
    assert caught.value.expected.startswith(f"CUDA_VISIBLE_DEVICES promises 2 GPUs, but {usable_gpus}")
    assert f"(driver {driver_version() or 'not loaded'}; {BUILD})" in caught.value.expected
    assert ("train.device cpu" in caught.value.remedy) == (setting == "auto")


def test_device_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="expected a GPU, but torch cannot use any: Found no NVIDIA driver"):
        choose_device("cuda", NONE, lambda: GpuProbe((), "Found no NVIDIA driver", BUILD))


def test_on_wsl_the_probe_decides_between_gpu_and_cpu() -> None:
    assert choose_device("auto", WSL, lambda: usable("RTX 4090")).kind == "cuda"
    assert choose_device("auto", WSL, lambda: OLD_DRIVER).kind == "cpu"


# ---- GPUs according to the environment ----


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "2"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0, 1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77,MIG-GPU-5d5b/1/0"}, 2),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "(null)"}, 0),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 0),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 0),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"}, 1),
    ],
)
def test_gpus_are_counted_from_environment_variables(variables: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert detect_environment({"HOME": str(tmp_path)} | variables).gpus.number == expected


# ---- The probe in a separate process ----


def test_probe_in_subprocess_reports_why_there_is_no_gpu() -> None:
    probe = device._probe_in_subprocess()
    assert probe.gpus == ()
    assert probe.error
    assert probe.build.startswith("torch 2.")


def replace_python(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Python by a shell script."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exec sleep 600", "the NVIDIA driver did not answer within 1 s"),
        ("echo oops >&2; exit 3", "the process that tries the GPUs exited with code 3: oops"),
        ("kill -SEGV $$", "the process that tries the GPUs exited with code -11: no output"),
        ('echo "{}"', "the process that tries the GPUs exited with code 0: {}"),
    ],
)
def test_failing_probe_process_is_reported_as_error(
    script: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_python(tmp_path, script, monkeypatch)
    probe = device._probe_in_subprocess(seconds=1)
    assert (probe.gpus, probe.error) == ((), error)


def test_driver_version_is_read_for_both_kinds_of_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC\n")
    assert driver_version(file) == "535.183.01"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert driver_version(file) == "580.65.06"
    assert driver_version(tmp_path / "none") is None


# ---- The commands ----


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_command_with_promised_gpu_does_not_run_on_cpu(command: str, tmp_path: Path) -> None:
    words = [command, "--data.shards", str(tmp_path / "shards"), "--run.output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "job", *words],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_REFUSED, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.device: 'auto': CUDA_VISIBLE_DEVICES promises 1 GPU, but torch cannot use any: ")
    assert "set train.device cpu to train without GPUs" in line
    assert not (tmp_path / "run").exists()


def test_demo_continues_on_cpu_and_prints_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said: list[str] = []
    config = on_usable_device(load("configs/demo.yaml"), said.append)
    assert config.train.device == "cpu"
    assert said[0].startswith("! CUDA_VISIBLE_DEVICES promises 1 GPU")
    assert said[0].endswith("the demonstration continues on the CPU")
