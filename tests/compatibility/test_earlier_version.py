"""Compatibility with the files of earlier versions (commits 99a7a34 and da01a33): data sets are read, a run is resumed.

`written_by_99a7a34/` has the files that this version wrote to s3://earlier: a corpus of 30 articles, its shards, an
unfinished data set with its plan and two of four parts, and a run of 20 steps with the default strategy and precision.
`steps-20-to-30.jsonl` has the metrics that the same version wrote for the next 10 steps.

`written_by_da01a33/` has a corpus of three small files, its shards, and an unfinished data set with its plan and two of
three parts. This version made a slice of each file; later versions put the three files into one slice.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from job import storage
from job.cli import main
from job.data.manifest import load_manifest
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_REFUSED

WRITTEN = Path(__file__).parent / "written_by_99a7a34"
UNSHARED = Path(__file__).parent / "written_by_da01a33"
BUCKET = "s3://earlier"


@pytest.fixture(scope="module")
def earlier(s3_server: S3Server) -> str:
    """URL of a bucket with the files of version 99a7a34."""
    s3_server.create_bucket(BUCKET.removeprefix("s3://"))
    for path in WRITTEN.rglob("*"):
        if path.is_file():
            storage.upload_file(path, f"{BUCKET}/{path.relative_to(WRITTEN).as_posix()}")
    return BUCKET


def job(command: str, folder: Path, **changes: dict[str, object]) -> int:
    """Run a command with the settings of that version. Its local files are in `folder`."""
    settings = yaml.safe_load((WRITTEN / "settings.yaml").read_text(encoding="utf-8"))
    changes["data"] = {"cache_dir": str(folder / "cache")} | changes.get("data", {})
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return main([command, "--config", str(path)])


def test_finished_data_set_is_kept_unchanged(
    earlier: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {entry.url: storage.read_bytes(entry.url) for entry in storage.list_files(f"{earlier}/shards")}
    assert job("prepare", tmp_path) == EXIT_DONE
    assert "only the names and sizes of its files were compared" in caplog.text
    assert {entry.url: storage.read_bytes(entry.url) for entry in storage.list_files(f"{earlier}/shards")} == before
    assert job("prepare", tmp_path, data={"seed": 1}) == EXIT_REFUSED
    assert "holds a finished data set that differs: data.seed" in capsys.readouterr().err


def test_data_set_of_unshared_slices_is_kept_unchanged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(UNSHARED, tmp_path / "made")
    data = {"source": str(tmp_path / "made/corpus"), "shards": str(tmp_path / "made/shards")}
    before = {path: path.read_bytes() for path in (tmp_path / "made").rglob("*") if path.is_file()}
    tokenizer = {"source": str(WRITTEN / "tokenizer")}
    assert job("prepare", tmp_path, data=data, tokenizer=tokenizer) == EXIT_DONE
    assert caplog.text == ""
    assert job("prepare", tmp_path, data=data | {"seed": 1}, tokenizer=tokenizer) == EXIT_REFUSED
    assert "holds a finished data set that differs: data.seed is 2333 there and 1 here" in capsys.readouterr().err
    data["shards"] = str(tmp_path / "made/half-made")
    assert job("prepare", tmp_path, data=data, tokenizer=tokenizer) == EXIT_REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.shards: '{data['shards']}': holds an unfinished data set of an earlier version")
    assert job("prepare", tmp_path, data=data | {"seed": 1}, tokenizer=tokenizer) == EXIT_REFUSED
    assert "holds an unfinished data set that differs: data.seed is 2333 there and 1 here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "made").rglob("*") if path.is_file()} == before


def test_unfinished_data_set_is_refused_in_one_line(
    earlier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("prepare", tmp_path, data={"shards": f"{earlier}/half-made"}) == EXIT_REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.shards: '{earlier}/half-made': holds an unfinished data set of an earlier version")


def test_same_corpus_gives_the_same_tokens(earlier: str, tmp_path: Path) -> None:
    assert job("prepare", tmp_path, data={"shards": f"{earlier}/anew"}) == EXIT_DONE
    old, new = load_manifest(f"{earlier}/shards"), load_manifest(f"{earlier}/anew")
    assert new.fingerprint == old.fingerprint
    assert [one.sha256 for one in new.train + new.validation] == [one.sha256 for one in old.train + old.validation]


def test_resumed_run_has_the_losses_of_the_earlier_version(earlier: str, tmp_path: Path) -> None:
    """The tolerance allows for bf16 on another processor; another order of the data would differ ten times as much."""
    assert job("train", tmp_path) == EXIT_DONE
    rows = [json.loads(line) for line in storage.read_bytes(f"{earlier}/run/logs/metrics.jsonl").splitlines()]
    expected = [json.loads(line) for line in (WRITTEN / "steps-20-to-30.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    for row, known in zip(rows[20:], expected, strict=True):
        assert row["train/tokens_seen"] == known["train/tokens_seen"]
        assert row["train/loss"] == pytest.approx(known["train/loss"], rel=1e-3)
        assert row["train/gradient_norm"] == pytest.approx(known["train/gradient_norm"], rel=2e-2)
    assert rows[-1]["validation/loss"] == pytest.approx(expected[-1]["validation/loss"], rel=1e-3)
