"""A workspace with correct launch files and settings for each test of this folder."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from preflight_workspace import IMAGE, Workspace
from small_run import MODEL, REPOSITORY, DataSet

from job.preflight import store


@pytest.fixture
def workspace(data_set: DataSet, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    # The tests' store and their nodes are both on this machine, so a loopback address is right.
    monkeypatch.setattr(store, "_LOOPBACK", ())
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SWANLAB_", "WIKILLM_", "PET_"))]:
        monkeypatch.delenv(name)
    settings_tree = {
        "run": {"output": f"{bucket}/run"},
        "data": {"shards": data_set.shards, "cache_dir": str(tmp_path / "cache")},
        "model": dict(MODEL),
        "train": {"context_length": 32, "micro_batch_size": 2, "global_batch_size": 32, "warmup_steps": 5},
        "checkpoint": {"every": 10},
        "tracking": {"mode": "disabled"},
    }
    workspace = Workspace(tmp_path, bucket, data_set, settings_tree, monkeypatch)
    workspace.set()
    workspace.environment(SWANLAB_API_KEY="key-that-nobody-may-see", SWANLAB_SAVE_DIR=str(tmp_path))
    workspace.edit("kubernetes/base/kustomization.yaml", r"newName: .*", f"newName: {IMAGE.partition('@')[0]}")
    workspace.edit("kubernetes/base/kustomization.yaml", r"newTag: .*", f"digest: {IMAGE.partition('@')[2]}")
    yield workspace
    for clean_up in workspace.clean_ups:
        clean_up()
