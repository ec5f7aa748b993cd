"""Tests that every environment variable that accelerate reads is removed, or allowed for a stated reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import accelerate
import pytest

from job.config import Config
from job.launcher.device import ON_CPU
from job.launcher.foreign_environment import is_foreign, without_foreign
from job.launcher.supervisor import worker_environment

TORCHRUN = "torchrun sets it for each worker, or the agent for a single worker"
UNUSED = "used by a part of accelerate that is never called: its launchers, other trackers"
HARDWARE = "for hardware that is not supported"
NETWORK = "for NCCL's transport, which does not change results"
ALLOWED = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), TORCHRUN),
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"), UNUSED),
    **dict.fromkeys(("CLEARML_PROJECT", "CLEARML_TASK", "NODE_RANK", "NPROC", "PYTHONPATH", "TPU_NAME"), UNUSED),
    **dict.fromkeys(("MLFLOW_EXPERIMENT_NAME", "MLFLOW_NESTED_RUN", "MLFLOW_RUN_ID", "MLFLOW_TAGS"), UNUSED),
    **dict.fromkeys(("PJRT_DEVICE", "DEEPSPEED_USE_HPU", "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK"), HARDWARE),
    **dict.fromkeys(("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"), NETWORK),
    "OMP_NUM_THREADS": "the launcher sets it, unless the user has set it to a number",
}


def names_read(tree: ast.AST) -> Iterator[str]:
    """Yield the names of variables that the code reads, and prefixes from which it builds names."""
    for node in ast.walk(tree):
        read: list[ast.expr] = []
        match node:
            case ast.Call(func=func, args=[first, *_]) if "env" in ast.unparse(func).lower():
                read = first.elts if isinstance(first, ast.List | ast.Tuple) else [first]
            case ast.Subscript(value=value, slice=index) if "environ" in ast.unparse(value):
                read = [index]
            case ast.Compare(left=left, comparators=[right]) if "environ" in ast.unparse(right):
                read = [left]
            case ast.Constant(value=str(text)) if text.isupper() and text.endswith("_") and text.count("_") > 1:
                yield text  # A prefix, to which the code appends the rest of a name.
        texts = (node.value for node in read if isinstance(node, ast.Constant) and isinstance(node.value, str))
        yield from (text for text in texts if text.isupper() and text.isidentifier())


def test_each_variable_read_by_accelerate_is_removed_or_allowed() -> None:
    root = Path(accelerate.__file__).parent
    found = {
        name
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] not in ("commands", "test_utils")
        for name in names_read(ast.parse(path.read_text(encoding="utf-8")))
    }
    known = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION", "FSDP_OFFLOAD_PARAMS", "PMI_SIZE"}
    assert known | {"ACCELERATE_DYNAMO_", "MEGATRON_LM_"} <= found, "names_read misses variables that are read"
    assert {name for name in found if not is_foreign(name)} == ALLOWED.keys()


@pytest.mark.parametrize("is_worker", [False, True])
def test_removed_variables_are_printed_unless_they_were_used(
    is_worker: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"HOME": "/root", "NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cpu", "RANK": "0"}
    of_torchrun = {"TORCHELASTIC_RUN_ID": "one"}
    removed = {"ACCELERATE_USE_CPU": "true", "PET_NNODES": "2", "PET_RDZV_BACKEND": "etcd"}
    found = without_foreign(kept | of_torchrun | removed, is_worker)
    assert found == kept | (of_torchrun if is_worker else {})
    names = ["ACCELERATE_USE_CPU", "PET_RDZV_BACKEND", *([] if is_worker else of_torchrun)]
    printed = capsys.readouterr().err
    assert printed == f"environment variables ignored because settings decide this instead: {', '.join(names)}\n"
    without_foreign(kept)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("threads", ["", "4,2", "abc", "0", "-4", "²"])
def test_unusable_number_of_threads_is_replaced_and_printed(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = without_foreign({"HOME": "/root", "OMP_NUM_THREADS": threads})
    assert kept == {"HOME": "/root"}
    printed = capsys.readouterr().err
    assert printed == f"OMP_NUM_THREADS: {threads!r}: expected a whole number from 1; it is ignored\n"
    assert int(worker_environment(ON_CPU, 1, Config(), kept)["OMP_NUM_THREADS"]) >= 1
    assert "OMP_NUM_THREADS" not in worker_environment(ON_CPU, 1, Config(), {"OMP_NUM_THREADS": "3"})
