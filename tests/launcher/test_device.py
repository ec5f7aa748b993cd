"""CPU or GPU: one decision for a node, and a promised GPU that cannot be used is an error."""

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
from job.launcher.device import Answer, choose_device, driver_version
from job.launcher.environment import find_place
from job.launcher.gpus import Gpus

NONE = Gpus(0, "no device of NVIDIA's driver")
TWO = Gpus(2, "CUDA_VISIBLE_DEVICES", is_by_name=True)
EIGHT_FILES = Gpus(8, "/dev")
WSL = Gpus(0, "WSL's /dev/dxg", may_be=True)
BUILD = "torch 2.13.0+cu130, built for CUDA 13.0"
OLD_DRIVER = Answer((), "The NVIDIA driver on your system is too old (found version 12020).", BUILD)


def usable(*names: str, error: str = "") -> Answer:
    return Answer(names, error, BUILD)


def never() -> Answer:
    raise AssertionError("torch takes seconds to import, and nothing is promised")


def test_without_a_promise_the_cpu_is_taken_and_torch_is_not_asked() -> None:
    chosen = choose_device("auto", NONE, never)
    assert (chosen.kind, chosen.gpus) == ("cpu", ())
    assert chosen.reason == "there is no GPU: no device of NVIDIA's driver"


def test_cpu_asked_for_wins_over_every_promise_and_hides_the_gpus_from_the_workers() -> None:
    chosen = choose_device("cpu", TWO, never)
    assert chosen.kind == "cpu"
    assert chosen.environment() == {"CUDA_VISIBLE_DEVICES": ""}


def test_gpus_that_torch_can_use_are_taken_and_left_visible() -> None:
    chosen = choose_device("auto", TWO, lambda: usable("H100", "H100"))
    assert (chosen.kind, chosen.gpus, chosen.environment()) == ("cuda", ("H100", "H100"), {})


def test_device_files_of_others_promise_one_gpu_at_least() -> None:
    assert choose_device("auto", EIGHT_FILES, lambda: usable("H100")).gpus == ("H100",)
    with pytest.raises(UserError):
        choose_device("auto", EIGHT_FILES, lambda: OLD_DRIVER)


@pytest.mark.parametrize("setting", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("answer", "able"),
    [
        (OLD_DRIVER, "torch cannot use any: The NVIDIA driver on your system is too old"),
        (usable("H100"), "torch can use 1 (driver"),
        (usable("H100", error="CUDA error: uncorrectable ECC error"), "torch can use 1: CUDA error"),
    ],
)
def test_promised_gpu_that_torch_cannot_use_is_refused_with_reason_driver_and_build(
    setting: DeviceSetting, answer: Answer, able: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_device(setting, TWO, lambda: answer)
    assert (caught.value.setting, caught.value.value) == ("train.device", setting)
    assert caught.value.expected.startswith(f"CUDA_VISIBLE_DEVICES promises 2 GPUs, but {able}")
    assert f"(driver {driver_version() or 'not loaded'}; {BUILD})" in caught.value.expected
    assert ("train.device cpu" in caught.value.remedy) == (setting == "auto")


def test_cuda_asked_for_where_there_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="a GPU was asked for, and there is none"):
        choose_device("cuda", NONE, lambda: Answer((), "Found no NVIDIA driver", BUILD))


def test_under_wsl_torch_decides() -> None:
    assert choose_device("auto", WSL, lambda: usable("RTX 4090")).kind == "cuda"
    assert choose_device("auto", WSL, lambda: OLD_DRIVER).kind == "cpu"


# ---- What the environment promises ----


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
def test_what_the_environment_promises(variables: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert find_place({"HOME": str(tmp_path)} | variables).gpus.number == expected


# ---- torch itself, in a process of its own ----


def test_torch_is_asked_elsewhere_and_says_why_it_has_no_gpu() -> None:
    answer = device._asked_elsewhere()
    assert answer.gpus == ()
    assert answer.error
    assert answer.build.startswith("torch 2.")


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put another program in the place of Python."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exec sleep 600", "the driver has not answered in 1 s"),
        ("echo oops >&2; exit 3", "asking it ended with 3: oops"),
        ("kill -SEGV $$", "asking it ended with -11: no word"),
        ('echo "{}"', "asking it ended with 0: {}"),
    ],
)
def test_an_answer_that_does_not_come_is_an_error(
    script: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, script, monkeypatch)
    answer = device._asked_elsewhere(seconds=1)
    assert (answer.gpus, answer.error) == ((), error)


def test_version_of_the_driver_is_read_from_either_kind_of_it(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC\n")
    assert driver_version(file) == "535.183.01"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert driver_version(file) == "580.65.06"
    assert driver_version(tmp_path / "none") is None


# ---- The commands ----


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_command_that_was_promised_a_gpu_does_not_run_on_the_cpu(command: str, tmp_path: Path) -> None:
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
    assert "train.device cpu trains without GPUs" in line
    assert not (tmp_path / "run").exists()


def test_demonstration_goes_on_on_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said: list[str] = []
    config = on_usable_device(load("configs/demo.yaml"), said.append)
    assert config.train.device == "cpu"
    assert said[0].startswith("! CUDA_VISIBLE_DEVICES promises 1 GPU")
    assert said[0].endswith("the demonstration goes on on the CPU")
