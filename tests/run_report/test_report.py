"""The report on a run: what it says, what it leaves out, and which runs it refuses. No run is trained here."""

import dataclasses
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from small_run import FinishedRun
from stored_run import EVIL, SECRET, STEPS, edit_attempts, write_run

from job import cli, storage
from job.data.manifest import MANIFEST_NAME, Manifest, manifest_bytes, shard_size
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from job.redaction import learn_value
from job.run_report import write_report
from job.run_report.line_chart import Line, line_chart, thin_out
from job.run_report.page import to_html
from job.run_report.run_facts import read_facts
from job.run_report.wording import same
from job.run_report.write_report import EndReport, WrittenReport, make_report
from job.runs.metrics_file import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(run: str) -> WrittenReport:
    learn_value(SECRET)
    return make_report([run])


def drawing(html: str, section: str, number: int = 0) -> ElementTree.Element:
    """Return a drawing of a section of the page; parsing it fails if it is not well-formed."""
    text = html.split(f'<section id="{section}">')[1].split("</section>", maxsplit=1)[0].split("<svg")[number + 1]
    return ElementTree.fromstring("<svg" + text.split("</svg>")[0] + "</svg>")


# ---- What it says ----


def test_page_is_one_file_below_a_megabyte_without_links(report: WrittenReport) -> None:
    assert len(report.html.encode()) < 2**20
    for word in (" src=", " href=", "url(", "@import", "<link", "<img"):
        assert word not in report.html


def test_loss_is_drawn_against_steps_tokens_and_hours(report: WrittenReport) -> None:
    names = ["optimizer steps", "tokens seen", "hours of work, without the pauses between attempts"]
    for number, name in enumerate(names):
        chart = drawing(report.html, "learning", number)
        assert next(text.text for text in chart.iter("text") if text.get("class") == "axis") == name
        lines = {line.get("data-name"): line.get("points", "").split() for line in chart.iter("polyline")}
        assert 900 < len(lines["train/loss"]) <= 1000
        assert len(lines["validation/loss"]) == STEPS // 250


def test_hours_leave_out_the_pauses_between_attempts(run: str) -> None:
    facts = read_facts(run)
    hours = [facts.hours(facts.rows[step - 1]) for step in (250, 500, 1000, 1500)]
    assert hours == [0.5, 1.0, 3.0, 4.0]


def test_report_names_attempts_with_their_causes(report: WrittenReport) -> None:
    rows = [line for line in report.markdown["en"].splitlines() if line.startswith(("| 1 |", "| 2 |", "| 3 |"))]
    assert rows[0] == r"| 1 | 2025-11-24 16:00:00 | 1.00 h | 0 | stopped on request |"
    assert rows[1].endswith("| 2.00 h | 500 | recorded no end (killed? out of memory?) |")
    assert rows[2].endswith("| 1.00 h | 1,000 | failed |")
    for cause in ("stopped on request: a signal asked for it", "按要求停止：收到停止信号", "failed: OSError: disk"):
        assert cause in report.html
    bars = [bar.get("class") for bar in drawing(report.html, "attempts").iter("rect")]
    assert bars == ["bar stopped", "bar unknown", "bar failed"]


def test_report_names_settings_versions_and_the_command(report: WrittenReport) -> None:
    text = report.markdown["en"]
    assert "Changed at attempt 3: train.epochs: 1 → 2" in text
    assert "nearest preset, configs/wiki-123m.yaml" in text
    assert "| hardware | 1 x NVIDIA H200 |" in text
    assert "git checkout 0123456789ab\n" in text
    assert "python -m job train --config configs/wiki-123m.yaml" in text


def test_corpus_and_tokenizer_come_from_the_data_set(tmp_path: Path) -> None:
    run = Path(write_run(tmp_path / "run"))
    (tmp_path / "shards").mkdir()
    sizes = {"tokens": 400, "documents": 10, "utf8_bytes": 900, "characters": 300}
    shard = {"name": "train/0.bin", "size": shard_size(400, 10, "uint16"), "sha256": "0" * 64} | sizes
    statistics = {"documents": 12, "empty": 2, "bad": 0, "normalized": 0, "encoded_tokens": 400}
    manifest = Manifest(
        fingerprint="f", tokenizer_fingerprint="t", vocab_size=32768, dtype="uint16", eod_id=0, seed=1,
        validation_fraction=0.1, split_rule="", train=(shard,), validation=(), statistics=statistics,
    )  # fmt: skip
    (tmp_path / "shards" / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    edit_attempts(str(run), lambda record: record["config"]["data"].update(shards=str(tmp_path / "shards")))
    text = make_report([str(run)]).markdown["zh"]
    assert "| 词表大小 | 32,768 |" in text
    assert "| 文档数 | 12 |" in text
    assert "| 每 token 字节数 | 2.308 |" in text


def test_markdown_is_written_in_both_languages(report: WrittenReport) -> None:
    assert report.markdown["en"].startswith("# Training report: wiki\n")
    assert report.markdown["zh"].startswith("# 训练报告：wiki\n")
    assert report.card_section.startswith("## Training report\n")
    assert [line.count("|") for line in report.markdown["en"].splitlines()] == [
        line.count("|") for line in report.markdown["zh"].splitlines()
    ]


def test_several_runs_share_the_axes_of_their_charts(run: str, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", name="faster", rate=1e-3)
    page = make_report([run, other])
    chart = drawing(page.html, "learning")
    lines = [line for line in chart.iter("polyline") if line.get("data-name") == "train/loss"]
    assert [line.get("class") for line in lines] == ["c0 thin", "c1 thin"]
    assert all(200 < len(line.get("points", "").split()) <= 500 for line in lines)
    assert r"| train.learning\_rate | 0.0005 | 0.001 |" in page.markdown["en"]
    assert "|  | wiki | faster |" in page.markdown["en"]
    assert len(page.html.encode()) < 2**20


def test_eight_runs_stay_below_a_megabyte_and_nine_are_refused(run: str) -> None:
    assert len(make_report([run] * 8).html.encode()) < 2**20
    with pytest.raises(UserError, match=r"report: 9: expected at most 8 runs"):
        make_report([run] * 9)


# ---- What it must not let through ----


def test_texts_of_samples_are_shown_and_not_obeyed(report: WrittenReport) -> None:
    assert EVIL not in report.html
    assert "&lt;script&gt;document.title=&#34;taken&#34;&lt;/script&gt; | `x` **y**" in report.html
    assert report.html.count("<script") == 1
    assert "\x00" not in report.html + report.markdown["en"]
    assert "<script" not in report.markdown["en"].replace(r"\<", "")


def test_secrets_are_removed_before_they_are_escaped(report: WrittenReport) -> None:
    for text in (report.html, *report.markdown.values(), report.card_section):
        assert "是中国的首都 1500" in text
        assert "hunter" not in text


def test_published_forms_leave_out_machines_and_places(run: str, report: WrittenReport) -> None:
    assert "node-2" in report.html and run in report.html
    for text in (*report.markdown.values(), report.card_section):
        assert "node-2" not in text and run not in text


# ---- Runs of which something is missing ----


def test_run_of_an_earlier_version_is_reported(tmp_path: Path) -> None:
    page = make_report([write_run(tmp_path / "run", is_old=True)])
    assert "has no times, so nothing is drawn against hours" in page.html
    assert "metrics.jsonl has no samples" in page.html
    assert "No points: the run has not recorded this." in page.html
    assert "| optimizer steps | 1,500 |" in page.markdown["en"]


def test_run_without_metrics_is_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "logs")
    shutil.rmtree(tmp_path / "run" / "attempts")
    page = make_report([run]).html
    assert "There is no logs/metrics.jsonl yet" in page
    assert "unknown: there is no record of an attempt that can be read" in page


def test_steps_that_a_stop_saved_without_a_line_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert dataclasses.replace(read_facts(run), saved_steps=(1000, STEPS + 9)).steps == STEPS + 9
    stopped = dataclasses.replace(read_facts(run), saved_steps=(STEPS - 3, STEPS + 5, STEPS + 500))
    assert stopped.steps == STEPS + 5, "a checkpoint far ahead belongs to steps that were trained anew since"
    logged = stopped.last("train/tokens_seen")
    assert logged is not None and stopped.tokens_seen == round(logged / STEPS * (STEPS + 5))
    assert dataclasses.replace(stopped, rows=()).steps is None


@pytest.mark.parametrize(("setting", "differs"), [("train.max_steps", True), ("tracking.mode", False)])
def test_command_is_said_to_differ_if_the_settings_were_changed(setting: str, differs: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    edit_attempts(run, lambda record: record.update(changed={setting: [1, 2]}))
    page = make_report([run])
    assert ("its numbers may differ" in page.html) == ("its numbers may differ" in page.markdown["en"]) == differs


def test_damaged_lines_are_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = tmp_path / "run" / "logs" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = b'{"step": 2, "train/loss": "low", "time": [], "attempt": {}, "samples": 5, "train/tokens_seen": null}\n'
    path.write_bytes(b"".join([lines[0], odd, b"{half a li", b"\n", b"\xff\n", *lines[4:]]))
    assert "2 damaged lines of logs/metrics.jsonl are left out, first line 3: " in make_report([run]).html
    assert len(read_facts(run).rows) == STEPS - 2


def test_damaged_attempt_is_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / "attempts" / "00000002.json").write_bytes(b"{")
    assert "1 damaged records of attempts are left out." in make_report([run]).html


def test_lone_point_is_drawn() -> None:
    chart = line_chart([Line([(5.0, 2.0)], 0, name="a")], same("x"), same("y"), is_log=True)
    assert "<circle" in chart
    assert line_chart([Line([], 0)], same("x"), same("y")) == ""
    assert line_chart([Line([(1.0, 0.0)], 0)], same("x"), same("y"), is_log=True) == ""


def test_thinned_line_keeps_its_peaks_and_ends() -> None:
    points = [(float(x), float(x % 10)) for x in range(10_000)]
    points[1234], points[7777] = (1234.0, 99.0), (7777.0, -99.0)
    kept = thin_out(points, 100)
    assert len(kept) <= 100
    assert {points[0], points[-1], points[1234], points[7777]} <= set(kept)
    assert kept == sorted(kept)


# ---- The command, and the end of a run ----


def test_command_writes_three_files_beside_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert cli.main(["report", run]) == EXIT_DONE
    names = ["report.html", "report.md", "report.zh.md"]
    printed = capsys.readouterr()
    assert printed.out.split() == [f"{run}/logs/{name}" for name in names]
    assert printed.err.startswith(f"! {run}: The data set cannot be read from here")
    assert cli.main(["report", run, run, "--to", str(tmp_path / "to")]) == EXIT_DONE
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == names


def test_run_in_an_object_store_is_reported(bucket: str, run: str, tmp_path: Path, default_store: None) -> None:
    for path in [path for path in Path(run).rglob("*") if path.is_file()]:
        storage.upload_file(path, f"{bucket}/run/{path.relative_to(run)}")
    assert cli.main(["report", f"{bucket}/run"]) == EXIT_DONE
    assert b"Training report: wiki" in storage.read_bytes(f"{bucket}/run/logs/report.html")


@pytest.mark.parametrize("content", [None, b"{", b'{"id": 5}'])
def test_no_run_is_refused_in_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "run.json").write_bytes(content)
    assert cli.main(["report", str(tmp_path / "run")]) == EXIT_REFUSED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "run") in said and "run.json" in said


def test_folder_that_cannot_be_written_is_refused_in_one_line(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["report", run, "--to", str(folder)]) == EXIT_REFUSED
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"--to: '{tmp_path}/file': it is a file, not a folder; ")


def test_folder_in_place_of_a_file_is_refused_before_any_writing(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "to" / "report.zh.md").mkdir(parents=True)
    assert cli.main(["report", run, "--to", str(tmp_path / "to")]) == EXIT_REFUSED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"--to: '{tmp_path}/to/report.zh.md': it is a folder, ")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["report.zh.md"]


def test_error_of_the_file_system_names_no_temporary_file(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(url: str, data: bytes) -> None:
        raise OSError(5, "Input/output error", f"{url}.1234.partial")

    monkeypatch.setattr(storage, "write_bytes", fail)
    assert cli.main(["report", run, "--to", str(tmp_path / "to")]) == EXIT_REFUSED
    said = capsys.readouterr().err
    assert said == f"--to: '{tmp_path}/to': cannot be written: Input/output error; name another folder with --to\n"


def test_end_of_a_run_writes_the_report_and_the_card_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / "final").mkdir()
    card = tmp_path / "run" / "final" / "README.md"
    card.write_text("# wiki\n\nA model.\n")
    for _ in range(2):
        EndReport(run, adds_to_card=True).wait(60)
    assert (tmp_path / "run" / "logs" / "report.html").exists()
    assert card.read_text().startswith("# wiki\n\nA model.\n\n<!--")
    assert card.read_text().count("## Training report\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a mistake\nof ours"), MemoryError(), storage.StoreError("gone")])
def test_failing_report_costs_one_line(
    error: Exception, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(urls: object) -> None:
        raise error

    monkeypatch.setattr(write_report, "make_report", fail)
    EndReport(run, adds_to_card=True).wait(60)
    (record,) = caplog.records
    assert record.getMessage().startswith("the report was not written: ")
    assert "\n" not in record.getMessage() and record.exc_info is None


def test_slow_report_is_not_waited_for(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from threading import Event

    never = Event()
    monkeypatch.setattr(write_report, "make_report", lambda urls: never.wait())
    EndReport(run, adds_to_card=False).wait(0.01)
    never.set()
    assert "was not written within" in caplog.text


def test_page_of_an_empty_report_is_whole() -> None:
    assert to_html(same("a"), same("b"), ["a"], []).endswith("</html>")


def test_finished_run_has_left_its_report(finished_run: FinishedRun) -> None:
    page = storage.read_bytes(f"{finished_run.output}/logs/report.html").decode()
    assert "train/loss" in page and '<span lang="zh">已完成</span>' in page
    rows = read_metrics(finished_run.output)
    assert {row["attempt"] for row in rows} == {1}
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert [row["step"] for row in rows if row.get("samples", {}).keys() == {"人工智能"}] == [30, 60, 80]
    assert "## Training report\n" in storage.read_bytes(f"{finished_run.output}/final/README.md").decode()
    facts = read_facts(finished_run.output)
    assert facts.attempts[-1].record.environment and facts.attempts[-1].seconds > 0
    assert facts.manifest is not None and not facts.missing
