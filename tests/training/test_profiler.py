"""What a run shows of itself on request, and how it goes on without a compiler, and without a GPU's kernels."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from small_run import ALONE, REPOSITORY, DataSet, run, write_settings

from job import storage
from job.errors import EXIT_DONE


@pytest.mark.recovery
def test_the_steps_asked_for_are_profiled_and_without_compiler_and_gpu_the_run_says_so_and_goes_on(
    data_set: DataSet, bucket: str, tmp_path: Path
) -> None:
    train = ALONE | {"max_steps": 4, "profile_steps": "2:4", "compile": True}
    train |= {"flash_attention_3": True, "document_masking": True}
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", train=train)
    scratch = {"CXX": "/nowhere/c++", "WIKILLM_SCRATCH": str(tmp_path)}
    code, out, err = run("train", settings, **scratch)
    assert code == EXIT_DONE, err
    assert re.search(r"compiled +│ +no: \S", out)
    assert "SDPA, no FlashAttention-3: it is for GPUs; documents apart by a mask: no GPU" in out
    url = f"{bucket}/run/logs/profile-000002-000004.json.gz"
    assert f"profile of steps 000002-000004: {url}\n" in out
    trace = json.loads(gzip.decompress(storage.read_bytes(url)))
    updates = [one for one in trace["traceEvents"] if one.get("name") == "aten::_fused_adamw_"]
    assert len(updates) == 2 * 2  # steps and parameter groups


@pytest.mark.recovery
def test_a_run_that_waits_for_data_says_for_what_and_what_to_change(
    data_set: DataSet, bucket: str, tmp_path: Path
) -> None:
    path = write_settings(tmp_path, data_set, f"{bucket}/run", train=ALONE | {"max_steps": 12, "log_every": 4})
    slow = os.pathsep.join([str(Path(__file__).with_name("slow_cutting")), str(REPOSITORY)])
    code, out, err = run("train", path, "--data.loader_workers", "1", PYTHONPATH=slow)
    assert code == EXIT_DONE, err
    waits = re.findall(r"step (\d+)/12 .* data wait ([\d.]+)%.*\n( +waited for data .*)?", out)
    first, *others = waits
    assert (first[0], first[2]) == ("1", ""), "what it waits for at its start is no sign"
    assert [step for step, share, _ in others if float(share) > 50] == ["4", "8", "12"]
    said = [line.strip().partition(" of the time: ")[2] for _, _, line in others]
    advice = "for windows to be cut; try a larger data.loader_workers or data.prefetch_steps"
    assert said == ["", advice, advice]
