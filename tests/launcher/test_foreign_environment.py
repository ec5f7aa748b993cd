"""Every environment variable that accelerate reads is removed, or may be read for a reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import accelerate
import pytest

from job.launcher.foreign_environment import is_foreign, without_foreign

TORCHRUN = "torchrun sets it for each worker, or the launcher does for a single one"
UNUSED = "of a part of accelerate that is not called: its launchers, other trackers"
HARDWARE = "of hardware that is not supported"
NETWORK = "of NCCL: how bytes travel, not which"
MAY_BE_READ = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), TORCHRUN),
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"), UNUSED),
    **dict.fromkeys(("CLEARML_PROJECT", "CLEARML_TASK", "NODE_RANK", "NPROC", "PYTHONPATH", "TPU_NAME"), UNUSED),
    **dict.fromkeys(("MLFLOW_EXPERIMENT_NAME", "MLFLOW_NESTED_RUN", "MLFLOW_RUN_ID", "MLFLOW_TAGS"), UNUSED),
    **dict.fromkeys(("PJRT_DEVICE", "DEEPSPEED_USE_HPU", "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK"), HARDWARE),
    **dict.fromkeys(("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"), NETWORK),
    "OMP_NUM_THREADS": "the launcher sets it, unless the user has",
}


def names_read(tree: ast.AST) -> Iterator[str]:
    """What is read from the environment by its name, and what names are put together from."""
    for node in ast.walk(tree):
        asked: list[ast.expr] = []
        match node:
            case ast.Call(func=func, args=[first, *_]) if "env" in ast.unparse(func).lower():
                asked = first.elts if isinstance(first, ast.List | ast.Tuple) else [first]
            case ast.Subscript(value=value, slice=index) if "environ" in ast.unparse(value):
                asked = [index]
            case ast.Compare(left=left, comparators=[right]) if "environ" in ast.unparse(right):
                asked = [left]
            case ast.Constant(value=str(text)) if text.isupper() and text.endswith("_") and text.count("_") > 1:
                yield text  # a prefix, to which the rest of a name is added
        texts = (one.value for one in asked if isinstance(one, ast.Constant) and isinstance(one.value, str))
        yield from (text for text in texts if text.isupper() and text.isidentifier())


def test_every_variable_that_accelerate_reads_is_removed_or_may_be_read_for_a_reason() -> None:
    root = Path(accelerate.__file__).parent
    found = {
        name
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] not in ("commands", "test_utils")
        for name in names_read(ast.parse(path.read_text(encoding="utf-8")))
    }
    known = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION", "FSDP_OFFLOAD_PARAMS", "PMI_SIZE"}
    assert known | {"ACCELERATE_DYNAMO_", "MEGATRON_LM_"} <= found, "the walk finds them no more"
    assert {name for name in found if not is_foreign(name)} == MAY_BE_READ.keys()


@pytest.mark.parametrize("is_worker", [False, True])
def test_what_is_removed_is_named_but_for_what_was_heeded(is_worker: bool, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"HOME": "/root", "NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cpu", "RANK": "0"}
    of_torchrun = {"TORCHELASTIC_RUN_ID": "one"}
    removed = {"ACCELERATE_USE_CPU": "true", "PET_NNODES": "2", "PET_RDZV_BACKEND": "etcd"}
    found = without_foreign(kept | of_torchrun | removed, is_worker)
    assert found == kept | (of_torchrun if is_worker else {})
    names = ["ACCELERATE_USE_CPU", "PET_RDZV_BACKEND", *([] if is_worker else of_torchrun)]
    said = capsys.readouterr().err
    assert said == f"removed from the environment, since the settings alone decide: {', '.join(names)}\n"
    without_foreign(kept)
    assert capsys.readouterr().err == ""
