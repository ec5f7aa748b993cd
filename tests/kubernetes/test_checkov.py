"""Test that checkov finds nothing in the manifests except the accepted findings listed here with their reasons.

checkov needs about a hundred packages with its own pins, so `make test-kubernetes` creates an environment for it.
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
ACCEPTED = {
    "CKV_K8S_11": "no CPU limit: it would slow the threads that feed the GPUs, and has no benefit on dedicated nodes",
    "CKV_K8S_35": "keys in the environment: the clients of S3 and SwanLab read them there",
}
"""Reason by checkov's number of the finding."""


def test_checkov_reports_only_accepted_findings(tmp_path: Path) -> None:
    rendered = tmp_path / "rendered"
    rendered.mkdir()
    for folder in OVERLAYS:
        # As in a real cluster: with the digest of the image, in a namespace.
        image = {"name": cluster.IMAGE, "digest": f"sha256:{'5' * 64}"}
        manifests = cluster.render_changed(tmp_path / folder, folder, {}, images=[image], namespace="research")
        if folder in RESTARTED_AS_ONE:  # checkov knows neither JobSets nor TrainJobs.
            job = cluster.job_of(manifests)
            job["metadata"]["namespace"] = "research"
            manifests.append(job)
        (rendered / f"{folder}.yaml").write_text(yaml.safe_dump_all(manifests))
    options = ["--skip-download", "--quiet", "--compact", "--framework=kubernetes", "--output=json"]
    done = subprocess.run([CHECKOV, *options, f"--directory={rendered}"], capture_output=True, text=True, timeout=500)
    report = json.loads(done.stdout)
    found = {check["check_id"]: check["check_name"] for check in report["results"]["failed_checks"]}
    assert found.keys() == ACCEPTED.keys(), found
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 60 * len(OVERLAYS), "checkov did not check all folders"
