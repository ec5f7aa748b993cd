"""checkov finds nothing in the manifests but what is meant so, for a reason that stands here.

It brings a hundred packages with pins of its own: `make test-kubernetes` makes a virtual environment for it.
"""

import json
import os
import subprocess
from pathlib import Path

import cluster
import pytest
import yaml
from cluster import OVERLAYS, RESTARTED_AS_ONE

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
CHECKOV = Path(os.environ.get("CHECKOV", REPOSITORY / ".venv-checkov" / "bin" / "checkov"))
MEANT = {
    "CKV_K8S_11": "no limit for CPUs: it would slow the threads that feed the GPUs, and protects nobody on their nodes",
    "CKV_K8S_35": "keys in the environment: that is where S3's and SwanLab's clients read them",
}
"""By checkov's number: what it would have otherwise, and why it is so."""


def test_checkov_finds_nothing_but_what_is_meant_so(tmp_path: Path) -> None:
    rendered = tmp_path / "rendered"
    rendered.mkdir()
    for folder in OVERLAYS:
        # As it comes into a cluster: with an image by its digest, in a namespace.
        image = {"name": cluster.IMAGE, "digest": f"sha256:{'5' * 64}"}
        manifests = cluster.render_changed(tmp_path / folder, folder, {}, images=[image], namespace="research")
        if folder in RESTARTED_AS_ONE:  # it knows neither JobSets nor TrainJobs
            job = cluster.job_of(manifests)
            job["metadata"]["namespace"] = "research"
            manifests.append(job)
        (rendered / f"{folder}.yaml").write_text(yaml.safe_dump_all(manifests))
    options = ["--skip-download", "--quiet", "--compact", "--framework=kubernetes", "--output=json"]
    done = subprocess.run([CHECKOV, *options, f"--directory={rendered}"], capture_output=True, text=True, timeout=500)
    report = json.loads(done.stdout)
    found = {one["check_id"]: one["check_name"] for one in report["results"]["failed_checks"]}
    assert found.keys() == MEANT.keys(), found
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 60 * len(OVERLAYS), "it has not looked at all of them"
