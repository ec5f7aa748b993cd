"""The GPUs of this machine, read from nvidia-smi programs that print what other machines' programs print."""

from preflight_workspace import Workspace, gpu

from job.preflight.nvidia_smi import find_gpus


def test_visible_gpus_come_in_the_order_that_cuda_uses(workspace: Workspace) -> None:
    workspace.nvidia_smi("\n".join([gpu(0), gpu(1, "NVIDIA H100 80GB HBM3", 81559, "9.0"), gpu(2)]))
    workspace.environment(CUDA_VISIBLE_DEVICES="1,GPU-00000000")
    found, fault = find_gpus()
    assert ([gpu.index for gpu in found], fault) == (["1", "0"], "")
    assert found[0].memory_bytes == 81559 * 2**20
    workspace.environment(CUDA_VISIBLE_DEVICES="0,7,1")
    found, fault = find_gpus()
    assert [gpu.index for gpu in found] == ["0"] and "7" in fault
    workspace.environment(CUDA_VISIBLE_DEVICES="")
    assert find_gpus() == ([], "")


def test_values_that_nvidia_smi_does_not_know_are_none(workspace: Workspace) -> None:
    workspace.nvidia_smi("0, GPU-0, NVIDIA GB10, [Not Supported], [N/A], 580.95.05, [Insufficient Permissions], 12.1")
    [found], fault = find_gpus()
    assert (found.memory_bytes, found.used_bytes, found.is_sliced, found.capability, fault) == (
        None, None, False, 12.1, "",
    )  # fmt: skip
    workspace.nvidia_smi("0, GPU-0, NVIDIA H100 80GB HBM3, 81559, 0, 580.95.05, Enabled, 9.0")
    assert find_gpus()[0][0].is_sliced
    workspace.nvidia_smi("No devices were found")
    workspace.environment(CUDA_VISIBLE_DEVICES=None)
    assert find_gpus() == ([], "")


def test_old_nvidia_smi_is_asked_only_for_fields_it_knows(workspace: Workspace) -> None:
    workspace.nvidia_smi("")
    (workspace.folder / "bin" / "nvidia-smi").write_text(
        "#!/bin/sh\n"
        "case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;; esac\n"
        "echo '0, GPU-0, Tesla T4, 15109, 0, 450.80.02, [N/A]'\n"
    )
    [found], fault = find_gpus()
    assert (found.name, found.driver, found.capability, fault) == ("Tesla T4", "450.80.02", None, "")
