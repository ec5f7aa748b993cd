"""Tests that the Markdown and the model card leave out what must not be published."""

from pathlib import Path
from typing import Any

import pytest
from stored_run import edit_attempts, write_run

from job.config import Config
from job.run_report.preset import is_place
from job.run_report.write_report import WrittenReport, make_report

HOST = "gpu-17.corp.internal"
PLACES = {
    "data.source": "/srv/alice/corpus",
    "data.shards": "s3://alice-bucket/shards",
    "data.cache_dir": "/scratch/alice",
    "tokenizer.source": "s3://alice-bucket/tokenizer",
    "train.resume": "s3://alice-bucket/run/checkpoints/step-1",
    "train.stop_file": "alice/stop",
    "train.of_another_version": "/srv/alice/x",
    "checkpoint.scratch_dir": "scratch/alice",
    "evaluate.model": "runs/alice",
    "generate.model": "runs/alice",
    "tracking.log_dir": "logs/alice",
    "store.endpoint_url": f"https://{HOST}",
}
PUBLIC = {"data.source": "alice/corpus", "tokenizer.source": "modelscope://alice/tokenizer@v1", "train.resume": "never"}


def put(record: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        section, key = name.split(".")
        record["config"][section][key] = value


def plant(record: dict[str, Any]) -> None:
    put(record, PLACES)
    record["host"] = HOST
    record["job_id"] = "alice-77"
    record["error"] = f"RuntimeError on {HOST}: /srv/alice/x: No space left" if record["ended"] == "failed" else None
    record["stop_reason"] = "alice/stop exists (train.stop_file); as long as it does, every start stops"
    record["changed"] = {name: [value, None] for name, value in PLACES.items()}
    record["changed"] |= {f"{name}.now": ["auto", value] for name, value in PLACES.items()}
    record["changed"] |= {"train.epochs": [1, 2]}


def published(report: WrittenReport) -> list[str]:
    return [*report.markdown.values(), report.card_section]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = write_run(tmp_path_factory.mktemp("planted"), name="planted")
    edit_attempts(run, plant)
    return run


def test_no_place_machine_or_error_is_published(planted: str, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", name="other")
    for report in (make_report([planted]), make_report([planted, other]), make_report([other, planted])):
        for word in ("alice", HOST):
            assert word in report.html
            assert all(word not in text for text in published(report))
        assert "| failed |" in report.markdown["en"] and "| 失败 |" in report.markdown["zh"]
        assert "Changed at attempt 3: train.epochs: 1 → 2" in report.markdown["en"]


def test_commands_say_which_settings_are_not_published(planted: str) -> None:
    report = make_report([planted])
    assert "add your own: --data.source, --tokenizer.source, --train.resume." in report.markdown["en"]
    assert "请补上你自己的：--data.source、--tokenizer.source、--train.resume。" in report.markdown["zh"]
    assert "add your own" not in report.html
    assert "--data.source /srv/alice/corpus" in report.html


def test_names_on_a_hub_are_published(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit_attempts(run, lambda record: put(record, PUBLIC))
    text = make_report([run]).markdown["en"]
    assert "| corpus | alice/corpus |" in text
    assert "| tokenizer | modelscope://alice/tokenizer@v1 |" in text
    prepare = next(line for line in text.splitlines() if line.startswith("python -m job prepare"))
    assert "--data.source alice/corpus --tokenizer.source modelscope://alice/tokenizer@v1" in prepare
    assert "--train.resume never" in text
    assert "add your own" not in text


def test_local_folder_with_the_form_of_a_name_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    edit_attempts(run, lambda record: put(record, {"data.source": "alice/corpus", "tokenizer.source": "../alice"}))
    (tmp_path / "alice" / "corpus").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert all("alice" not in text for text in published(make_report([run])))


def test_every_setting_that_names_a_place_is_known() -> None:
    of_other_kinds = {"data.subset", "train.profile_steps"}  # They only speak of a folder.
    for section, values in Config():
        for key, field in type(values).model_fields.items():
            name, words = f"{section}.{key}", (field.description or "").lower()
            if "str" in str(field.annotation) and any(word in words for word in ("folder", "path", "url")):
                assert is_place(name) or name in of_other_kinds, name


def test_hardware_is_published_in_both_languages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    hardware = "CPU (x86_64, 2 cores a machine), processes: 2, machines: 2"
    edit_attempts(run, lambda record: record["environment"].update(hardware=hardware))
    markdown = make_report([run]).markdown
    assert f"| hardware | {hardware.replace('_', chr(92) + '_')} |" in markdown["en"]
    assert r"| 硬件 | CPU（x86\_64，每台机器 2 核），进程数：2，机器数：2 |" in markdown["zh"]
