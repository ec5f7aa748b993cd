"""`init`: what it finds, which sizes it chooses, and that its file works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_run import REPOSITORY

from job import config as settings
from job.cli import main, parse
from job.config import Config
from job.data.tokenizer import load_tokenizer, train_tokenizer
from job.demo.walk import SAMPLE
from job.errors import EXIT_DONE, EXIT_REFUSED
from job.init.sizes import LARGE, MIDDLE, SMALL, choose_sizes
from job.preflight.assumed_data import own_bytes_per_token
from job.preflight.check import preflight
from job.preflight.findings import WRONG

GIB = 2**30
WIKIPEDIA_BYTES = 1_820_000_000
"""Text of the Chinese Wikipedia, from which 329 M training tokens are made (configs/wiki-54m.yaml)."""
RECORDS = [{"id": "1", "title": "北京", "content": "北京市是中华人民共和国的首都。" * 20}] * 30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, on a machine without GPUs, scheduler and store."""
    monkeypatch.chdir(tmp_path)
    for name in ("JOB_CONFIG", "CUDA_VISIBLE_DEVICES", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def put(folder: Path, name: str, content: str | list[dict[str, object]]) -> None:
    """Write a file to ./data: text as it is; records as Parquet, JSON lines or one JSON array."""
    path = folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(content), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content))
    else:
        path.write_text(json.dumps(content, ensure_ascii=False))


def initialise(capsys: pytest.CaptureFixture[str], *words: str, file: str = "job.yaml") -> tuple[Config, str]:
    """Run `init`; return the settings in its file, which must pass `check` but for the shards, and what it printed."""
    code = main(["init", *words])
    out, err = capsys.readouterr()
    assert (code, err) == (EXIT_DONE, "")
    config = settings.load(file)
    wrong = [row for row in preflight(config).findings.rows if row.mark == WRONG]
    assert [row.name for row in wrong if row.name != "device"] == ["data set"], wrong
    return config, out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run `init`, which must refuse with 78; return the one line on standard error."""
    assert main(["init", *words]) == EXIT_REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- The text ----


@pytest.mark.parametrize("name", ["articles.json", "articles.jsonl", "articles.parquet"])
def test_field_with_the_text_is_found_in_the_first_record(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    put(folder, name, RECORDS)
    config, out = initialise(capsys)
    assert (config.data.source, config.data.text_field) == ("data", "content")
    assert re.search(r"^found: text: [\d.]+ kB in 1 file in data, in field 'content'$", out, re.M)


def test_small_amounts_are_in_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.txt", "北京是首都。")
    assert "found: text: 18 bytes in 1 file in data" in initialise(capsys)[1]


def test_files_that_are_not_used_are_named_as_by_prepare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.jsonl", RECORDS)
    put(folder, "b.txt", "天津。" * 400)
    put(folder, "a.json", RECORDS)
    _, out = initialise(capsys)
    left_out = "corpus data: left out: another format, while there are JSON or Parquet files: b.txt (1 file, 3.6 kB)"
    assert left_out in out.splitlines()
    assert "corpus data: possible duplicates: a.json and a.jsonl" in out.splitlines()


def test_plain_text_and_usual_field_need_no_other_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.txt", "北京是首都。\n\n" * 50)
    assert initialise(capsys)[0].data.text_field == "text"
    put(folder, "b.jsonl", [{"text": "北京是首都。" * 20, "content": "x" * 900}] * 30)
    (folder / "data" / "a.txt").unlink()
    assert initialise(capsys, "--file", "b.yaml", file="b.yaml")[0].data.text_field == "text"


@pytest.mark.parametrize("makes_folder", [False, True])
def test_empty_folder_gets_the_bundled_sample(
    folder: Path, capsys: pytest.CaptureFixture[str], makes_folder: bool
) -> None:
    if makes_folder:
        (folder / "data").mkdir()
    config, out = initialise(capsys)
    assert config.data.source == str(SAMPLE)
    assert "assumed: the bundled sample as the text, because there is none in ./data" in out


@pytest.mark.parametrize("name", [".gitkeep", "_notes.txt", "shards/plan.json", "tokenizer/tokenizer.json"])
def test_folder_without_foreign_files_gets_the_bundled_sample(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    record = {"version": 1, "source": "x", "settings": {}, "model": {}, "added_tokens": []}
    (folder / "data" / "run").mkdir(parents=True)
    (folder / "data" / name).parent.mkdir(exist_ok=True)
    (folder / "data" / name).write_text(json.dumps(record))
    config, out = initialise(capsys)
    assert config.data.source == str(SAMPLE)
    assert "none in ./data, only hidden files or what this program has written" in out
    (folder / "data" / "book.pdf").write_text("%PDF")
    assert "no file there can be read as a corpus" in refused(capsys, "--file", "b.yaml")
    assert "can be read as a corpus" in refused(capsys, "--file", "b.yaml", "--data.source", "data")
    (folder / "data" / "book.pdf").unlink()
    (folder / "data" / "book.txt").symlink_to("nowhere")
    assert "a broken link: book.txt" in refused(capsys, "--file", "b.yaml")


def test_data_that_is_a_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data").write_text(json.dumps({"text": "北京是首都。"}))
    said = refused(capsys)
    assert said.startswith("data.source: 'data': is a file; ") and "move it into a folder data, or name it with" in said
    assert refused(capsys, "--data.source", "data") == said
    assert not (folder / "job.yaml").exists()
    words = [*re.findall(r"--[\w.]+", said)]
    assert words == ["--data.source", "--run.output", "--data.shards", "--tokenizer.source"]
    values = ["data", "run", "shards", "tokenizer"]
    places = [part for pair in zip(words, values, strict=True) for part in pair]
    assert initialise(capsys, *places)[0].data.source == "data"
    (folder / "data").unlink()
    (folder / "data").symlink_to("nowhere")
    assert refused(capsys, "--file", "b.yaml").startswith("data.source: 'data': is a broken link; ")


@pytest.mark.parametrize("name", ["a b.jsonl", "a.json", "a.txt", "a.csv"])
@pytest.mark.parametrize("field", ["text", "content", "内容"])
def test_text_in_gbk_is_refused_with_the_command_that_converts_it(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, field: str
) -> None:
    row = {field: "北京市是中华人民共和国的首都。"}
    texts = {".txt": row[field], ".csv": f"{field}\n{row[field]}\n", ".json": json.dumps([row], ensure_ascii=False)}
    put(folder, name, "")
    path = folder / "data" / name
    path.write_bytes(texts.get(path.suffix, json.dumps(row, ensure_ascii=False)).encode("gb18030"))
    said = refused(capsys)
    assert re.match(rf"data\.source: 'data/{name}': no text was found at its start: it is not UTF-8, from byte ", said)
    assert not (folder / "job.yaml").exists()
    convert = said.partition("convert it: ")[2].removesuffix(", and use that in its place")
    subprocess.run(convert, shell=True, check=True, cwd=folder)
    path.unlink()
    new = f"{path.stem}-utf8{path.suffix}"
    expected = "text" if name.endswith(".txt") else field
    if name.endswith(".csv"):  # Its fields are not looked for.
        return
    assert initialise(capsys, "--data.source", new)[0].data.text_field == expected


@pytest.mark.parametrize("field", ["", "\ud800", "x\udcc4"])
def test_field_that_no_setting_can_name_is_ignored(
    folder: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    put(folder, "a.jsonl", json.dumps({field: "北京是首都。"}))
    assert re.match(r"data\.source: 'data/a\.jsonl': no text was found at its start: .*no field 'text', only '",
                    refused(capsys))  # fmt: skip
    assert not (folder / "job.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", [{"id": 1, "n": 2}], r"^data\.source: 'data/a\.json': no text was found .*no field 'text', only"),
        ("a.jsonl", [{"text": 5}], r"^data\.source: 'data/a\.jsonl': no text was found .*'text' is a number"),
        ("a.json", "[]", r"^data\.source: 'data/a\.json': no text was found at its start: it has no records"),
        ("a.json", "", r"^data\.source: 'data': all files are empty"),
        ("a.pdf", "%PDF", r"^data\.source: 'data': no file there can be read as a corpus"),
    ],
)
def test_text_that_cannot_be_read_is_one_line_and_no_file(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | list[dict[str, object]],
    said: str,
) -> None:
    put(folder, name, content)
    assert re.search(said, refused(capsys))
    assert not (folder / "job.yaml").exists()


# ---- The machine ----


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_gpus_share_the_batch_equally_and_choose_the_precision(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    put(folder, "a.jsonl", RECORDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    assert main(["init"]) == EXIT_DONE
    out = capsys.readouterr().out
    config = settings.load("job.yaml")
    assert f"found: GPUs: {gpus} (CUDA_VISIBLE_DEVICES)" in out
    assert config.train.global_batch_size % gpus == 0
    assert config.train.precision == "auto"
    assert "are less than 10 for each of the" in out, "the text is too small for a larger model"


def test_model_without_a_gpu_has_the_sizes_of_the_laptop_preset(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "北京市是中华人民共和国的首都。" * 20_000
    put(folder, "a.jsonl", [{"id": str(i), "content": text} for i in range(4)])
    config, _ = initialise(capsys)
    laptop = settings.load(str(REPOSITORY / "configs" / "laptop.yaml"))
    assert (config.model, config.train) == (laptop.model, laptop.train)
    assert config.tokenizer.vocab_size == laptop.tokenizer.vocab_size
    assert (config.checkpoint.every, config.checkpoint.keep) == (laptop.checkpoint.every, laptop.checkpoint.keep)


def test_wikipedia_and_one_gpu_give_the_recommended_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice = choose_sizes(WIKIPEDIA_BYTES, 0.1, 1, 64 * GIB, 100 * GIB)
    preset = settings.load(str(REPOSITORY / "configs" / "wiki-54m.yaml"))
    assert choice.size.spec.hidden_size == preset.model.hidden_size
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert getattr(choice.size, name) == getattr(preset.model, name)
    assert choice.size.vocab_size == preset.tokenizer.vocab_size
    assert (choice.epochs, choice.max_steps) == (preset.train.epochs, preset.train.max_steps)
    assert (choice.size.context_length, choice.global_batch_size) == (512, preset.train.global_batch_size)
    assert choice.size.warmup_steps == preset.train.warmup_steps
    assert choice.tokenizer_bytes == preset.tokenizer.train_bytes


def test_less_text_gives_a_smaller_model_or_more_epochs() -> None:
    chosen = [choose_sizes(size, 0.1, 1, 64 * GIB, 100 * GIB) for size in (10**7, 2 * 10**8, 10**9, 10**11)]
    assert [choice.size for choice in chosen] == [SMALL, MIDDLE, LARGE, LARGE]
    assert [choice.epochs for choice in chosen[1:]] == [3, 3, 1]


def test_little_text_has_checkpoints_and_a_short_warm_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled sample has about 39,000 training tokens: 154 steps of 8 x 128 tokens in 4 epochs."""
    choice = choose_sizes(144_248, 0.1, 0, None, 100 * GIB)
    steps = 4 * 144_248 * 0.9 / own_bytes_per_token(4096) / (8 * 128)
    assert (choice.size, choice.epochs) == (SMALL, 4)
    assert 2 <= steps / choice.every < 4 and choice.warmup_steps == int(steps / 5)
    assert any("too few for a model" in warning for warning in choice.warnings)
    _, out = initialise(capsys)
    assert re.search(r"^! about [\d,]+ training tokens are enough to try the commands, but too few", out, re.M)
    tiny = choose_sizes(100, 0.1, 0, None, 100 * GIB)
    assert (tiny.every, tiny.warmup_steps) == (1, 1)


def test_usable_tokenizer_in_the_folder_is_used_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer([record["content"] for record in RECORDS], 300, folder / "data" / "tokenizer")
    shutil.copy(SAMPLE, folder / "data")
    config, out = initialise(capsys)
    assert config.tokenizer.source == "data/tokenizer"
    entries = load_tokenizer("data/tokenizer", str(folder)).vocab_size
    assert f"found: a tokenizer with {entries} entries in data/tokenizer, which is used as it is\n" in out
    assert "not used: the tokenizer is data/tokenizer\n" in Path("job.yaml").read_text()


def test_unusable_tokenizer_in_the_folder_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data" / "tokenizer").mkdir(parents=True)
    (folder / "data" / "tokenizer" / "tokenizer.model").write_bytes(b"sentencepiece")
    shutil.copy(SAMPLE, folder / "data")
    config, out = initialise(capsys)
    assert config.tokenizer.source == "data/tokenizer-own"
    assert "! the tokenizer in data/tokenizer cannot be used, so a new one goes to data/tokenizer-own: " in out


def test_little_disk_keeps_fewer_checkpoints_and_none_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.jsonl", RECORDS)
    assert choose_sizes(None, 0.1, 1, None, 5 * LARGE.checkpoint_bytes).keep == 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**8, 10**8 - 10**7, 10**7))
    assert main(["init"]) == EXIT_DONE
    assert "! the disk has 0.01 GiB free, too little for two checkpoints" in capsys.readouterr().out
    assert settings.load("job.yaml").checkpoint.keep == 1


def test_little_memory_trains_the_tokenizer_on_less_text() -> None:
    assert choose_sizes(None, 0.1, 1, 2 * GIB, 100 * GIB).tokenizer_bytes == 17 * 2**20
    assert choose_sizes(None, 0.1, 0, 10, 100 * GIB).tokenizer_bytes == 2**20


def test_store_variables_are_named_without_their_values(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.jsonl", RECORDS)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
    config, out = initialise(capsys)
    text = (folder / "job.yaml").read_text()
    assert "found: object store: AWS_ACCESS_KEY_ID set; for a run there, name s3://BUCKET/FOLDER in the file" in out
    assert config.run.output == "data/run" and text.count("or s3://BUCKET/FOLDER") == 2
    assert "of-mine" not in out + text


# ---- The file ----


def test_file_is_short_and_its_settings_have_comments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.jsonl", RECORDS)
    initialise(capsys)
    text = (folder / "job.yaml").read_text()
    lines = re.findall(r"^  \w+: .*$", text, re.M)
    assert len(lines) == sum(len(section) for section in yaml.safe_load(text).values()) <= 35
    assert [line for line in lines if "  # " not in line and not re.search("hidden|heads|intermediate", line)] == []
    assert all(len(line) <= 120 for line in text.splitlines())


def test_existing_file_is_never_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "job.yaml").write_text("train: {epochs: 7}\n")
    (folder / "link.yaml").symlink_to("nowhere")
    said = "--file: 'job.yaml': this file exists, and `init` overwrites nothing; name another with --file"
    assert refused(capsys) == said
    assert refused(capsys, "--file", "link.yaml") == said.replace("job.yaml", "link.yaml")
    assert (folder / "job.yaml").read_text() == "train: {epochs: 7}\n"
    assert not (folder / "nowhere").exists()


def test_folder_that_cannot_be_written_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"--file: '/sys/job\.yaml': cannot be written: .*; name another with --file",
                        refused(capsys, "--file", "/sys/job.yaml"))  # fmt: skip


def test_settings_of_the_command_line_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.jsonl", RECORDS)
    words = ["--train.max_steps", "20", "--run.name", "a: b # c", "--data.source", "data/a.jsonl", "--data.seed", "5"]
    config, _ = initialise(capsys, *words)
    assert (config.train.max_steps, config.run.name, config.data.seed) == (20, "a: b # c", 5)
    assert config.data.source == "data/a.jsonl"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("train.optimizer", "nope", "train.optimizer: 'nope'"),
        ("model.hidden_size", "7", "model.hidden_size: 7: must be a multiple of 8"),
        ("model.architecture", "gpt", "model.architecture: 'gpt'"),
        ("train.decay_steps", "5", "train.decay_steps: 5: expected null"),
        ("train.processes", "3", "train.global_batch_size: 8: cannot be divided by the 3 processes"),
        ("tracking.to", "nope", "tracking.to: 'nope'"),
    ],
)
def test_settings_that_train_would_refuse_are_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, value: str, said: str
) -> None:
    put(folder, "a.jsonl", RECORDS)
    assert refused(capsys, f"--{name}", value).startswith(said)
    assert not (folder / "job.yaml").exists()


def test_batch_of_the_command_line_is_checked_for_the_gpus(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.jsonl", RECORDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert refused(capsys, "--train.global_batch_size", "5").startswith("train.global_batch_size: 5: cannot be divided")
    assert main(["init", "--train.global_batch_size", "5", "--train.device", "cpu"]) == EXIT_DONE


def test_comments_say_what_the_command_line_has_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.jsonl", RECORDS)
    given = {"tokenizer.source": "Qwen/Qwen2-0.5B", "tokenizer.vocab_size": "32000", "model.hidden_size": "256"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert main(["init", *words]) == EXIT_DONE
    out, text = capsys.readouterr().out, (folder / "job.yaml").read_text()
    for name, value in given.items():
        assert f"  {name.partition('.')[2]}: {value}  # as on the command line of `init`\n" in text
    assert "trained on your text" not in text and " MB each" not in text
    assert re.search(r"train_bytes: \w+  # not used: the tokenizer is Qwen/Qwen2-0.5B\n", text)
    sizes = "sizes of configs/laptop.yaml, but for tokenizer.vocab_size, model.hidden_size, which the command line"
    assert sizes in out and sizes in " ".join(text.replace("\n#", "").split())
    assert all(len(line) <= 120 for line in text.splitlines())


def test_full_disk_leaves_no_file(folder: Path) -> None:
    put(folder, "a.jsonl", RECORDS)
    command = f"ulimit -f 1; exec {shlex.quote(sys.executable)} -m job init"
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=variables)
    assert ended.returncode == EXIT_REFUSED
    (line,) = ended.stderr.splitlines()
    assert re.fullmatch(r"--file: 'job\.yaml': cannot be written: .*; name another with --file", line)
    assert [path.name for path in folder.iterdir()] == ["data"]


def test_init_reads_no_settings_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(capsys, "--config", "x.yaml").startswith("--config: 'x.yaml': `init` reads no settings file")
    monkeypatch.setenv("JOB_CONFIG", "none.yaml")
    _, out = initialise(capsys)
    assert "! JOB_CONFIG is 'none.yaml', so the commands read that instead" in out


def test_printed_commands_read_the_new_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, config_path in (((), None), (("--file", "other.yaml"), "other.yaml")):
        assert main(["init", *words]) == EXIT_DONE
        printed = capsys.readouterr().out.partition("next\n")[2].splitlines()
        parsed = [parse(shlex.split(line.partition(" -m job ")[2])) for line in printed]
        assert [one.command for one in parsed] == ["prepare", "train", "generate"]
        assert {one.config_path for one in parsed} == {config_path}
