"""Tests of the profiler and of the advice on data waits, in runs without a compiler and without GPU kernels."""

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
def test_requested_steps_are_profiled(data_set: DataSet, bucket: str, tmp_path: Path) -> None:
    train = ALONE | {"max_steps": 4, "profile_steps": "2:4", "compile": True}
    train |= {"flash_attention_3": True, "document_masking": True}
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", train=train)
    scratch = {"CXX": "/nowhere/c++", "WIKILLM_SCRATCH": str(tmp_path)}
    code, out, err = run("train", settings, **scratch)
    assert code == EXIT_DONE, err
    assert re.search(r"compiled +│ +no: \S", out)
    assert "SDPA, no FlashAttention-3: it needs a GPU; documents apart by a mask: no GPU" in out
    url = f"{bucket}/run/logs/profile-000002-000004.json.gz"
    assert f"profile of steps 000002-000004: {url}\n" in out
    trace = json.loads(gzip.decompress(storage.read_bytes(url)))
    updates = [one for one in trace["traceEvents"] if one.get("name") == "aten::_fused_adamw_"]
    assert len(updates) == 2 * 2  # two steps with two parameter groups each


@pytest.mark.recovery
def test_run_that_waits_for_data_says_what_to_change(data_set: DataSet, bucket: str, tmp_path: Path) -> None:
    path = write_settings(tmp_path, data_set, f"{bucket}/run", train=ALONE | {"max_steps": 40, "log_every": 4})
    slow = os.pathsep.join([str(Path(__file__).with_name("slow_cutting")), str(REPOSITORY)])
    code, out, err = run("train", path, "--data.loader_workers", "1", PYTHONPATH=slow)
    assert code == EXIT_DONE, err
    waits = re.findall(r"step (\d+)/40 .* data wait ([\d.]+)%.*\n( +waited for data .*)?", out)
    first, *others = waits
    assert (first[0], first[2]) == ("1", ""), "the wait for the first batch gives no advice"
    assert [int(step) for step, share, _ in others if float(share) > 10] == list(range(4, 41, 4))
    said = [line.strip().partition(" of the time: ")[2] for _, _, line in others]
    advice = "batches were not ready; raise data.loader_workers or data.prefetch_steps"
    assert said == ["", *[advice] * 9]
