"""Tests of launch/set_image.py: it writes the pushed image into all launch specs, or changes none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.set_image import REPOSITORY, set_image

KUBERNETES = "launch/kubernetes/base/kustomization.yaml"
COMPOSE, SKYPILOT, SLURM = "launch/compose.yaml", "launch/skypilot.yaml", "launch/slurm.sh"
SPECS = [COMPOSE, KUBERNETES, SKYPILOT, SLURM]
DIGEST = f"sha256:{'0123456789abcdef' * 4}"
NAME = "registry.internal:5000/team/wikillm"


@pytest.fixture
def specs(tmp_path: Path) -> Path:
    """A folder that contains only the launch specs, at the same paths as in the repository."""
    for spec in SPECS:
        (tmp_path / spec).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / spec, tmp_path / spec)
    return tmp_path


def slurm_image(folder: Path) -> str:
    assignment = next(line for line in (folder / SLURM).read_text().splitlines() if line.startswith("IMAGE="))
    words = ["env", "-u", "IMAGE", "bash", "-c", f'{assignment}\necho "$IMAGE"']
    return subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ).stdout.strip()


def test_all_specs_get_the_image_and_nothing_else_changes(specs: Path) -> None:
    before = {spec: (specs / spec).read_text().splitlines() for spec in SPECS}
    assert set_image(f"{NAME}@{DIGEST}", specs) == SPECS
    after = {spec: (specs / spec).read_text().splitlines() for spec in SPECS}
    assert yaml.safe_load("\n".join(after[KUBERNETES]))["images"] == [
        {"name": "wikillm", "newName": NAME, "digest": DIGEST}
    ]
    assert yaml.safe_load("\n".join(after[SKYPILOT]))["resources"]["image_id"] == f"docker:{NAME}@{DIGEST}"
    services = yaml.safe_load("\n".join(after[COMPOSE]))["services"]
    assert services["train"]["image"] == services["prepare"]["image"] == f"{NAME}@{DIGEST}"
    assert slurm_image(specs) == f"{NAME}@{DIGEST}"
    changed = {spec: sum(old != new for old, new in zip(before[spec], after[spec], strict=True)) for spec in SPECS}
    assert changed == {COMPOSE: 1, KUBERNETES: 2, SKYPILOT: 1, SLURM: 1}


def test_a_second_image_replaces_the_first(specs: Path) -> None:
    set_image(f"{NAME}@{DIGEST}", specs)
    set_image(f"other.example.com/lm@sha256:{'ab' * 32}", specs)
    for spec in SPECS:
        text = (specs / spec).read_text()
        assert NAME not in text
        assert DIGEST not in text
        assert text.count("ab" * 32) == 1


@pytest.mark.parametrize("reference", [NAME, f"{NAME}:latest", f"{NAME}@sha256:12", f"{NAME}@{DIGEST} # x", ""])
def test_image_without_digest_is_refused(specs: Path, reference: str) -> None:
    with pytest.raises(ValueError, match="has no digest"):
        set_image(reference, specs)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("times", [0, 2])
def test_no_spec_changes_if_one_has_no_unique_image_line(specs: Path, spec: str, times: int) -> None:
    (specs / spec).write_text((specs / spec).read_text() * times)
    before = {spec: (specs / spec).read_bytes() for spec in SPECS}
    with pytest.raises(ValueError, match=f"{spec}: expected one match of .* found {times}"):
        set_image(f"{NAME}@{DIGEST}", specs)
    assert {spec: (specs / spec).read_bytes() for spec in SPECS} == before


def test_no_other_manifest_names_an_image() -> None:
    """A manifest with its own image name would not be changed by `make set-image`."""
    for path in (REPOSITORY / "launch/kubernetes").rglob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith(("image:", "- image:")):
                assert line.partition("image:")[2].split()[0] == "wikillm", f"{path}: {line}"
