"""The tree of settings: what it accepts, what it refuses in one line, and that it explains itself."""

import json
import re
from pathlib import Path

import pytest
import yaml

from job import config as settings
from job.errors import UserError
from job.model.flops import flops_per_token, parameter_counts
from job.model.spec import ModelSpec

PRESETS = sorted(Path("configs").glob("*.yaml"))
QWEN2_VOCABULARY = 151_646


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_key_of_a_preset_is_there_and_explained_by_the_text_of_the_tree(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header, _, body = text.partition("\n\n")
    assert all(line.startswith("#") for line in header.splitlines())
    assert body == settings.to_yaml(settings.load(str(path)))


def test_printed_settings_read_back_as_the_same_settings() -> None:
    changed = settings.load(
        None,
        [
            ("train.learning_rate", "3e-4"),
            ("data.slice_bytes", "1MiB"),
            ("run.name", "no: 1"),
            ("train.profile_steps", "10:13"),
            ("run.output", "a: b #c\u2028\x7f\U0001f642"),
            ("generate.prompts", json.dumps(["a: b #c\u2028\x7f\x85\U0001f642", "null", "", "1", "北京\n"])),
            ("tracking.log_dir", "null "),
            ("data.source", "~"),
        ],
    )
    assert settings.build(yaml.safe_load(settings.to_yaml(changed))) == changed


def test_every_setting_has_a_meaning_and_numbers_of_things_have_a_unit_or_a_name_that_has_it() -> None:
    for one in settings.settings():
        assert one.meaning, one.name
        assert one.kind, one.name
    assert len({one.name for one in settings.settings()}) == len(list(settings.settings()))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train:\n  epochs: 7\n  micro_batch_size: 3\n")
    found = settings.load(str(path), [("train.micro_batch_size", "5")]).train
    assert (found.epochs, found.micro_batch_size, found.context_length) == (7, 5, 512)


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-4", 5e-4), ("1E-3", 1e-3), ("0.1", 0.1), (".5", 0.5)],
)
def test_numbers_in_yaml_may_be_written_as_people_write_them(tmp_path: Path, written: str, value: float) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"train:\n  learning_rate: {written}\n")
    assert settings.load(str(path)).train.learning_rate == value


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.learnin_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("model.hiden_size", "model.hidden_size"),
        ("data.shard", "data.shards"),
        ("checkpoint.evry", "checkpoint.every"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^{typed}: unknown setting; did you mean {meant}\?$"):
        settings.load(None, [(typed, "1")])


def test_all_wrong_keys_of_file_and_command_line_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train:\n  lr: 1\n  epochs: many\nblock_size: 8\ntrian:\n  epochs: 1\nmodel: 3\n")
    with pytest.raises(UserError) as caught:
        settings.load(str(path), [("train.fp16", "true"), ("train.epochs", "3")])
    assert str(caught.value) == (
        "settings: 5 mistakes: "
        "(1) train.lr: 1: unknown setting; did you mean train.learning_rate? "
        "(2) block_size: 8: unknown setting; did you mean train.context_length? "
        "(3) trian: unknown section of settings; did you mean train? "
        "(4) model: 3: expected settings under it (key: value); see configs/demo.yaml "
        "(5) train.fp16: unknown setting; did you mean train.precision, which is bf16, tf32 or fp32: there is no fp16?"
    )


def test_all_wrong_values_are_told_at_once_and_each_once() -> None:
    with pytest.raises(UserError, match=r"^settings: 3 mistakes: \(1\) train.compile: .*\(2\) .*\(3\) train.max_time"):
        settings.load(None, [("train.epochs", "many"), ("train.compile", "perhaps"), ("train.max_time", "soon")])


def test_a_page_of_mistakes_is_not_listed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("".join(f"a{number}: 1\n" for number in range(2_000)))
    with pytest.raises(UserError, match=r"^settings: more than 20 mistakes: .* \(20\) [^(]* and more$"):
        settings.load(str(path))


ABSURD = ["1" + "0" * 400, "-1" + "0" * 400, "nan", "inf", "-inf", "1e999", "9" * 6000, "1e19GiB", "9" * 400 + "h"]


@pytest.mark.parametrize("one", [one for one in settings.settings() if re.search("number|size|length|range", one.kind)],
                         ids=lambda one: one.name)  # fmt: skip
def test_no_number_is_absurd(one: settings.Setting, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    section, _, key = one.name.partition(".")
    in_yaml = [*ABSURD, ".nan", ".inf", "-.inf", "0x" + "f" * 20000]
    for value in ABSURD:
        with pytest.raises(UserError, match=rf"^{one.name}: .*expected") as caught:
            settings.load(None, [(one.name, value)])
        assert len(str(caught.value)) < 700
    for value in in_yaml:
        path.write_text(f"{section}: {{{key}: {value}}}")
        with pytest.raises(UserError, match=rf"^({one.name}: .*expected|--config: .*thousands of digits)") as caught:
            settings.load(str(path))
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.hidden_size", "0"),
        ("model.hidden_size", "-8"),
        ("model.hidden_size", "100000000000"),
        ("model.num_hidden_layers", "1000000"),
        ("train.context_length", "1000000000"),
        ("train.micro_batch_size", "10000000"),
        ("train.learning_rate", "1e300"),
        ("tokenizer.train_bytes", "1:30"),
        ("run.output", "a\0b"),
        ("generate.prompts", '["a\\0b"]'),
    ],
)
def test_a_value_that_nothing_can_have_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: .*: expected"):
        settings.load(None, [(name, value)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  epoch: 1\n", r"^train\.epoch: 1: unknown setting; did you mean train\.epochs\?$"),
        ("trian:\n  epochs: 1\n", r"^trian: unknown section of settings; did you mean train\?$"),
        ("train:\n  epochs: many\n", r"^train\.epochs: 'many': expected whole number"),
        ("train:\n  epochs: 1.5\n", r"^train\.epochs: 1\.5: expected whole number"),
        ("train:\n  epochs: yes\n", r"^train\.epochs: 'true': expected whole number"),
        ("train:\n  epochs: 0\n", r"^train\.epochs: 0: expected whole number.*greater than or equal to 1"),
        ("train:\n  epochs: null\n", r"^train\.epochs: expected whole number"),
        ("train:\n  epochs: [1]\n", r"^train\.epochs: \[1\]: expected whole number"),
        ("train:\n  strategy: zero3\n", r"^train\.strategy: 'zero3': expected zero2 \| ddp"),
        ('train:\n  profile_steps: "13:10"\n', r"^train\.profile_steps: '13:10': expected range of steps.*later"),
        ("train:\n  profile_steps: 10:13\n", r"^train\.profile_steps: 613: .*in a file with quotes"),  # YAML's base 60
        ("generate:\n  prompts: 北京\n", r"^generate\.prompts: '北京': expected list of texts"),
        ("data:\n  slice_bytes: 64 parsecs\n", r"^data\.slice_bytes: '64 parsecs': expected size in bytes"),
        ("train: 3\n", r"^train: 3: expected settings under it"),
        ("- train\n", r"^--config: .*expected sections with settings, found list"),
        ("train:\n  epochs: 1\n  epochs: 2\n", r"^--config: .*not valid YAML.*'epochs' stands twice"),
        ("train: {epochs: 1\n", r"^--config: .*not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_the_setting(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        settings.load(str(path))
    assert "\n" not in str(caught.value)


def test_passwords_in_urls_are_neither_recorded_nor_shown() -> None:
    secret = settings.load(None, [("data.source", "https://me:hunter2@example.org/wiki.jsonl")])
    assert "hunter2" not in str(settings.to_dict(secret))
    assert "hunter2" not in str(UserError("data.source", secret.data.source, "is not there"))


def test_the_tutorials_model_has_its_123_28_million_parameters_and_its_flops() -> None:
    preset = settings.load("configs/wiki-123m.yaml")
    spec = ModelSpec(**preset.model.model_dump())
    parameters = parameter_counts(spec, QWEN2_VOCABULARY)
    assert round(parameters.total / 1e6, 2) == 123.28
    assert round(parameters.embedding / 1e6, 1) == 77.6
    assert round(flops_per_token(spec, QWEN2_VOCABULARY, preset.train.context_length).total / 1e6) == 758


def test_the_tutorials_hyperparameters_are_kept_to_the_letter() -> None:
    train = settings.load("configs/wiki-123m.yaml").train
    assert train.global_batch_size * train.context_length == 131_072
    assert (train.micro_batch_size, train.epochs, train.warmup_steps) == (32, 2, 200)
    assert (train.learning_rate, train.weight_decay, train.precision) == (5e-4, 0.1, "bf16")
    preset = settings.load("configs/wiki-123m.yaml")
    assert (preset.data.validation_fraction, preset.data.seed) == (0.1, 2333)
    assert (preset.evaluate.every, preset.checkpoint.every, preset.checkpoint.keep) == (500, 500, 10)
    assert preset.generate.prompts == ["人工智能", "牛顿", "北京市", "亚洲历史"]
    assert preset.tokenizer.source == "Qwen/Qwen2-0.5B"
    assert preset.data.source == "fjcanyue/wikipedia-zh-cn"
    assert preset.data.shards.startswith("s3://")


ALIASES = "a: &a [1]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = ALIASES.replace("[1]", "{k: 1}").replace(" [*", " {<<: [*").replace("]", "]}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 5000, "nested too deeply"),
        (b"train: " + b"{a: " * 100, "not valid YAML"),
        (b"train: " + b"[" * 100 + b"]" * 100, "nested too deeply"),
        (ALIASES.encode(), "more than 100,000 values"),
        (MERGES.encode(), "more than 100,000 values"),
        (b"&a [*a]", "nested too deeply"),
        (bytes(range(256)), "cannot be read"),
        ("train: {}".encode("utf-16"), "cannot be read"),
        (b"#" * 2**21, "larger than 1 MiB"),
        (b"train: {seed: " + b"9" * 5000 + b"}", "not valid YAML"),
        (b"train: {seed: 2026-99-99}", "not valid YAML"),
        (b"? [a]\n: b", "a key is a list"),
        (b"train: {seed: 3\0}", "not valid YAML"),
        (b"train: {weight_decay: .nan}", "should be a finite number"),
        (b"train: 3", "expected settings under it"),
        (b"train: [3]", "expected settings under it"),
        (b"- train", "found list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_holds_no_settings_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        settings.load(str(path), [("train.seed", "3")])
    assert len(str(caught.value)) < 400


def test_a_folder_is_no_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config: .* cannot be read: .*Is a directory"):
        settings.load(str(tmp_path))
