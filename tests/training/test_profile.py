"""What a run shows of itself on request, and how it goes on where steps cannot be compiled."""

import gzip
import json
import re
from pathlib import Path

import pytest
from small_run import ALONE, DataSet, run, write_settings

from job import storage
from job.errors import EXIT_DONE, EXIT_REFUSED


@pytest.mark.parametrize(("steps", "profiled"), [("1:3", "000001-000003"), ("2:4", "000002-000004")])
def test_the_steps_asked_for_are_profiled_and_where_no_compiler_is_the_run_goes_on_without(
    data_set: DataSet, bucket: str, tmp_path: Path, steps: str, profiled: str
) -> None:
    train = ALONE | {"max_steps": 4, "profile_steps": steps, "compile": True}
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", train=train)
    scratch = {"CXX": "/nowhere/c++", "WIKILLM_SCRATCH": str(tmp_path)}
    code, out, err = run("train", settings, **scratch)
    assert code == EXIT_DONE, err
    assert re.search(r"compiled +│ +no: \S", out)
    assert f"profile of steps {profiled}: {bucket}/run/logs/profile-{profiled}.json.gz\n" in out
    trace = json.loads(gzip.decompress(storage.read_bytes(f"{bucket}/run/logs/profile-{profiled}.json.gz")))
    updates = [one for one in trace["traceEvents"] if one.get("name") == "aten::_fused_adamw_"]
    assert len(updates) == 2 * 2  # steps and parameter groups


def test_a_profile_that_ends_before_it_begins_is_refused(data_set: DataSet, bucket: str, tmp_path: Path) -> None:
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", train=ALONE | {"profile_steps": "13:10"})
    code, _, err = run("train", settings)
    assert code == EXIT_REFUSED
    assert err.startswith("train.profile_steps: '13:10': expected a step, a colon and a later step")
    assert err.count("\n") == 1
